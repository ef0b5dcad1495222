"""moekernels as a repository of the `kernels` library, whose `kernelize` swaps the forward of marked layers.

A layer is marked with ``use_kernel_forward_from_hub("MoekernelsExperts")`` or, from outside, as below; a mapping says
where the forward of that name comes from::

    import kernels
    from moekernels.integrations.kernels import write_repository
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    path = write_repository("moekernels-experts")
    repository = kernels.LocalLayerRepository(path, layer_name="MoekernelsExperts")
    kernels.register_kernel_mapping({"MoekernelsExperts": {"cpu": repository, "cuda": repository}})
    kernels.replace_kernel_forward_from_hub(OlmoeExperts, "MoekernelsExperts")
    model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from moekernels._files import write_file
from moekernels._version import __version__

LAYER_NAME = "MoekernelsExperts"

_METADATA = {
    "id": f"moekernels_{__version__.replace('.', '_')}",
    "name": "moekernels",
    "version": 1,
    "license": "Apache-2.0",
    "python-depends": [],
}
_BACKENDS = ("cpu", "cuda")
_SOURCE = '''"""The experts of moekernels as a layer; the package itself must be installed."""

from . import layers

__all__ = ["layers"]
'''
_LAYERS = f'''"""Layers without state: kernelize puts their forward on a module that has the weights."""

import torch

from moekernels.integrations.transformers import fused_experts


class {LAYER_NAME}(torch.nn.Module):
    """For experts as transformers 5 keeps them: gate_up_proj [E, 2F, H], down_proj [E, H, F] and act_fn."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return fused_experts(self, hidden_states, top_k_index, top_k_weights)
'''


def write_repository(directory: str | os.PathLike[str]) -> Path:
    """Write the local repository that `kernels.LocalLayerRepository` loads :data:`LAYER_NAME` from.

    Args:
        directory: created if need be; must be empty or hold such a repository already.

    Returns:
        Its path, for `repo_path`.

    Raises:
        FileExistsError: there is something else in it.
    """
    root = Path(directory)
    files: dict[Path, str] = {}
    for backend in _BACKENDS:
        variant = root / "build" / f"torch-{backend}"
        metadata = {**_METADATA, "id": f"{_METADATA['id']}_{backend}", "backend": {"type": backend}}
        files[variant / "__init__.py"] = _SOURCE
        files[variant / "layers.py"] = _LAYERS
        files[variant / "metadata.json"] = json.dumps(metadata, indent=2) + "\n"
    # What Python leaves beside modules it imported may be there.
    others = [p for p in root.rglob("*") if p.is_file() and p not in files and p.parent.name != "__pycache__"]
    if others:
        raise FileExistsError(f"write_repository: {root} holds other files, {others[0]} among them")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    return root
