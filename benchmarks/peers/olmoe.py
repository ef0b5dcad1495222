"""Prefill and decoding of OLMoE at its real width and with random weights, beside llama.cpp.

    python benchmarks/peers/olmoe.py --install --dtype bfloat16 --layers 2
    python benchmarks/peers/olmoe.py --weights int4 --activations int8

With `--weights` attention and experts are quantised in both: by us to that format, for llama.cpp to Q4_0 or Q8_0, which
have as many bits. Embedding, router and head stay as they are. With `--activations int8` our rows are rounded to 8 bits
before they are multiplied, as llama.cpp's always are.

Writes the weights as GGUF into a temporary file, so that both engines compute with the same numbers in the same
precision, threads and lengths, in one process; says how far their logits are apart, and times both in turns. `tokens`
counts those of a prompt, or the one of a decoding step.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.peers.formats import add_activations_argument, format_of
from benchmarks.peers.installed import add_install_argument, required
from moekernels import OlmoeConfig, OlmoeForCausalLM
from moekernels.bench.clocks import interleaved_medians, make_clock
from moekernels.bench.machine import machine
from moekernels.bench.roofs import Roofs, measure_roofs
from moekernels.bench.table import Row, render, save
from moekernels.models.quantization import Quantization
from moekernels.models.quantized import quantize_model
from moekernels.nn import DynamicCache
from moekernels.quantization import QuantizedWeight

NAME = "llama.cpp"
#: Our formats, and llama.cpp's of as many bits. Those of one pair whose values differ may differ in their logits.
WEIGHTS = {"int4": "Q4_0", "q4_0": "Q4_0", "nf4": "Q4_0", "q8_0": "Q8_0", "int8": "Q8_0"}
_SAME_VALUES = ("int4", "q4_0", "q8_0")


def random_model(num_layers: int, dtype: torch.dtype) -> OlmoeForCausalLM:
    config = OlmoeConfig(num_hidden_layers=num_layers, intermediate_size=1024, pad_token_id=1, eos_token_id=50279)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else weight.data.normal_(std=0.02)
    return model


def gguf_tensors(model: OlmoeForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names of llama.cpp; what has one dimension, and the router, are float32 there."""
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight.float()
    yield "output.weight", model.lm_head.weight
    for number, layer in enumerate(model.model.layers):
        attention, experts = layer.self_attn, layer.mlp.experts
        gate, up = experts.up_weight.chunk(2, dim=1)
        tensors: dict[str, Tensor] = {
            "attn_norm": layer.input_layernorm.weight.float(),
            "attn_q": attention.q_proj.weight,
            "attn_k": attention.k_proj.weight,
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "attn_q_norm": attention.q_norm.weight.float(),
            "attn_k_norm": attention.k_norm.weight.float(),
            "ffn_norm": layer.post_attention_layernorm.weight.float(),
            "ffn_gate_inp": layer.mlp.router.weight.float(),
            "ffn_gate_exps": gate,
            "ffn_up_exps": up,
            "ffn_down_exps": experts.down_proj,
        }
        for name, tensor in tensors.items():
            yield f"blk.{number}.{name}.weight", tensor


def write_gguf(path: Path, model: OlmoeForCausalLM, gguf: ModuleType, weights: str | None, head: bool) -> None:
    """The model without a vocabulary: it is given ids. `weights` is the type of attention and experts, and of the head
    if that is asked for."""
    config = model.config
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    types = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    for name, tensor in gguf_tensors(model):
        packed = (name.startswith("blk.") and "gate_inp" not in name) or (head and name == "output.weight")
        if weights is not None and tensor.ndim > 1 and packed:
            kind = gguf.GGMLQuantizationType[weights]
            writer.add_tensor(name, gguf.quantize(tensor.detach().float().contiguous().numpy(), kind), raw_dtype=kind)
            continue
        raw = tensor.detach().contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
        writer.add_tensor(name, raw, raw_dtype=types[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Ours:
    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.model = model
        self.cache = DynamicCache()

    def prefill(self, ids: list[int]) -> Tensor:
        """Logits after the last token."""
        self.cache = DynamicCache()
        return self._logits(ids)

    def step(self, token: int, past: int) -> Tensor:
        """Logits after one more token, which is forgotten again."""
        logits = self._logits([token])
        self.cache.crop(past)
        return logits

    def _logits(self, ids: list[int]) -> Tensor:
        out = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()


class Theirs:
    def __init__(self, path: Path, context: int, llama_cpp: ModuleType) -> None:
        threads = torch.get_num_threads()
        self.llama: Any = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._pointer: Callable[[], Any] = lambda: llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)

    def prefill(self, ids: list[int]) -> Tensor:
        self.llama.reset()
        return self._logits(ids)

    def step(self, token: int, past: int) -> Tensor:
        self.llama.n_tokens = past  # what is behind is cut from the cache before the next call
        return self._logits([token])

    def _logits(self, ids: list[int]) -> Tensor:
        self.llama.eval(ids)
        pointer = self._pointer()
        return torch.tensor(pointer[: self.llama.n_vocab()])


def work(model: OlmoeForCausalLM, num_tokens: int) -> tuple[float, float]:
    """FLOPs and bytes of weights: every token passes the dense weights and its experts, the last one the head."""
    config = model.config
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    head = model.lm_head.weight.numel()
    dense = sum(p.numel() for p in model.model.layers.parameters()) - experts
    share = config.num_experts_per_tok / config.num_experts
    touched = 1 - (1 - share) ** num_tokens
    flops = 2.0 * ((dense + share * experts) * num_tokens + head)

    def num_bytes(parameters: Iterable[Tensor]) -> int:
        return sum(p.num_bytes if isinstance(p, QuantizedWeight) else p.nbytes for p in parameters)

    expert_bytes = num_bytes(p for layer in model.model.layers for p in layer.mlp.experts.parameters())
    dense_bytes = num_bytes(model.model.layers.parameters()) - expert_bytes
    return flops, dense_bytes + touched * expert_bytes + num_bytes([model.lm_head.weight])


def measure(name: str, num_tokens: int, runs: dict[str, Any], model: OlmoeForCausalLM, dtype: str, weights: str | None,
            roofs: Roofs, budget: float) -> Row:  # fmt: skip
    device = torch.device("cpu")
    medians = interleaved_medians(runs, device, budget)
    seconds = medians.pop("moekernels")
    flops, num_bytes = work(model, num_tokens)
    roof = roofs.seconds(flops, num_bytes, getattr(torch, dtype)) / seconds
    clock = make_clock(device).name
    return Row(
        f"olmoe-1b-7b {name}", num_tokens, "–", weights or dtype, seconds, flops, num_bytes, roof, medians, clock
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_install_argument(parser)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights")
    parser.add_argument("--weights", choices=WEIGHTS, help="the format of attention and experts")
    add_activations_argument(parser)
    parser.add_argument("--head", action="store_true", help="the head too, here and there")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args()
    format, weights = format_of(args)
    gguf, llama_cpp = required(args.install, gguf="gguf", llama_cpp="llama-cpp-python")

    dtype = getattr(torch, args.dtype)
    roofs = measure_roofs(torch.device("cpu"), [dtype])
    about = {**machine(torch.device("cpu")), NAME: f"(llama-cpp-python {llama_cpp.__version__})"}
    model = random_model(args.layers, dtype)
    ids = torch.randint(model.config.vocab_size, (args.prompt,)).tolist()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "olmoe.gguf"
        write_gguf(path, model, gguf, args.weights and WEIGHTS[args.weights], args.head)
        if format is not None:
            quantize_model(model, Quantization(format, () if args.head else None))
        engines = {"moekernels": Ours(model), NAME: Theirs(path, args.prompt + 1, llama_cpp)}
        mine, theirs = (engine.prefill(ids) for engine in engines.values())
        apart = ((mine - theirs).norm() / mine.norm()).item()
        print(f"  logits are {apart:.2%} apart", file=sys.stderr)
        if not apart < (0.1 if args.weights in (None, *_SAME_VALUES) else 0.5):
            raise SystemExit(f"{NAME} computes something else")
        prefill = {name: lambda engine=engine: engine.prefill(ids) for name, engine in engines.items()}
        step = {name: lambda engine=engine: engine.step(ids[0], args.prompt) for name, engine in engines.items()}
        rows = [
            measure("prefill", args.prompt, prefill, model, args.dtype, weights, roofs, args.budget),
            measure("decoding step", 1, step, model, args.dtype, weights, roofs, args.budget),
        ]
    print(render(rows, roofs, about))
    if args.save:
        save(args.save, rows, roofs, about, "python benchmarks/peers/olmoe.py " + shlex.join(sys.argv[1:]))


if __name__ == "__main__":
    main()
