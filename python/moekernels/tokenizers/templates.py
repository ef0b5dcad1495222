"""Chat templates: Jinja that comes with a checkpoint, and so is run in a sandbox."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

# Characters or items that a template may make by multiplication.
_LONGEST_REPETITION = 100_000
# Variables around the model's words, and what they hold where those are looked for: what occurs in no text.
_MARKS = {"_generation_begins": "\x00[\x00", "_generation_ends": "\x00]\x00"}


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    try:
        from jinja2 import nodes
        from jinja2.exceptions import SecurityError, TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install 'moekernels[chat]'") from error

    class Sandbox(ImmutableSandboxedEnvironment):
        """Gives a template the messages and nothing of Python; what it reaches for beyond them is an error at once."""

        intercepted_binops = frozenset(("*", "**"))

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            # A few characters of template must not fill the memory.
            sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
            if operator == "**" or (sizes != [left, right] and sizes[0] * sizes[1] > _LONGEST_REPETITION):
                raise SecurityError(f"{type(left).__name__} {operator} {type(right).__name__} is unsafe")
            return super().call_binop(context, operator, left, right)

    class GenerationBlock(Extension):
        """Renders the model's words, which stand between `{% generation %}` and `{% endgeneration %}`.

        What the variables of these names hold comes before and after them; as a rule that is nothing.
        """

        tags = {"generation"}  # noqa: RUF012 (the base class says how it is declared)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.Name(name, "load")]).set_lineno(line) for name in _MARKS)
            return [begin, nodes.Scope(body).set_lineno(line), end]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"the chat template is not valid Jinja{f', line {line}' if line else ''}: {error}") from error


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Renders a chat template with the names that published templates use.

    Args:
        template: the template's source.
        messages: dictionaries with `role` and `content`.
        **variables: such as `add_generation_prompt`, `bos_token`, `tools`.

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: the template is not valid, refuses the messages, or does what the sandbox forbids.
    """
    compiled = _compiled(template)
    try:
        return compiled.render(messages=messages, **variables)
    except Exception as error:  # a template can raise whatever an expression in Python can
        raise ValueError(f"the chat template failed: {error or type(error).__name__}") from error


def render_with_spans(
    template: str, messages: list[dict[str, Any]], **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """:func:`render`, and where in the text the model's words are: first and one past the last character of each."""
    marked = render(template, messages, **variables, **_MARKS)
    begin, end = _MARKS.values()
    text, *parts = marked.split(begin)
    spans = []
    for part in parts:
        words, _, rest = part.partition(end)
        if words:
            spans.append((len(text), len(text) + len(words)))
        text += words + rest
    return text, spans


def continued(text: str, message: dict[str, Any]) -> str:
    """A rendered chat up to the end of its last message, without what closes that.

    Raises:
        ValueError: the message has no text, or the template changed it.
    """
    content = message["content"]
    if not isinstance(content, str):
        blocks = [block["text"] for block in content if "text" in block]
        if not blocks:
            raise ValueError("continue_final_message: the last message has no text to continue")
        content = blocks[-1]
    start = text.rfind(content.strip())
    if start < 0:
        raise ValueError(
            "continue_final_message: the chat template does not show the last message as it is, so that its end "
            "cannot be found"
        )
    # A template may keep the white space after a message, or not.
    kept = content.lstrip()
    return text[: start + len(kept if text.startswith(kept, start) and kept == content else content.strip())]
