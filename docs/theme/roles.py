"""Docstrings name things as editors and help() show them best, :func:`name`; on a page the role is left out."""

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):\s*<code>~?")


def on_page_content(html: str, **_: Any) -> str:
    return _ROLE.sub("<code>", html)
