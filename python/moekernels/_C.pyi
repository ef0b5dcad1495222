from typing import Any

def build_info() -> dict[str, Any]: ...
def set_cpu_isa(name: str) -> None: ...
def memory_usage() -> dict[str, int]: ...
def release_memory() -> int: ...
def describe_tiles(
    *,
    num_rows: int,
    out_features: int,
    in_features: int,
    num_experts: int,
    dtype: str = "bfloat16",
    gated: bool = False,
    gathered: bool = False,
    transposed: bool = False,
    batch_invariant: bool = False,
    compute_capability: int = 90,
    sm_count: int = 132,
) -> str: ...
def describe_weight_grad_tiles(
    *,
    num_rows: int,
    out_features: int,
    in_features: int,
    num_experts: int,
    dtype: str = "bfloat16",
    compute_capability: int = 90,
    sm_count: int = 132,
) -> str: ...
def plain_experts(
    experts: list[Any],
    expert_class: type,
    linear_class: type,
    tensor_classes: tuple[type, ...],
    dtypes: tuple[Any, ...],
    up: tuple[str, ...],
    down: str,
    others: tuple[str, ...],
    settings: tuple[str, ...],
) -> tuple[list[Any], list[Any], list[Any] | None, list[Any] | None] | None: ...
