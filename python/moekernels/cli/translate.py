"""`moekernels translate`: one sentence per line, from one language to another."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
from tqdm import tqdm

from moekernels._devices import named_device
from moekernels.cli.device import add_device_argument
from moekernels.cli.experts import add_expert_memory_argument, print_expert_stats
from moekernels.cli.files import Lines, add_errors_argument, output_file
from moekernels.cli.ranks import add_expert_parallel_argument, loading_options
from moekernels.cli.weights import add_weights_argument, quantization_argument
from moekernels.models import AutoModelForSeq2SeqLM
from moekernels.pipelines.batching import BATCHES_PER_WINDOW, batches_by_length, windows
from moekernels.tokenizers import AutoTokenizer


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "translate",
        help="translate a file, one sentence per line",
        description="Translate one sentence per line, in order. Sentences of like length are translated together, and "
        "blank lines stay blank.",
        epilog="Without --num-beams and --max-new-tokens the checkpoint's own settings decide.",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="UTF-8 text; stdin if not given, or '-'")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, with its tokenizer")
    parser.add_argument("--src-lang", required=True, metavar="CODE", help="language of the text: eng_Latn, or en")
    parser.add_argument("--tgt-lang", required=True, metavar="CODE", help="language to translate to: fra_Latn, or fr")
    parser.add_argument("--output", metavar="FILE", help="write here instead of to stdout")
    add_errors_argument(parser)
    parser.add_argument("--num-beams", type=int, metavar="N", help="beams of the search; 1 is greedy")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="at most so many tokens per sentence")
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sentences to translate together (default: 16)"
    )
    running.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; auto is the checkpoint's")
    add_weights_argument(running)
    add_device_argument(running)
    running.add_argument("--attn-implementation", metavar="NAME", help="sdpa or eager")
    add_expert_memory_argument(running)
    add_expert_parallel_argument(running)
    parser.set_defaults(run=run)


class Translator:
    """A model and its tokenizer, set to two languages.

    Args:
        directory: the checkpoint.
        src_lang, tgt_lang: codes that the tokenizer knows.
        parameters: for `generate`.
        loading: for `from_pretrained`.

    Raises:
        ValueError: a language is unknown, or the tokenizer has none. The model is not loaded then.
    """

    def __init__(
        self, directory: str, src_lang: str, tgt_lang: str, parameters: dict[str, Any], loading: dict[str, Any]
    ) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        if not hasattr(tokenizer, "get_lang_id"):
            raise ValueError(
                f"{directory!r} does not translate: its tokenizer, {type(tokenizer).__name__}, knows no languages"
            )
        tokenizer.src_lang = src_lang
        self.tokenizer = tokenizer
        self.parameters = {**parameters, "forced_bos_token_id": tokenizer.get_lang_id(tgt_lang)}
        self.model = AutoModelForSeq2SeqLM.from_pretrained(directory, **loading)
        self.num_tokens = 0

    def batch(self, sentences: list[str]) -> list[str]:
        """The translations of sentences, each on one line."""
        inputs = self.tokenizer(sentences, padding=True, return_tensors="pt").to(self.model.device)
        ids = self.model.generate(**inputs, **self.parameters)
        self.num_tokens += int((ids[:, 1:] != self.tokenizer.pad_token_id).sum())
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def lines(self, lines: list[str], batch_size: int, progress: tqdm) -> list[str]:
        """The translations of lines, in order; blank ones stay blank. The longest sentences come first."""
        texts = [line.strip() for line in lines]
        filled = [i for i, text in enumerate(texts) if text]
        lengths = [len(self.tokenizer(texts[i])["input_ids"]) for i in filled]
        translations = [""] * len(lines)
        progress.update(len(lines) - len(filled))
        for batch in batches_by_length(lengths, batch_size):
            chosen = [filled[position] for position in batch]
            for i, translation in zip(chosen, self.batch([texts[i] for i in chosen]), strict=True):
                translations[i] = translation
            progress.update(len(chosen))
        return translations


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be a positive integer, got {args.batch_size}")
    device = named_device(args.device)
    # A file is read before the output is opened, which may be the same one.
    lines = Lines(args.file, args.errors)
    given = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    translator = Translator(
        args.model,
        args.src_lang,
        args.tgt_lang,
        {name: value for name, value in given.items() if value is not None},
        {
            "dtype": args.dtype,
            "device": device,
            "attn_implementation": args.attn_implementation,
            "expert_memory": args.expert_memory,
            **loading_options(args),
            **quantization_argument(args),
        },
    )
    start, num_lines = time.perf_counter(), 0
    with ExitStack() as stack:
        output = sys.stdout
        if args.output is not None:
            output = stack.enter_context(output_file(args.output))
        hidden = not sys.stderr.isatty()
        progress = stack.enter_context(tqdm(total=lines.total, desc="Translating", unit="line", disable=hidden))
        for window in windows(lines, args.batch_size * BATCHES_PER_WINDOW):
            for translation in translator.lines(window, args.batch_size, progress):
                print(translation, file=output)
            output.flush()
            num_lines += len(window)
    seconds = time.perf_counter() - start
    print(
        f"{num_lines} lines in {seconds:.1f} s: {num_lines / seconds:.1f} lines/s, "
        f"{translator.num_tokens / seconds:.1f} tokens/s on {device}, {torch.get_num_threads()} threads",
        file=sys.stderr,
    )
    print_expert_stats(translator.model)
    return 1 if lines.broken else 0
