"""The name "moekernels" among the experts implementations of transformers 5."""

from __future__ import annotations

from moekernels.integrations.transformers.experts import fused_experts


def register(name: str = "moekernels") -> None:
    """Make ``experts_implementation=name`` valid for every model of transformers that uses its experts interface.

    It holds for the process. Switch Transformers and NLLB-MoE do not use the interface: transformers ignores the name
    there, and :func:`replace_moe_layers` serves them.

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
    ExpertsInterface.register(name, fused_experts)
