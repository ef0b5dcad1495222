"""The documentation runs: its Python from top to bottom, its commands through the parser.

A page's ``python`` blocks share their names. A ``text`` block right behind one is what it prints. A block that needs a
package that the test-suite does not install says so before it: ``<!-- needs: transformers>=5 -->``.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from packaging.requirements import Requirement

from moekernels import ops
from moekernels.cli.main import build_parser
from tests.pipelines.checkpoints import m2m100, olmoe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]

OLMOE = "path/to/OLMoE-1B-7B-0924"


def given(page: Path) -> dict[str, Any]:
    """What the README leaves to its reader."""
    return {"model": transformers.OlmoeForCausalLM.from_pretrained(OLMOE)} if page == ROOT / "README.md" else {}


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: what stands behind the fence; "" if nothing.
        line: of its first line, from 1.
        needs: requirements in the comment before it.
    """

    language: str
    line: int
    text: str
    needs: list[str]


def blocks_of(text: str) -> list[Block]:
    blocks = []
    lines: list[str] = []
    language, start, needs = None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if language is not None and line == "```":
            blocks.append(Block(language, start, "".join(f"{each}\n" for each in lines), needs))
            language, lines, needs = None, [], []
        elif language is not None:
            lines.append(line)
        elif line.startswith("```"):
            language, start = line[3:], number + 1
        elif match := re.fullmatch(r"<!-- needs: (.+) -->", line):
            needs = match[1].split()
        elif line:
            needs = []
    assert language is None, f"the block from line {start} has no end"
    return blocks


def is_installed(requirement: str) -> bool:
    wanted = Requirement(requirement)
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def programs_of(page: Path) -> Iterator[tuple[Block, str | None]]:
    """The Python of a page, each block with what it is said to print."""
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    outputs = {block.line: block.text for block in blocks if block.language == "text"}
    for block in blocks:
        if block.language == "python":
            fence = block.line + block.text.count("\n")
            yield block, outputs.get(fence + 3)  # an empty line lies between the two


def commands_of(text: str) -> Iterator[list[str]]:
    """The commands of shell lines, without what comes from files and goes to files."""
    for line in text.splitlines():
        words = list(shlex.shlex(line, posix=True, punctuation_chars=True))
        for is_operator, command in itertools.groupby(words, lambda word: word in ("|", "&&")):
            if not is_operator:
                yield list(itertools.takewhile(lambda word: word not in ("<", ">"), command))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small checkpoints at the paths of the documentation."""
    folder = tmp_path_factory.mktemp("docs")
    writers = {
        OLMOE: olmoe,
        "path/to/m2m100_418M": m2m100,
        "allenai/OLMoE-1B-7B-0924": olmoe,
        "microsoft/Phi-3.5-MoE-instruct": olmoe,  # any decoder with a chat template
    }
    for name, write in writers.items():
        (folder / name).mkdir(parents=True)
        write(folder / name)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if any(programs_of(page))], ids=name_of)
def test_python_of_a_page(page: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoints)
    names: dict[str, Any] = {"__name__": page.stem, **given(page)}
    for block, expected in programs_of(page):
        if not all(map(is_installed, block.needs)):
            continue
        # Lines are those of the page, in a traceback too.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if expected is not None:
            assert printed.getvalue() == expected, f"{name_of(page)}, line {block.line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page(page: Path) -> None:
    """Every `moekernels` command is one that the parser takes."""
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language not in ("", "sh"):
            continue
        for program, *arguments in commands_of(block.text):
            if program == "moekernels":
                assert build_parser().parse_args(arguments).run


def test_a_command_has_a_section() -> None:
    sections = re.findall(r"^## (\S+)$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    (commands,) = (action.choices for action in build_parser()._actions if action.choices)
    assert sorted(sections) == sorted(commands)


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_a_page(name: str) -> None:
    """A page per op, with its signature, and every argument in its text."""
    page = (ROOT / "docs" / "ops" / f"{name}.md").read_text(encoding="utf-8")
    signature = " ".join(page.split("`", 2)[1].split())
    expected = []
    for parameter in inspect.signature(getattr(ops, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in expected:
            expected.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace("'", '"')
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        expected.append(stars + parameter.name + default)
        assert f"| `{parameter.name}` |" in page, parameter.name
    assert signature == f"ops.{name}({', '.join(expected)})"
    assert "## Gradient" in page and "## Cost" in page and "## Errors" in page


def test_the_table_of_contents_is_complete() -> None:
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert sorted(listed) == sorted(pages)


def test_the_extractor() -> None:
    """What is not found is not tested."""
    text = "```python\na = 1\n\n```\n\n<!-- needs: torch>=1 -->\n```python\nb\n```\n```text\n2\n```\n```\nplain\n```\n"
    assert blocks_of(text) == [
        Block("python", 2, "a = 1\n\n", []),
        Block("python", 8, "b\n", ["torch>=1"]),
        Block("text", 11, "2\n", []),
        Block("", 14, "plain\n", []),
    ]
    assert list(commands_of("a 'b  c' && d --e f/g.h-1 < i | j > k\n\nl")) == [
        ["a", "b  c"],
        ["d", "--e", "f/g.h-1"],
        ["j"],
        ["l"],
    ]
    assert is_installed("torch>=2") and not is_installed("torch>=99") and not is_installed("no-such-package")
