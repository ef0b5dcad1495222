"""A quantised weight as the tensor that it is to torch."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from moekernels import ops
from moekernels.quantization import FORMATS, QuantizedWeight

MADE = ("nf4", "fp4", "int8", "int4", "int8_groups", "q4_0", "q8_0")


def _stack(format: str = "nf4", **options: object) -> QuantizedWeight:
    return ops.quantize(torch.randn(3, 8, 64), format, dtype=torch.bfloat16, **options)


def _module() -> nn.Module:
    module = nn.Linear(64, 8, dtype=torch.bfloat16)
    module.weight = nn.Parameter(ops.quantize(module.weight, "nf4", double_quant=True), requires_grad=False)
    return module


def test_every_format_can_be_made_of_its_name() -> None:
    assert set(FORMATS) == {*MADE, "q4_k", "q6_k"}
    assert all(FORMATS[name]().name == name for name in FORMATS)


@pytest.mark.parametrize("format", MADE)
def test_as_a_tensor(format: str) -> None:
    weight = _stack(format)
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 8, 64), torch.bfloat16, "cpu")
    assert not weight.requires_grad
    whole = weight.dequantize()
    assert whole.dtype == torch.bfloat16
    assert torch.equal(ops.dequantize(weight, torch.float64).bfloat16(), whole)
    for part, values in (
        (weight[1], whole[1]),
        (weight[-1], whole[-1]),
        (weight[1:], whole[1:]),
        (weight[torch.tensor([2, 0])], whole[[2, 0]]),
        (weight[:, 2:6], whole[:, 2:6]),
        (weight[1][4:], whole[1, 4:]),
        (list(weight)[2], whole[2]),
        (torch.stack([weight[2], weight[0]]), whole[[2, 0]]),
        (torch.cat([weight, weight[:1]]), whole[[0, 1, 2, 0]]),
        (torch.cat([weight[:, 4:], weight[:, :4]], dim=1), torch.cat([whole[:, 4:], whole[:, :4]], dim=1)),
        (weight.float(), weight.dequantize(torch.float32)),
        (weight.clone(), whole),
        (copy.deepcopy(weight), whole),
        (pickle.loads(pickle.dumps(weight)), whole),
    ):
        assert isinstance(part, QuantizedWeight)
        assert part.shape == values.shape
        assert torch.equal(part.dequantize(), values)
    assert torch.equal(torch.empty(3, 8, 64).copy_(weight), weight.dequantize(torch.float32))
    assert weight.num_bytes == sum(part.nbytes for part in weight.parts.values()) < 3 * 8 * 64 * 1.2


def test_an_expert_is_a_view() -> None:
    weight = _stack()
    weight[1].parts["absmax"].zero_()
    assert weight.dequantize()[1].count_nonzero() == 0
    assert weight.dequantize()[0].count_nonzero() > 0


def test_rows_with_nested_scales() -> None:
    """16384 weights share an offset."""
    weight = ops.quantize(torch.randn(64, 512), "nf4", double_quant=True)
    assert torch.equal(weight[32:].dequantize(), weight.dequantize()[32:])
    joined = torch.cat([weight[32:], weight])
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize()[32:], weight.dequantize()]))
    with pytest.raises(ValueError, match="rows 1 to 64 cannot be had by themselves: 16384 weights share their"):
        weight[1:]
    with pytest.raises(ValueError, match="cannot join matrices of 8 rows of 512"):
        torch.cat([ops.quantize(torch.randn(8, 512), "nf4", double_quant=True)] * 2)


@pytest.mark.parametrize("format", [*MADE, "q6_k"])
def test_as_an_embedding(format: str) -> None:
    if format == "q6_k":  # which is read only
        blocks = torch.randint(0, 100, (10 * 2 * 210,), dtype=torch.uint8)
        weight = QuantizedWeight({"blocks": blocks}, FORMATS[format](), (10, 512), dtype=torch.bfloat16)
    else:
        weight = ops.quantize(torch.randn(10, 64), format, dtype=torch.bfloat16)
    ids = torch.tensor([[9, 0, 3], [3, 3, 1]])
    assert torch.equal(nn.functional.embedding(ids, weight), weight.dequantize()[ids])
    assert nn.functional.embedding(ids[:0], weight).shape == (0, 3, weight.shape[1])
    for wrong in (10, -1):
        with pytest.raises(IndexError):
            nn.functional.embedding(torch.tensor([wrong]), weight)


def test_shared_between_processes() -> None:
    module = _module()
    assert module.share_memory().weight.is_shared()
    assert all(part.is_shared() for part in module.weight.parts.values())


def test_an_embedding_whose_rows_share_scales() -> None:
    with pytest.raises(RuntimeError, match=r"an embedding is a matrix \[N, K\], got \[3, 8, 64\]"):
        nn.functional.embedding(torch.tensor([1]), _stack())
    weight = ops.quantize(torch.randn(10, 96), "nf4")
    with pytest.raises(ValueError, match="nf4: rows of 96 weights share their scales, and cannot be taken"):
        nn.functional.embedding(torch.tensor([1]), weight)


def test_as_a_parameter() -> None:
    module = _module()
    assert isinstance(module.weight, nn.Parameter)
    assert isinstance(module.weight, QuantizedWeight)
    assert list(dict(module.named_parameters())) == ["weight", "bias"]
    expected = module.weight.dequantize()

    other = _module()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight.dequantize(), expected)
    other = _module()
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other.weight.dequantize(), expected)

    copied = copy.deepcopy(module)
    assert isinstance(copied.weight, nn.Parameter)
    assert copied.weight.parts["codes"].data_ptr() != module.weight.parts["codes"].data_ptr()
    module.to(torch.float32)
    assert (module.weight.dtype, module.bias.dtype) == (torch.float32, torch.float32)
    assert isinstance(module.weight, nn.Parameter)
    module.to("meta")
    assert module.weight.parts["codes"].is_meta
    assert torch.equal(copied.weight.dequantize(), expected)


def test_files_of_torch() -> None:
    buffer = io.BytesIO()
    module = _module()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded["weight"].dequantize(), module.weight.dequantize())
    assert loaded["weight"].format == module.weight.format


def test_flattening() -> None:
    weight = _stack("nf4", double_quant=True)
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    again = QuantizedWeight.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
    assert torch.equal(again, weight)
    assert not torch.equal(again, _stack("nf4"))
    assert torch.utils._python_dispatch.is_traceable_wrapper_subclass(weight)


def test_says_what_it_is() -> None:
    assert repr(_stack("int4")) == (
        "QuantizedWeight('int4', group_size=32, shape=[3, 8, 64], dtype=torch.bfloat16, device='cpu')"
    )
    assert "Int8" not in repr(nn.ParameterList([nn.Parameter(_stack("int8"), requires_grad=False)]))


def test_what_cannot_be_done() -> None:
    weight = _stack()
    for write in (weight.zero_, lambda: weight.mul_(2), lambda: weight + 1, lambda: weight @ weight[0].T):
        with pytest.raises(RuntimeError, match=r"does not work on a quantised weight; multiply with moekernels.ops"):
            write()
    with pytest.raises(RuntimeError, match=r"cannot copy a tensor of .*float32 into a nf4 weight"):
        weight.copy_(torch.zeros(3, 8, 64))
    with pytest.raises(RuntimeError, match=r"cannot copy NF4\(blocksize=64, double_quant=False\) \[2, 8, 64\] into"):
        weight.copy_(weight[:2])
    for train in (lambda: weight.requires_grad_(), lambda: nn.Parameter(weight)):
        with pytest.raises(ValueError, match="a quantised weight cannot be trained"):
            train()
    with pytest.raises(ValueError, match="a quantised weight cannot be trained"):
        weight.requires_grad = True
    weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"cannot become torch.int8; call dequantize"):
        weight.to(torch.int8)
    with pytest.raises(RuntimeError, match=r"cat takes weights of one format; got NF4.* and Int8"):
        torch.cat([weight, _stack("int8")])


def test_parts_that_do_not_fit() -> None:
    parts = _stack("int4").parts
    for change, message in (
        (
            {"codes": parts["codes"][:, 1:]},
            r"codes of a int4 weight \[3, 8, 64\] must be .*uint8 \[3, 256\], got .*255",
        ),
        (
            {"scales": parts["scales"].float()},
            r"scales of .* must be torch.float16 \[3, 16\], got .*32 \[3, 16\]",
        ),
        ({"scales": parts["scales"].to("meta")}, r"scales must be on cpu like the other parts, got meta"),
        ({"more": parts["codes"]}, "int4 has the parts codes, scales; got codes, scales, more"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantizedWeight({**parts, **change}, "int4", (3, 8, 64))


def test_errors_of_quantize() -> None:
    for arguments, options, message in (
        ((torch.randn(4, 48), "int4"), {}, r"must be a multiple of 32, the group of int4, got 48 \(shape \[4, 48\]\)"),
        ((torch.randn(4, 96), "int4"), {"group_size": 64}, "must be a multiple of 64, the group of int4, got 96"),
        ((torch.randn(4, 64), "int3"), {}, "format must be one of nf4, fp4, int8, int4, .*; got 'int3'"),
        (
            (torch.randn(4, 64), "int4"),
            {"blocksize": 64},
            "int4 has the options group_size, activations; got 'blocksize'",
        ),
        (
            (torch.randn(4, 64), "int8"),
            {"blocksize": 64},
            "int8 has the options activations, threshold; got 'blocksize'",
        ),
        ((torch.randn(64), "int8"), {}, r"weight must be \[N, K\] or \[E, N, K\] and not empty, got \[64\]"),
        ((torch.randn(0, 64), "int8"), {}, r"and not empty, got \[0, 64\]"),
        ((torch.ones(4, 64, dtype=torch.int32), "int8"), {}, "must be float32, bfloat16 or float16, got torch.int32"),
        ((_stack(), "int8"), {}, "weight is quantised already, to nf4"),
        ((torch.randn(4, 64), "int4"), {"group_size": 16}, "group_size must be 32 or 64, got 16"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantize(*arguments, **options)
    with pytest.raises(ValueError, match="weight must be a QuantizedWeight, got a Tensor"):
        ops.dequantize(torch.ones(2, 2))  # type: ignore[arg-type]


def test_what_fake_tensors_leave_behind() -> None:
    """Tables are made once for a device, but none of those that a mode has made."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moekernels.quantization import bitsandbytes

    device = torch.device("cpu")
    with FakeTensorMode():
        weight = ops.quantize(torch.randn(48, 128), "nf4", double_quant=True)
        nn.functional.linear(torch.randn(17, 128), weight)
    weight = ops.quantize(torch.randn(48, 128), "nf4", double_quant=True)
    assert type(nn.functional.linear(torch.randn(17, 128), weight)) is torch.Tensor
    assert bitsandbytes.dynamic_map(device) is bitsandbytes.dynamic_map(device)


def test_a_first_use_under_other_defaults() -> None:
    """Tables are float32 on the CPU, whatever the defaults are when they are made."""
    from moekernels.quantization import bitsandbytes

    device = torch.device("cpu")
    for make, *names in ((bitsandbytes.dynamic_map,), (bitsandbytes._codes, "nf4"), (bitsandbytes._codes, "fp4")):
        expected = make(*names, device)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                found = inspect.unwrap(make)(*names, device)
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.dtype == torch.float32 and torch.equal(found, expected)


class _Layer(nn.Module):
    def __init__(self, format: str) -> None:
        super().__init__()
        self.up = nn.Parameter(ops.quantize(torch.randn(3, 16, 64), format), requires_grad=False)
        self.out = nn.Parameter(ops.quantize(torch.randn(8, 64), format), requires_grad=False)

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.grouped_gemm(rows, self.up, offsets) * 2, ops.linear(rows.cos(), self.out)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("format", ["int4", "nf4", "int8", "q8_0"])
def test_compiled(format: str, grad: bool) -> None:
    """The compiler leaves products with quantised weights to Python."""
    torch._dynamo.reset()
    layer, offsets = _Layer(format), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    rows = torch.randn(5, 64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        found, expected = torch.compile(layer, backend="aot_eager")(rows, offsets), layer(rows, offsets)
    assert all(map(torch.equal, found, expected))
