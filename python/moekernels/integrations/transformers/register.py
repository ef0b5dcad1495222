"""The name "moekernels" among the experts implementations of transformers 5."""

from __future__ import annotations

from functools import partial

from moekernels.integrations.transformers.fused import fused_experts


def register(name: str = "moekernels") -> None:
    """Make ``experts_implementation=name`` valid for every model of transformers that uses its experts interface.

    It holds for the process. Experts that the kernels cannot run are computed by what had the name before, or else by
    the loop of their own class, and a warning says once which class and why. Switch Transformers and NLLB-MoE do not
    use the interface: transformers ignores the name there, and :func:`replace_moe_layers` serves them.

    Args:
        name: what to call it; "grouped_mm" replaces the default of all models.

    Raises:
        ImportError: transformers is not installed, or older than its experts interface (5.0).
    """
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "register() needs transformers 5 or newer, whose models have an experts interface; with transformers 4 use "
            "replace_moe_layers(model)"
        ) from error
    interface = ExpertsInterface()
    before = interface.get(name, None)
    if isinstance(before, partial) and before.func is fused_experts:
        return
    ExpertsInterface.register(name, partial(fused_experts, stock=None if before is fused_experts else before))
