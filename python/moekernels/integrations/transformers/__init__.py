"""moekernels in models of the transformers library, 4.56 to the newest.

Replace the MoE modules of a model that is already there::

    from moekernels.integrations.transformers import replace_moe_layers

    model = transformers.OlmoeForCausalLM.from_pretrained(...)
    print(replace_moe_layers(model))

or, with transformers 5, let it choose the implementation by name::

    from moekernels.integrations.transformers import register

    register()
    model = transformers.OlmoeForCausalLM.from_pretrained(..., experts_implementation="moekernels")
"""

from moekernels.integrations.transformers.fused import fused_experts
from moekernels.integrations.transformers.register import register
from moekernels.integrations.transformers.replace import ReplacedLayers, replace_moe_layers, restore_moe_layers

__all__ = ["ReplacedLayers", "fused_experts", "register", "replace_moe_layers", "restore_moe_layers"]
