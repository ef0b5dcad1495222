"""What quantised weights do to models: logits of two layers at real widths, and the translations of the demo's models.

    python benchmarks/quantization_models.py logits
    python benchmarks/quantization_models.py demo --models nllb-moe olmoe

`logits` has random weights, normal with a standard deviation of 0.02, two layers (of encoder and decoder each) at the
width of the released models, but few experts and a small vocabulary; it prints the root mean square of the error over
that of the logits, in float32. Random models exaggerate: a router's choices are near ties, and some fall the other way.
`demo` trains the models of `moekernels demo`, and counts translations of held-out numbers that are right to the letter.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moekernels as mk
from moekernels.cli.demo import _SEED, _STEPS
from moekernels.demo.corpus import Corpus
from moekernels.demo.learners import LEARNERS
from moekernels.demo.training import exact_matches, train
from moekernels.models.auto import model_class

FORMATS: dict[str, dict[str, Any]] = {
    "int4 32": {"format": "int4"},
    "int4 64": {"format": "int4", "group_size": 64},
    "nf4": {"format": "nf4"},
    "nf4 nested": {"format": "nf4", "double_quant": True},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
    "q8_0": {"format": "q8_0"},
}
_DECODER = {"num_hidden_layers": 2, "vocab_size": 2000, "pad_token_id": 1, "eos_token_id": 2}
_TRANSLATION = {"encoder_layers": 2, "decoder_layers": 2, "vocab_size": 2000}
CONFIGS: dict[str, Callable[[], mk.PretrainedConfig]] = {
    "OLMoE-1B-7B": lambda: mk.OlmoeConfig(intermediate_size=1024, num_experts=8, **_DECODER),
    "Phi-3.5-MoE": lambda: mk.PhimoeConfig(num_local_experts=2, attention_bias=True, lm_head_bias=True, **_DECODER),
    "m2m100_418M": lambda: mk.M2M100Config(**_TRANSLATION),
    "nllb-moe-54b": lambda: mk.NllbMoeConfig(
        d_model=2048,
        encoder_ffn_dim=8192,
        decoder_ffn_dim=8192,
        num_experts=2,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        **_TRANSLATION,
    ),
    "switch-base-8": lambda: mk.SwitchTransformersConfig(
        d_ff=3072,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        num_experts=4,
        vocab_size=2000,
        decoder_start_token_id=0,
    ),
}


@torch.no_grad()
def logits() -> None:
    print(f"{'':14}" + "".join(f"{name:>12}" for name in FORMATS))
    for name, make in CONFIGS.items():
        with tempfile.TemporaryDirectory(prefix="quantization-") as directory:
            _write(make(), Path(directory))
            whole = _logits(directory)
            found = (_logits(directory, quantization_config=format) for format in FORMATS.values())
            errors = [(logits - whole).norm() / whole.norm() for logits in found]
        print(f"{name:14}" + "".join(f"{error:12.2%}" for error in errors), flush=True)


def _write(config: mk.PretrainedConfig, directory: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = model_class(config)(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for name, weight in model.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        weight.data.fill_(1.0) if is_norm else weight.data.normal_(std=0.02)
    model.save_pretrained(directory)


def _logits(directory: str, **kwargs: Any) -> torch.Tensor:
    config = mk.AutoConfig.from_pretrained(directory)
    model = model_class(config).from_pretrained(directory, dtype=torch.float32, **kwargs)
    ids = torch.randint(3, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids[:, :16]} if config.is_encoder_decoder else {}
    out: torch.Tensor = model(input_ids=ids, **more).logits
    return out


def demo(models: list[str]) -> None:
    corpus = Corpus()
    pairs = corpus.held_out_pairs()
    for name in models:
        with tempfile.TemporaryDirectory(prefix="quantization-") as directory:
            torch.manual_seed(_SEED)
            learner = LEARNERS[name].create(corpus)
            for _ in train(learner, corpus, num_steps=_STEPS[name], seed=_SEED):
                pass
            learner.save(Path(directory))
            for label, format in {"float32": None, **FORMATS}.items():
                loaded = LEARNERS[name].load(Path(directory))
                loaded.model = type(loaded.model).from_pretrained(directory, quantization_config=format)
                right = exact_matches(loaded, pairs)
                print(f"{name:10} {label:12} {right:5} of {len(pairs)}  {right / len(pairs):.2%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("logits", "demo"))
    parser.add_argument("--models", nargs="+", choices=LEARNERS, default=["nllb-moe"])
    args = parser.parse_args()
    if args.what == "logits":
        logits()
    else:
        demo(args.models)


if __name__ == "__main__":
    main()
