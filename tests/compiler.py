"""Compiles C++ for the tests by g++.

Results are kept in a cache folder under the hash of everything that went into them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path


class BuildError(RuntimeError):
    """A source does not compile; the message is the compiler's."""


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")


class Compiler:
    """Compiles into ``cache_dir``; safe to use from several processes at once."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        cache_dir.mkdir(parents=True, exist_ok=True)

    def compile(self, source: Path, flags: Sequence[str]) -> Path:
        """The object of a source.

        Raises:
            BuildError: it does not compile.
        """
        key = hashlib.sha256("\0".join([str(source), *flags]).encode()).hexdigest()[:16]
        with self._alone(key):
            return self._compiled(source, flags, key)

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Of two processes that need the same, one compiles it and the other waits."""
        with (self._cache_dir / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _compiled(self, source: Path, flags: Sequence[str], key: str) -> Path:
        manifest = self._cache_dir / f"{source.stem}-{key}.json"
        if manifest.exists():
            known = json.loads(manifest.read_text())
            found = self._cache_dir / known["object"]
            inputs: dict[str, str] = known["inputs"]
            if found.exists() and all(Path(p).exists() and _digest(Path(p)) == d for p, d in inputs.items()):
                return found
        with tempfile.TemporaryDirectory(dir=self._cache_dir) as scratch:
            built = Path(scratch) / "out.o"
            depends = Path(scratch) / "out.d"
            _run(["g++", *flags, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(built)])
            names = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split()
            inputs = {name: _digest(Path(name)) for name in names}
            content = hashlib.sha256(json.dumps([key, sorted(inputs.items())]).encode()).hexdigest()[:16]
            target = self._cache_dir / f"{source.stem}-{content}.o"
            os.replace(built, target)
            record = Path(scratch) / "manifest.json"
            record.write_text(json.dumps({"object": target.name, "inputs": inputs}))
            os.replace(record, manifest)
        return target

    def link(self, name: str, objects: Sequence[Path], flags: Sequence[str] = ()) -> Path:
        """A shared library of objects."""
        key = hashlib.sha256("\0".join([*(o.name for o in objects), *flags]).encode()).hexdigest()[:16]
        target = self._cache_dir / f"{name}-{key}.so"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=self._cache_dir) as scratch:
                built = Path(scratch) / "out.so"
                _run(["g++", "-shared", "-o", str(built), *map(str, objects), *flags])
                os.replace(built, target)
        return target
