"""NLLB-MoE with its experts on the disk, beside transformers with accelerate's disk offload on the same files.

    python benchmarks/nllb_54b.py --make DIR --sparse-step 24
    python benchmarks/peers/accelerate_nllb.py --install --run DIR --expert-memory 1.34GiB --save out.md

Both have the other weights in memory, in bfloat16, and translate one sentence of 30 words greedily. accelerate keeps no
expert: what a layer needs is read for each call, through the page cache, which may hold all of it; so it is also run
with the files dropped from that cache before each step, as it is with a checkpoint that is larger than memory.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.peers.installed import add_install_argument, required
from moekernels._files import write_file
from moekernels.bench.machine import described, machine
from moekernels.models import NllbMoeForConditionalGeneration

_WORDS = 30
_ALL = 6  # sparse layers of the real model's decoder


def offloaded(directory: Path, folder: str, transformers: ModuleType) -> Any:
    """transformers' model, whose experts stay on the disk."""
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        skeleton = transformers.NllbMoeForConditionalGeneration(config)
    places: dict[str, str] = {}
    for name, module in skeleton.named_modules():
        if name.endswith(".ffn.experts"):
            places[name] = "disk"
        elif not list(module.children()) and ".ffn.experts." not in name:
            places[name] = "cpu"
    return transformers.NllbMoeForConditionalGeneration.from_pretrained(
        directory, device_map=places, offload_folder=folder, dtype=torch.bfloat16
    ).eval()


def drop(directory: Path) -> None:
    """Ask the system to forget what it has read of the files."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@torch.no_grad()
def steps(model: Any, encoded: Any, tokens: Tensor, before: Callable[[], object] = lambda: None) -> list[float]:
    """Seconds of each step of a decoder that is given one token after the other."""
    seconds, past = [], None
    for token in tokens.view(-1, 1, 1):
        before()
        start = time.perf_counter()
        output = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=past, use_cache=True)
        seconds.append(time.perf_counter() - start)
        past = output.past_key_values
    return seconds[1:]  # the first one also prepares the cross-attention


def measure(directory: Path, expert_memory: str, new_tokens: int, transformers: ModuleType) -> str:
    generator = torch.Generator().manual_seed(1)
    ours = NllbMoeForConditionalGeneration.from_pretrained(directory, expert_memory=expert_memory)
    vocabulary, sparse = ours.config.vocab_size, ours.config.decoder_layers // ours.config.decoder_sparse_step
    ids = torch.randint(4, vocabulary, (1, _WORDS), generator=generator)
    tokens = torch.randint(4, vocabulary, (new_tokens,), generator=generator)
    with torch.no_grad():
        encoded = ours.get_encoder()(input_ids=ids, return_dict=True)
    ours.expert_cache.reset_stats()
    results = {"moekernels": steps(ours, encoded, tokens)}
    without = ours.expert_cache.stats().seconds_waited / new_tokens
    with tempfile.TemporaryDirectory() as folder:
        del ours
        theirs = offloaded(directory, folder, transformers)
        results["accelerate, files in the page cache"] = steps(theirs, encoded, tokens)
        results["accelerate, files on the disk"] = steps(theirs, encoded, tokens, lambda: drop(directory))
    lines = ["| one sentence, a step of the decoder | median s | slowest s |", "| --- | --- | --- |"]
    for name, seconds in results.items():
        ordered = sorted(seconds)
        lines.append(f"| {name} | {ordered[len(ordered) // 2]:.3f} | {ordered[-1]:.3f} |")
    about = f"{sparse} of the decoder's {_ALL} sparse layers; moekernels waited {without:.3f} s a step for its experts"
    return "\n".join([about, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_install_argument(parser)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="what nllb_54b.py --make has written")
    parser.add_argument("--expert-memory", default="1.34GiB", metavar="SIZE")
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result as Markdown")
    args = parser.parse_args()
    transformers, _ = required(args.install, transformers="transformers==4.56.2", accelerate="accelerate")
    command = shlex.join(["python", "benchmarks/peers/accelerate_nllb.py", *sys.argv[1:]])
    result = measure(args.run, args.expert_memory, args.new_tokens, transformers)
    text = "\n\n".join([f"`{command}`", described(machine(torch.device("cpu"))), result]) + "\n"
    print(text)
    if args.save is not None:
        write_file(args.save, text)


if __name__ == "__main__":
    main()
