"""Continuing texts and chats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from moekernels.models import AutoModelForCausalLM
from moekernels.pipelines.generation import GenerationPipeline

FULL_TEXT, NEW_TEXT, TENSORS = "full_text", "new_text", "tensors"
_HOLE = "hole"


@dataclass
class _Options:
    returns: str
    clean_up_tokenization_spaces: bool = True
    skip_special_tokens: bool = True
    continue_final_message: bool | None = None
    prefix: str = ""
    handle_long_generation: str | None = None
    encoding: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)


class TextGenerationPipeline(GenerationPipeline):
    """Continues a text, or the chat that a list of messages is.

    Parameters of a call, besides those of `generate`, which are `max_new_tokens=256, do_sample=True, temperature=0.7`
    unless said otherwise:

    * `return_full_text` (True): the results begin with the prompt, or with the messages of the chat.
    * `return_tensors`: results hold ids, not text.
    * `clean_up_tokenization_spaces` (True), `skip_special_tokens` (True): as for decoding.
    * `add_special_tokens`, `truncation`, `tokenizer_encode_kwargs`: as for calling the tokenizer.
    * `continue_final_message`: go on with the last message; the default does so if it is the assistant's.
    * `prefix`: text before every prompt, which results do not show.
    * `handle_long_generation="hole"`: leave out the beginning of prompts that would leave no room.
    * `stop_sequence`: text that ends the generation.

    A text gives a list with a dictionary per sequence, `[{"generated_text": ...}]`; its value is a list of messages for
    a chat. Several inputs give a list of such lists.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    default_task: ClassVar[str] = "text-generation"
    default_generation: ClassVar[dict[str, Any]] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
    encoder_decoder: ClassVar[bool] = False
    padding_side: ClassVar[str] = "left"

    def _is_single(self, inputs: Any) -> bool:
        return isinstance(inputs, str) or _is_chat(inputs)

    def _options(self, parameters: dict[str, Any]) -> _Options:
        given = dict(parameters)
        full_text, text = given.pop("return_full_text", None), given.pop("return_text", None)
        tensors = given.pop("return_tensors", None)
        if tensors and (full_text is not None or text):
            raise ValueError("text-generation: results are ids with return_tensors; return_full_text cannot apply")
        if full_text is not None and text is not None:
            raise ValueError("text-generation: pass return_full_text or return_text, not both")
        returns = TENSORS if tensors else NEW_TEXT if full_text is False else FULL_TEXT
        encoding: dict[str, Any] = {name: given.pop(name, None) for name in ("add_special_tokens", "truncation")}
        given.pop("padding", None)  # batches are always padded, and on the left
        if encoding.get("truncation") and given.get("max_length") is not None:
            encoding["max_length"] = given["max_length"]
        encoding = {name: value for name, value in encoding.items() if value is not None}
        encoding.update(given.pop("tokenizer_encode_kwargs", None) or {})
        if given.get("handle_long_generation") not in (None, _HOLE):
            raise ValueError(f"handle_long_generation must be None or 'hole', got {given['handle_long_generation']!r}")
        stop = given.pop("stop_sequence", None)
        if stop is not None:
            given["stop_strings"] = stop
        own = ("clean_up_tokenization_spaces", "skip_special_tokens", "continue_final_message", "prefix")
        taken = {name: given.pop(name) for name in (*own, "handle_long_generation") if name in given}
        taken = {"prefix": self.prefix, **{name: value for name, value in taken.items() if value is not None}}
        return _Options(returns=returns, encoding=encoding, generation=given, **taken)

    def _encode(self, item: Any, options: _Options) -> dict[str, list[int]]:
        if isinstance(item, str):
            inputs = self.tokenizer(options.prefix + item, **options.encoding)
        elif _is_chat(item):
            inputs = self._encode_chat(item, options)
        else:
            raise TypeError(f"text-generation: a prompt must be text or a list of messages, got {type(item).__name__}")
        ids = list(inputs["input_ids"]) or self._beginning()
        if options.handle_long_generation == _HOLE:
            ids = ids[-self._room(len(ids), options) :]
        # A prompt has no padding, whatever the mask's beginning was.
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def _encode_chat(self, messages: list[dict[str, Any]], options: _Options) -> Any:
        for message in messages:
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise ValueError(f"text-generation: every message of a chat needs a role and content, got {message!r}")
        goes_on = _goes_on(messages, options)
        encoding = {name: value for name, value in options.encoding.items() if name != "add_special_tokens"}
        return self.tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            return_dict=True,
            **encoding,
        )

    def _beginning(self) -> list[int]:
        """What stands for an empty prompt."""
        begin = self.generation_config.bos_token_id
        if begin is None:
            raise ValueError("text-generation: the prompt is empty, and the model has no bos_token_id to begin with")
        return [begin]

    def _room(self, length: int, options: _Options) -> int:
        """How many tokens of a prompt of `length` may stay."""
        new = options.generation.get("max_new_tokens")
        if new is None and options.generation.get("max_length") is not None:
            new = options.generation["max_length"] - length
        if new is None:
            new = self.generation_config.max_new_tokens or self.generation_config.max_length - length
        room = self.tokenizer.model_max_length - max(new, 0)
        if room <= 0:
            raise ValueError(
                f"text-generation: {new} new tokens leave no room for a prompt within the "
                f"{self.tokenizer.model_max_length} that the model can take"
            )
        return room

    def _decode(self, item: Any, encoded: dict[str, list[int]], output: Tensor, options: _Options) -> Any:
        return [self._record(item, encoded["input_ids"], ids, options) for ids in output.tolist()]

    def _record(self, item: Any, prompt: list[int], ids: list[int], options: _Options) -> dict[str, Any]:
        if options.returns == TENSORS:
            return {"generated_token_ids": ids}
        # Not the text of the new tokens alone: the first of them may lose its space there.
        new = self._text(ids, options)[len(self._text(prompt, options)) :]
        if options.returns == NEW_TEXT:
            return {"generated_text": new}
        if isinstance(item, str):
            return {"generated_text": item + new}
        messages = list(item)
        if _goes_on(messages, options):
            last = messages.pop()
            return {"generated_text": [*messages, {"role": last["role"], "content": last["content"] + new}]}
        return {"generated_text": [*messages, {"role": "assistant", "content": new}]}

    def _text(self, ids: list[int], options: _Options) -> str:
        return self.tokenizer.decode(
            ids,
            skip_special_tokens=options.skip_special_tokens,
            clean_up_tokenization_spaces=options.clean_up_tokenization_spaces,
        )


def _is_chat(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple)) and bool(inputs) and isinstance(inputs[0], dict)


def _goes_on(messages: list[dict[str, Any]], options: _Options) -> bool:
    """Whether the model is to continue the last message."""
    if options.continue_final_message is None:
        return messages[-1]["role"] == "assistant"
    return options.continue_final_message
