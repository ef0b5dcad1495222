"""From a list of messages to the prompt a chat model was trained on."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    try:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install jinja2") from error

    class GenerationBlock(Extension):
        """Renders what stands between `{% generation %}` and `{% endgeneration %}`, which mark the model's words."""

        tags = {"generation"}  # noqa: RUF012 (the base class says how it is declared)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(template)


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Renders a chat template (Jinja, sandboxed) with the names that published templates use.

    Args:
        template: the template's source.
        messages: dictionaries with `role` and `content`.
        **variables: such as `add_generation_prompt`, `bos_token`, `tools`.

    Raises:
        ImportError: jinja2 is not installed.
    """
    return _compiled(template).render(messages=messages, **variables)
