"""What `replace_moe_layers` changes: `generate` of transformers' OLMoE, before and after, in one run.

    python benchmarks/drop_in.py --save out.json
    python benchmarks/drop_in.py --device cuda --layers 16 --dtypes float32 bfloat16 --new-tokens 64 --budget 60

OLMoE-1B-7B at its real width with random weights and, unless told otherwise, two of its sixteen layers. Both models are
there at once over the same weights, and take turns; a row holds medians. The prompt is timed by generating one token,
decoding by a longer generation less that one. In transformers 5 the stock model is measured with its default experts
implementation, and with "eager". Run it with another version of transformers for a row of that version.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moekernels.bench.clocks import Run, interleaved_medians
from moekernels.bench.machine import described, machine
from moekernels.bench.roofs import name_of
from moekernels.integrations.transformers import replace_moe_layers

DROP_IN = "drop-in"


def stock_model(num_layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """OLMoE-1B-7B with fewer layers; the defaults of the configuration are its real width."""
    config = transformers.OlmoeConfig(num_hidden_layers=num_layers)
    with torch.device("meta"):
        model = transformers.OlmoeForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    # The same numbers again and again: a billion of them would take longer than all the measuring. No size of a weight
    # divides how many there are, so that no two experts, rows or tokens are alike.
    numbers = torch.randn(1_000_003).mul_(0.02).to(dtype).to(device)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            for part in weight.data.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
    # No weights, but lost on the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def same_weights(model: Any) -> Any:
    """A second model whose parameters are those of the first."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def contestants(num_layers: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The models over one set of weights, by name."""
    stock = stock_model(num_layers, dtype, device)
    models = {}
    if int(transformers.__version__.partition(".")[0]) >= 5:
        models[f"stock, {stock.config._experts_implementation}"] = stock
        models["stock, eager"] = same_weights(stock)
        models["stock, eager"].set_experts_implementation("eager")
    else:
        models["stock"] = stock
    models[DROP_IN] = same_weights(stock)
    replace_moe_layers(models[DROP_IN])
    return models


@torch.no_grad()
def rows_of(models: dict[str, Any], batch: int, prompt: int, new_tokens: int, budget: float) -> list[dict[str, Any]]:
    """Tokens per second of every model for one batch size."""
    device = models[DROP_IN].device
    ids = torch.randint(2, models[DROP_IN].config.vocab_size, (batch, prompt), device=device)

    def generate(model: Any, length: int) -> Any:
        lengths = {"min_new_tokens": length, "max_new_tokens": length}
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1, **lengths)

    tokens: dict[str, Any] = {}

    def first(model: Any) -> None:
        generate(model, 1)

    def whole(name: str, model: Any) -> None:
        tokens[name] = generate(model, new_tokens)

    runs: dict[str, Run] = {f"{name}, first token": partial(first, model) for name, model in models.items()}
    runs |= {name: partial(whole, name, model) for name, model in models.items()}
    seconds = interleaved_medians(runs, device, budget)
    rows = []
    for name in models:
        first_token = seconds[f"{name}, first token"]
        rest = max(seconds[name] - first_token, 1e-9)
        rows.append(
            {
                "batch": batch,
                "model": name,
                "prompt": batch * prompt / first_token,
                "decoding": batch * (new_tokens - 1) / rest,
                "same": (tokens[name] == tokens[DROP_IN])[:, prompt:].float().mean().item(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--layers", default=2, type=int, metavar="N", help="OLMoE-1B-7B has 16")
    parser.add_argument("--batches", nargs="+", default=[1, 8], type=int, metavar="N")
    parser.add_argument("--prompt", default=128, type=int, metavar="N", help="tokens of a prompt")
    parser.add_argument("--new-tokens", default=16, type=int, metavar="N", help="tokens generated, at least 2")
    parser.add_argument(
        "--budget", default=15.0, type=float, metavar="SECONDS", help="for a batch size; 3 rounds at least"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    if args.new_tokens < 2:
        parser.error(f"--new-tokens must be at least 2, not {args.new_tokens}")

    about = {**machine(args.device), "transformers": transformers.__version__, "layers": args.layers}
    print(described(about) + "\n")
    print("| transformers | dtype | batch | model | prompt, tokens/s | decoding, tokens/s | the drop-in's tokens |")
    print("| --- " * 7 + "|")
    rows: list[dict[str, Any]] = []
    for dtype in (getattr(torch, name) for name in args.dtypes):
        models = contestants(args.layers, dtype, args.device)
        for batch in args.batches:
            for row in rows_of(models, batch, args.prompt, args.new_tokens, args.budget):
                rows.append({"transformers": transformers.__version__, "dtype": name_of(dtype), **row})
                cells = [transformers.__version__, name_of(dtype), str(batch), row["model"]]
                cells += [f"{row['prompt']:.0f}", f"{row['decoding']:.1f}", f"{row['same']:.0%}"]
                print(f"| {' | '.join(cells)} |", flush=True)
        del models
    if args.save:
        args.save.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
