"""Whole translations with m2m100_418M at its real size and with random weights, beside CTranslate2.

    python benchmarks/peers/m2m_100.py --install --dtypes float32 --batch 1 8 --save out.json
    python benchmarks/peers/m2m_100.py --dtypes bfloat16 --weights int8 --activations int8

With `--weights` our Linears are quantised to that format, and CTranslate2 computes in int8, with rows rounded to 8 bits
as ours are with `--activations int8` only. It quantises the head and its embedding too, as ours are with `--head`.

CTranslate2 gets the same weights in the same precision, threads, beams and length; transformers converts them and is
measured too. For each row it is said on how many tokens both agree: the weights are random, so that rounding alone may
lead a search elsewhere.

All are called in turns, CTranslate2 in a process of its own: it uses the OpenMP library of torch where that is loaded,
which counts the threads of both, and where they are more than cores lets ours sleep instead of wait.
"""

from __future__ import annotations

import argparse
import pickle
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.peers.formats import add_activations_argument, format_of
from benchmarks.peers.installed import add_install_argument, required
from benchmarks.translation import Pair, Work, build, generate_runs, measure, work
from moekernels.bench.machine import machine
from moekernels.bench.roofs import measure_roofs, name_of
from moekernels.bench.table import Row, render, save
from moekernels.models.quantization import Quantization
from moekernels.models.quantized import quantize_model

NAME = "CTranslate2"


class Translator:
    """CTranslate2 in a process of its own, with the weights of a model.

    Raises:
        SystemExit: it cannot compute in that type here.
    """

    def __init__(self, pair: Pair, compute_type: str, ctranslate2: ModuleType) -> None:
        if compute_type not in ctranslate2.get_supported_compute_types("cpu"):
            raise SystemExit(f"{NAME} cannot compute in {compute_type} on this CPU")
        spec = ctranslate2.converters.transformers.M2M100Loader().get_model_spec(pair.theirs)
        tokens = ["<s>", "<pad>", "</s>", "<unk>", *(f"t{index}" for index in range(4, pair.ours.config.vocab_size))]
        spec.register_source_vocabulary(tokens)
        spec.register_target_vocabulary(tokens)
        spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
        spec.config.decoder_start_token = "</s>"
        spec.validate()
        spec.optimize(quantization=compute_type)
        program = Path(__file__).with_name("translating.py")
        with tempfile.TemporaryDirectory() as directory:
            spec.save(directory)
            command = [sys.executable, str(program), directory, compute_type, str(torch.get_num_threads())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._answer()

    def __call__(self, sources: list[list[str]], **options: Any) -> list[list[str]]:
        """The best translation of each source."""
        assert self._process.stdin is not None
        pickle.dump((sources, options), self._process.stdin)
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        self._process.communicate()


def agreement(ids: torch.Tensor, results: list[list[str]]) -> str:
    """How many tokens are the same up to the first other one of each sentence."""
    same = total = 0
    for mine, result in zip(ids[:, 1:].tolist(), results, strict=True):
        theirs = [int(token[1:]) if token[1:].isdigit() else -1 for token in result]
        mine = mine[: len(theirs)]
        same += next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(theirs))
        total += len(theirs)
    return f"{same} of {total} tokens as {NAME} has them"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_install_argument(parser)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--weights", choices=["int8", "int4", "nf4", "q8_0"], help="the format of our Linears")
    add_activations_argument(parser)
    parser.add_argument("--head", action="store_true", help="quantise the head and the embedding it is tied to")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sentences")
    parser.add_argument("--source-length", type=int, default=32)
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, help="of encoder and decoder each; the real number if not given")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args()
    format, weights = format_of(args)
    warnings.filterwarnings("ignore")
    ctranslate2, *_ = required(args.install, ctranslate2="ctranslate2", transformers="transformers==4.56.2")

    device = torch.device("cpu")
    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(device, dtypes), {**machine(device), NAME: ctranslate2.__version__}
    rows: list[Row] = []
    for dtype in dtypes:
        pair = build("m2m100_418M", dtype, device, args.layers, with_transformers=True)
        translator = Translator(pair, "int8" if args.weights else name_of(dtype), ctranslate2)
        if format is not None:
            quantize_model(pair.ours, Quantization(format, () if args.head else None, tied=args.head))
        for batch in args.batch:
            ids = torch.randint(4, 32000, (batch, args.source_length))
            sources = [[f"t{index}" for index in row] for row in ids.tolist()]
            lengths = {"min_decoding_length": args.new_tokens, "max_decoding_length": args.new_tokens}
            for num_beams in args.beams:
                runs = generate_runs(pair, ids, num_beams, args.new_tokens)

                def theirs(sources=sources, num_beams=num_beams, lengths=lengths, translator=translator):  # type: ignore[no-untyped-def]
                    return translator(sources, beam_size=num_beams, **lengths)

                print(f"  {agreement(runs['moekernels'](), theirs())}", file=sys.stderr)  # type: ignore[arg-type]
                once = work([pair.ours.get_encoder()], ids.numel())
                step = work([pair.ours.get_decoder(), pair.ours.lm_head], batch * num_beams)
                total = Work(*(a + args.new_tokens * b for a, b in zip(once, step, strict=True)))
                title = " ".join(filter(None, (pair.name, weights, f"generate {batch}, {num_beams} beams")))
                num_tokens = batch * args.new_tokens
                row = measure(title, num_tokens, total, {**runs, NAME: theirs}, dtype, device, roofs, args.budget)
                rows.append(row)
                print(f"{row.shape}: × {NAME} {row.baselines[NAME] / row.seconds:.2f}", file=sys.stderr)
        translator.close()
        del pair, translator
    print(render(rows, roofs, about))
    if args.save:
        save(args.save, rows, roofs, about, "python benchmarks/peers/m2m_100.py " + shlex.join(sys.argv[1:]))


if __name__ == "__main__":
    main()
