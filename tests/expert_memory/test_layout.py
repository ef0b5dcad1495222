"""Where an expert's bytes lie, in files of every kind."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekernels.checkpoint import CheckpointError, CheckpointReader, tensor_offsets
from moekernels.expert_memory.layout import ALIGNMENT, Field, Layout, Span, Stored, Weight, spans_of
from moekernels.expert_memory.memory import PIECE, Slot
from tests.expert_memory.conftest import EXPERT, everything, load
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_layout() -> None:
    layout = Layout.of(
        [
            Weight("bias", (10,), torch.float32),
            Weight("up", (10, 3), torch.bfloat16),
            Weight("down", (3, 10), torch.float32),
        ]
    )
    assert layout.fields == (
        Field("down", (3, 10), torch.float32, 0),
        Field("up", (10, 3), torch.bfloat16, 128),
        Field("bias", (10,), torch.float32, 192),
    )
    assert layout.num_weights == 70
    assert layout.nbytes == ALIGNMENT
    slot = Slot(layout, torch.device("cpu"))
    for value, tensor in enumerate(slot.tensors.values()):
        tensor.fill_(value)
    assert [tensor.unique().item() for tensor in slot.tensors.values()] == [0, 1, 2]
    assert [tuple(tensor.shape) for tensor in slot.tensors.values()] == [(10,), (10, 3), (3, 10)]


def test_spans_of_parts_and_of_a_stack() -> None:
    field = Field("gate_up_proj", (4, 3), torch.float32, 64)
    gate = Stored("gate", Path("a"), 1000, (2, 3), torch.bfloat16)
    up = Stored("up", Path("b"), 50, (2, 3), torch.float32)
    assert spans_of(field, 7, {(7, 0): gate, (7, 1): up}) == [
        Span(Path("a"), "gate", 1000, 12, torch.bfloat16, torch.float32, 64),
        Span(Path("b"), "up", 50, 24, torch.float32, torch.float32, 88),
    ]
    stack = Stored("stack", Path("c"), 300, (9, 4, 3), torch.bfloat16)
    assert spans_of(field, 7, {(None, 0): stack}) == [
        Span(Path("c"), "stack", 300 + 7 * 24, 24, torch.bfloat16, torch.float32, 64)
    ]


def test_pieces() -> None:
    span = Span(Path("a"), "w", 100, 2 * PIECE + 10, torch.bfloat16, torch.float32, 64)
    pieces = span.pieces(PIECE)
    assert [(piece.offset, piece.nbytes, piece.target) for piece in pieces] == [
        (100, PIECE, 64),
        (100 + PIECE, PIECE, 64 + 2 * PIECE),
        (100 + 2 * PIECE, 10, 64 + 4 * PIECE),
    ]
    assert span._replace(nbytes=0).pieces(PIECE) == []


def rewrite(
    source: Path, target: Path, odd: int, rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """A checkpoint in one file whose data begin at a byte that leaves `odd` when divided by a block."""
    target.mkdir()
    tensors = {name: tensor.clone() for shard in CheckpointReader(source).shards() for name, tensor in shard}
    entries, end = {}, 0
    tensors = rename(tensors)
    for name, tensor in tensors.items():
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    header = json.dumps(entries).encode()
    header += b" " * ((odd - 8 - len(header)) % ALIGNMENT)
    with (target / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()))
    (target / "config.json").write_text((source / "config.json").read_text())


@pytest.mark.parametrize("odd", [0, 1, 6, 4095])
def test_data_that_begin_anywhere(odd: int, saved: Callable[..., Path], tmp_path: Path) -> None:
    rewrite(saved("olmoe"), tmp_path / "odd", odd, lambda tensors: tensors)
    in_memory = load("olmoe", saved("olmoe"))
    for dtype in (torch.float32, torch.bfloat16):
        streamed = load("olmoe", tmp_path / "odd", dtype=dtype, expert_memory=EXPERT)
        expected = in_memory.to(dtype)(**tiny.inputs("olmoe"))
        got = streamed(**tiny.inputs("olmoe"))
        assert all(torch.equal(a, b) for a, b in zip(everything(got), everything(expected), strict=True))


def test_stacks_in_a_file(saved: Callable[..., Path], tmp_path: Path) -> None:
    """All experts of a layer in one tensor, as transformers 5 has them in memory."""
    in_memory = load("phimoe", saved("phimoe"))

    def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace("block_sparse_moe.experts", "mlp.experts"): weight
            for name, weight in in_memory.state_dict().items()
        }

    rewrite(saved("phimoe"), tmp_path / "stacked", 24, stacked)
    streamed = load("phimoe", tmp_path / "stacked", expert_memory=2 * EXPERT)
    assert torch.equal(streamed(**tiny.inputs("phimoe")).logits, in_memory(**tiny.inputs("phimoe")).logits)


@pytest.mark.parametrize("name", ["olmoe", "nllb-moe"])
def test_pickles(name: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    """As PyTorch writes them since 1.6; an older one says what to do."""
    in_memory = load(name, saved(name))
    tensors = {key: tensor.clone() for shard in CheckpointReader(saved(name)).shards() for key, tensor in shard}
    (tmp_path / "config.json").write_text((saved(name) / "config.json").read_text())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    streamed = load(name, tmp_path, expert_memory=EXPERT)
    assert torch.equal(streamed(**tiny.inputs(name)).logits, in_memory(**tiny.inputs(name)).logits)
    message = r"pytorch_model\.bin: .* cannot be read by itself .*: moekernels repack --model"
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=message):
        load(name, tmp_path, expert_memory=EXPERT)


def test_tensors_of_a_pickle(tmp_path: Path) -> None:
    """Where each begins; none for what does not lie there as it is read, or is compressed."""
    whole = torch.randn(9, 4)
    tensors = {"whole": whole, "part": whole[2:5], "turned": whole.t(), "bf16": torch.randn(7).bfloat16()}
    torch.save(tensors, tmp_path / "x.bin")
    offsets = tensor_offsets(tmp_path / "x.bin")
    assert offsets.keys() == {"whole", "part", "bf16"}
    data = (tmp_path / "x.bin").read_bytes()
    for name, begin in offsets.items():
        tensor = tensors[name]
        found = torch.frombuffer(bytearray(data[begin : begin + tensor.nbytes]), dtype=tensor.dtype)
        assert torch.equal(found.view(tensor.shape), tensor), name
    with (
        zipfile.ZipFile(tmp_path / "x.bin") as source,
        zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.namelist():
            target.writestr(record, source.read(record))
    assert tensor_offsets(tmp_path / "y.bin") == {}


@pytest.mark.parametrize(
    "content", [b"", b"\x10\0\0\0\0\0\0\0{", b"\x02\0\0\0\0\0\0\0[]", b"\x0a\0\0\0\0\0\0\0" + b'{"a": {} }']
)
def test_broken_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a safetensors file, its header is damaged"):
        tensor_offsets(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"y\.safetensors: cannot be read: No such file"):
        tensor_offsets(tmp_path / "y.safetensors")
