"""`moekernels chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from moekernels._devices import named_device
from moekernels.cli.experts import print_expert_stats
from moekernels.cli.files import Lines
from moekernels.cli.sampling import (
    EPILOG,
    add_running_arguments,
    add_sampling_arguments,
    generation_parameters,
    load_model,
)
from moekernels.generation import TextStreamer
from moekernels.tokenizers import AutoTokenizer

_HELP = """\
/reset        forget the conversation
/system TEXT  begin anew with other instructions; without TEXT, with none
/exit         leave (so does the end of the input)
Ctrl-C        stop an answer"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model, which answers line by line and remembers what was said. Answers go to stdout as "
        "they appear. /help lists what else can be typed.",
        epilog=EPILOG,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory, or its name on the hub")
    parser.add_argument("--system", metavar="TEXT", help="instructions that come before the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default: 512)")
    add_sampling_arguments(parser)
    add_running_arguments(parser)
    parser.set_defaults(run=run)


class _Printer(TextStreamer):
    """Prints an answer and keeps it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


class Conversation:
    """What was said so far, and what says the rest.

    Args:
        model, tokenizer: a decoder, and a tokenizer with a chat template.
        parameters: for `generate`.
        system: instructions, if any.
    """

    def __init__(self, model: Any, tokenizer: Any, parameters: dict[str, Any], system: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.parameters = parameters
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forgets what was said, and sets the instructions."""
        self.system = system
        self.messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> str:
        """Prints the model's answer to a message, and remembers both. What Ctrl-C cuts short is remembered too."""
        self.messages.append({"role": "user", "content": text})
        printer = _Printer(self.tokenizer)
        try:
            self.model.generate(**self._inputs(), **self.parameters, tokenizer=self.tokenizer, streamer=printer)
        except KeyboardInterrupt:
            printer.end()
        except ValueError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": printer.text})
        return printer.text

    def _inputs(self) -> Any:
        """The prompt, without the beginning of a conversation that has become too long.

        Raises:
            ValueError: the last message alone is too long.
        """
        room = self.model.config.max_position_embeddings - self.parameters["max_new_tokens"]
        first = 1 if self.system else 0
        kept = list(self.messages)
        while True:
            inputs = self.tokenizer.apply_chat_template(
                kept, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            length = inputs["input_ids"].shape[1]
            if length <= room:
                break
            if len(kept) <= first + 1:
                raise ValueError(
                    f"the message has {length} tokens, and with --max-new-tokens {self.parameters['max_new_tokens']} "
                    f"there is room for {max(room, 0)}"
                )
            # A question goes with its answer.
            del kept[first : first + 2]
        if len(kept) < len(self.messages):
            _note("the conversation is longer than the model can take; its beginning is forgotten")
            self.messages = kept
        return inputs.to(self.model.device)


def run(args: argparse.Namespace) -> int:
    device = named_device(args.device)
    parameters = generation_parameters(args)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.chat_template:
        raise ValueError(f"{args.model!r} has no chat template; `moekernels generate` continues texts with it")
    model, tokenizer = load_model(args, device, tokenizer)
    conversation = Conversation(model, tokenizer, parameters, args.system)
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command == "/reset":
            conversation.begin(conversation.system)
        elif command == "/system":
            conversation.begin(rest.strip() or None)
        elif command == "/help":
            _note(_HELP)
        elif command.startswith("/"):
            _note(f"no such command: {command} (/help lists them)")
        elif line:
            try:
                conversation.answer(line)
            except ValueError as error:
                if not sys.stdin.isatty():
                    raise
                _note(f"error: {error}")
    print_expert_stats(model)
    return 0


def _lines() -> Iterator[str]:
    """What is typed, or what comes down a pipe, line by line."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in Lines(None, "stop"))
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (lets `input` edit the line, and recall earlier ones)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return


def _note(text: str) -> None:
    print(text, file=sys.stderr)
