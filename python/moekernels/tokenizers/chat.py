"""From a list of messages to the prompt a chat model was trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moekernels.tokenizers import templates
from moekernels.tokenizers.encoding import BatchEncoding

#: The templates that apply where no name is given: without tools, and with them.
_DEFAULT, _TOOL_USE = "default", "tool_use"


class ChatTemplates:
    """Gives a tokenizer `apply_chat_template`. It has one template as `chat_template`, or several by name."""

    chat_template: str | dict[str, str] | None
    special_tokens_map: Any
    __call__: Callable[..., BatchEncoding]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Formats messages, or a batch of conversations, the way a chat model expects them.

        Args:
            conversation: dictionaries with `role` and `content`.
            tools: JSON schemas of functions that the model may call.
            documents: texts that the model may refer to, as dictionaries.
            chat_template: source, or name, instead of the tokenizer's default.
            add_generation_prompt: end with the beginning of the model's answer.
            continue_final_message: end with the last message, for the model to go on with it.
            tokenize: return ids (a `BatchEncoding` with `return_dict`), not text.
            padding, truncation, max_length, return_tensors: as for calling the tokenizer.
            return_assistant_tokens_mask: with `return_dict`, also return `assistant_masks`: 1 for the tokens that the
                template marks as the model's words by `{% generation %}`. Needs a fast tokenizer.
            tokenizer_kwargs: further keywords for calling the tokenizer.
            **kwargs: further variables of the template.

        Raises:
            ValueError: there is no chat template, or no such messages in it, or the arguments exclude each other.
            TypeError: a tool or a document is no dictionary.
            ImportError: jinja2 is not installed.
        """
        if return_assistant_tokens_mask and (continue_final_message or not (tokenize and return_dict)):
            raise ValueError(
                "apply_chat_template: return_assistant_tokens_mask needs tokenize and return_dict, and no "
                "continue_final_message"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "apply_chat_template: add_generation_prompt begins a new message and continue_final_message goes on "
                "with the last one; pass one of them"
            )
        for name, listed in (("tools", tools), ("documents", documents)):
            for item in listed or []:
                if not isinstance(item, dict):
                    raise TypeError(f"apply_chat_template: {name} must be dictionaries, got {type(item).__name__}")
        source = self.get_chat_template(chat_template, tools)
        if not conversation:
            raise ValueError("apply_chat_template: there are no messages")
        batched = isinstance(conversation[0], (list, tuple))
        conversations: list[Any] = list(conversation) if batched else [conversation]
        variables: dict[str, Any] = {
            **{**self.special_tokens_map, **kwargs},
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        texts, spans = [], []
        for messages in conversations:
            if return_assistant_tokens_mask:
                text, found = templates.render_with_spans(source, messages, **variables)
                spans.append(found)
            else:
                text = templates.render(source, messages, **variables)
            texts.append(templates.continued(text, messages[-1]) if continue_final_message else text)
        if not tokenize:
            return texts if batched else texts[0]
        encoding = self(
            texts if batched else texts[0],
            add_special_tokens=False,  # the template has them
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        if return_assistant_tokens_mask:
            masks = [_mask(encoding, row, found) for row, found in enumerate(spans)]
            encoding["assistant_masks"] = masks if batched or return_tensors else masks[0]
            encoding.convert_to_tensors(return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: list[dict[str, Any]] | None = None) -> str:
        """The template's source: the one given, the one of that name, or the default, which may differ with tools."""
        if isinstance(self.chat_template, dict):
            if chat_template is not None:
                return self.chat_template.get(chat_template, chat_template)
            for name in (_TOOL_USE, _DEFAULT) if tools is not None else (_DEFAULT,):
                if name in self.chat_template:
                    return self.chat_template[name]
            raise ValueError(f"no default chat template; pass one of {', '.join(sorted(self.chat_template))}")
        source = chat_template or self.chat_template
        if not source:
            raise ValueError("the tokenizer has no chat_template; set it, or pass one")
        return source


def _mask(encoding: BatchEncoding, row: int, spans: list[tuple[int, int]]) -> list[int]:
    """1 for the tokens of a row that cover a character of one of the spans of its text, and those between; else 0."""
    # Not by `char_to_token`: it knows the first token of a character alone, and none of what was truncated or dropped.
    offsets = encoding[row].offsets
    mask = [0] * len(offsets)
    for begin, end in spans:
        # A token of white space alone may have no more than the place where that ends.
        covering = [
            i for i, (first, past) in enumerate(offsets) if past > begin and (first < end or first == past == end)
        ]
        if covering:
            mask[covering[0] : covering[-1] + 1] = [1] * (covering[-1] + 1 - covering[0])
    return mask
