"""Ways to break a checkpoint. Each changes one or two files of a directory and says what it did."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Numbers that break what counts, allocates, divides or compares.
NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 7, 2**15, 2**20, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
    0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
#: Values of other kinds than those that stood there.
VALUES: tuple[Any, ...] = (
    None, True, False, "", "abc", "9", "../../../../etc/passwd", "/etc/passwd", "\ud800", [], {}, [1], [[]], {"a": 1},
    [None], ["a", 2], {"content": 3}, {"rope_type": "yarn", "factor": 1e300},
)  # fmt: skip
#: Fields that loaders of other libraries run code for, or that are methods here.
FIELDS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]},
    "trust_remote_code": True,
    "custom_generate": "evil.py",
    "quantization_config": {"load_in_4bit": True},
    "validate": 1,
    "__class__": "x",
    "to_dict": {},
    "num_labels": 2**40,
    "tokenizer_class": "EvilTokenizer",
    "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "name_or_path": 3,
    "architectures": "x",
    "dtype": "int8",
}


def _is_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file() and path.name != "evil.py")


def _any(directory: Path, rng: random.Random) -> Path:
    return rng.choice(_files(directory))


# Bytes of any file.


def flip_bits(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    data = bytearray(path.read_bytes())
    # Half of them near the beginning, where formats say what follows.
    end = min(len(data), 2048) if rng.random() < 0.5 else len(data)
    places = [rng.randrange(end) for _ in range(rng.choice((1, 1, 2, 8)))] if data else []
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits of {path.name} at {places}"


def truncate(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    data = path.read_bytes()
    length = rng.choice((0, 1, 7, 8, 9, len(data) // 2, max(len(data) - 1, 0), rng.randrange(len(data) + 1)))
    path.write_bytes(data[:length])
    return f"{path.name} cut to {length}"


def insert(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    data = path.read_bytes()
    place, new = rng.randrange(len(data) + 1), rng.randbytes(rng.choice((1, 3, 8, 64)))
    path.write_bytes(data[:place] + new + data[place:])
    return f"{len(new)} bytes into {path.name} at {place}"


def drop_bytes(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    data = path.read_bytes()
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 8, 100))
    path.write_bytes(data[:place] + data[place + length :])
    return f"{length} bytes out of {path.name} at {place}"


def overwrite(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    data = bytearray(path.read_bytes())
    place, length = rng.randrange(len(data) + 1), rng.choice((1, 8, 512))
    byte = rng.choice((0, 0x7F, 0xFF, 0x5B))
    data[place : place + length] = bytes([byte]) * len(data[place : place + length])
    path.write_bytes(data)
    return f"{length} times {byte} over {path.name} at {place}"


# Whole files.


def remove(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    path.unlink()
    return f"{path.name} removed"


def exchange(directory: Path, rng: random.Random) -> str:
    first, second = rng.sample(_files(directory), 2)
    if rng.random() < 0.7:  # of a kind, where there are two
        alike = [path for path in _files(directory) if path.suffix == first.suffix and path != first]
        second = rng.choice(alike or [second])
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} and {second.name} exchanged"


def from_another(directory: Path, rng: random.Random) -> str:
    """A file of the same name, or a new one, from the checkpoint of another model."""
    other = rng.choice([path for path in directory.parent.parent.glob("true/*") if path.is_dir()])
    path = rng.choice(_files(other))
    (directory / path.name).write_bytes(path.read_bytes())
    return f"{path.name} of {other.name}"


def become_a_folder(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def link_elsewhere(directory: Path, rng: random.Random) -> str:
    path = _any(directory, rng)
    path.unlink()
    path.symlink_to(rng.choice(("/etc/passwd", path.name, "nowhere", "/dev/null")))
    return f"{path.name} links to {path.readlink()}"


# Values in JSON files, the header of safetensors among them.


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        yield value, key
        yield from _places(entry)


def _edit(directory: Path, rng: random.Random, change: Callable[[Any, random.Random], str]) -> str:
    jsons = [path for path in _files(directory) if path.suffix in (".json", ".safetensors")]
    # Small files matter as much as large ones; config.json most of all.
    path = rng.choice([*jsons, *(p for p in jsons if p.name == "config.json")])
    data = path.read_bytes()
    rest = b""
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        data, rest = data[8 : 8 + length], data[8 + length :]
    value = json.loads(data)
    done = change(value, rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if path.suffix == ".safetensors":
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
    path.write_bytes(text + rest)
    return f"{path.name}: {done}"


def _pick(value: Any, rng: random.Random, keep: Callable[[Any], bool] = lambda entry: True) -> tuple[Any, Any] | None:
    """A place whose entry is of a kind; near the top half of the time."""
    top = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    places = [place for place in top if keep(place[0][place[1]])] if rng.random() < 0.5 else []
    places = places or [place for place in _places(value) if keep(place[0][place[1]])]
    return rng.choice(places) if places else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def set_number(directory: Path, rng: random.Random) -> str:
    def change(value: Any, rng: random.Random) -> str:
        place = _pick(value, rng, _is_number)
        if place is None:
            return "no number"
        place[0][place[1]] = rng.choice(NUMBERS)
        return f"{place[1]!r} is {place[0][place[1]]!r}"

    return _edit(directory, rng, change)


def exchange_numbers(directory: Path, rng: random.Random) -> str:
    def change(value: Any, rng: random.Random) -> str:
        a, b = _pick(value, rng, _is_number), _pick(value, rng, _is_number)
        if a is None or b is None:
            return "no numbers"
        a[0][a[1]], b[0][b[1]] = b[0][b[1]], a[0][a[1]]
        return f"{a[1]!r} and {b[1]!r} exchanged"

    return _edit(directory, rng, change)


def set_value(directory: Path, rng: random.Random) -> str:
    def change(value: Any, rng: random.Random) -> str:
        place = _pick(value, rng)
        if place is None:
            return "nothing"
        place[0][place[1]] = rng.choice(VALUES)
        return f"{place[1]!r} is {place[0][place[1]]!r}"

    return _edit(directory, rng, change)


def drop_entry(directory: Path, rng: random.Random) -> str:
    def change(value: Any, rng: random.Random) -> str:
        place = _pick(value, rng)
        if place is None:
            return "nothing"
        del place[0][place[1]]
        return f"{place[1]!r} dropped"

    return _edit(directory, rng, change)


def exchange_entries(directory: Path, rng: random.Random) -> str:
    def change(value: Any, rng: random.Random) -> str:
        place = _pick(value, rng)
        if place is None or len(place[0]) < 2:
            return "nothing"
        container = place[0]
        a, b = rng.sample(list(container) if isinstance(container, dict) else range(len(container)), 2)
        container[a], container[b] = container[b], container[a]
        return f"{a!r} and {b!r} exchanged"

    return _edit(directory, rng, change)


def rename_key(directory: Path, rng: random.Random) -> str:
    def change(value: Any, rng: random.Random) -> str:
        place = _pick(value, rng)
        if place is None or not isinstance(place[0], dict):
            return "nothing"
        new = rng.choice(("x", "", place[1] + "0", place[1][:-1], place[1].upper(), "self", "0" + place[1]))
        place[0][new] = place[0].pop(place[1])
        return f"{place[1]!r} is called {new!r}"

    return _edit(directory, rng, change)


def add_field(directory: Path, rng: random.Random) -> str:
    name = rng.choice(list(FIELDS))

    def change(value: Any, rng: random.Random) -> str:
        if isinstance(value, dict):
            value[name] = FIELDS[name]
        return f"{name!r} is {FIELDS[name]!r}"

    return _edit(directory, rng, change)


def nest_deeply(directory: Path, rng: random.Random) -> str:
    path = rng.choice([path for path in _files(directory) if path.suffix == ".json"])
    path.write_text('{"a":' * 100_000 if rng.random() < 0.5 else "[" * 100_000)
    return f"{path.name} nested"


# Weights.


def exchange_keys(directory: Path, rng: random.Random) -> str:
    """Tensors of two shards, or two tensors of a file, under each other's names."""
    paths = [path for path in _files(directory) if path.suffix == ".safetensors"]
    if not paths:
        return exchange(directory, rng)
    chosen = rng.sample(paths, 2) if len(paths) > 1 else [paths[0]]
    parts = []
    for path in chosen:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        parts.append((path, json.loads(data[8 : 8 + length]), data[8 + length :]))
    a, b = parts[0][1], parts[-1][1]
    first = rng.choice([name for name in a if name != "__metadata__"])
    second = rng.choice([name for name in b if name != "__metadata__"])
    if a is b:
        a[first], a[second] = a[second], a[first]
    else:
        a[second], b[first] = a.pop(first), b.pop(second)
    for path, header, rest in parts:
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    return f"{first} and {second} exchanged in {', '.join(path.name for path, *_ in parts)}"


class Evil:
    """Runs a command when it is read by a pickle loader that obeys."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.marker}",)


def evil_pickle(directory: Path, rng: random.Random) -> str:
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    path = directory / "pytorch_model.bin"
    content = {"model.embed_tokens.weight": Evil(directory / "EXECUTED")}
    if rng.random() < 0.5:
        import torch

        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=rng.choice((2, 4))))
    return "a pickle that runs a command"


MUTATIONS: dict[str, Callable[[Path, random.Random], str]] = {
    mutation.__name__: mutation
    for mutation in (
        flip_bits, truncate, insert, drop_bytes, overwrite, remove, exchange, from_another, become_a_folder,
        link_elsewhere, set_number, exchange_numbers, set_value, drop_entry, exchange_entries, rename_key, add_field,
        nest_deeply, exchange_keys, evil_pickle,
    )
}  # fmt: skip
#: How often each is tried; the rarer ones have little to vary.
RARE = ("become_a_folder", "link_elsewhere", "nest_deeply", "evil_pickle", "remove", "add_field")


def mutate(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Break a checkpoint in a random way; the name of the mutation, and what it did."""
    (directory / "evil.py").write_text('import pathlib; pathlib.Path(__file__).with_name("EXECUTED").touch()\n')
    names = list(MUTATIONS)
    name = rng.choices(names, [1 if name in RARE else 4 for name in names])[0]
    return name, MUTATIONS[name](directory, rng)
