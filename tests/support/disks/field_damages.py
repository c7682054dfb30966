"""Every field of a JSON file with a value that it must not have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from damages import Damage

MISSING = object()
TWICE = object()
INTS = (-1, 10**30, True, 1.5, "7", None, [], MISSING)
FLOATS = ("x", None, True, [], MISSING)
TEXTS = (7, None, [], "two\nlines", "x" * 100_000, MISSING)
LISTS = (None, {}, "x", 3, MISSING)
DICTS = (None, [], "x", 3, {"surplus": 1}, MISSING)


def values_for(value: Any) -> tuple[Any, ...]:
    """What to put in a value's place."""
    if isinstance(value, bool):
        return (1, "true", None, MISSING)
    for kinds, wrong in ((int, INTS), (float, FLOATS), (str, TEXTS), (list, LISTS), (dict, DICTS)):
        if isinstance(value, kinds):
            return wrong
    return (3.5, [], {}, MISSING)


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every field of a JSON value with its path; of lists and of objects with names for keys, the first entry only."""
    yield path, value
    if isinstance(value, dict):
        named = path[-1:] in (("parameters",), ("update_steps",), ("names",))
        unread = path[-1:] == ("given",) or path[:2] == ("state", "config")  # but for the paths
        for key in list(value)[:1] if named else {"ssd", "paths"} & set(value) if unread else value:
            yield from fields(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*path, 0))


def changed(root: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at ``path``."""
    made = json.loads(json.dumps(root))
    target = made
    for key in path[:-1]:
        target = target[key]
    if value is MISSING:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return made


def field_damages(
    root: Any, write: Callable[[Path, bytes], None], file: str, under: tuple[Any, ...] = ()
) -> Iterator[Damage]:
    """Each field with each wrong value; a surplus key in each object, and a key twice."""
    for path, value in fields(root):
        if not path or path[: len(under)] != under:
            continue
        for wrong in values_for(value):
            body = json.dumps(changed(root, path, wrong)).encode()
            what = "missing" if wrong is MISSING else repr(wrong)[:30]
            yield Damage(file, f"{'.'.join(map(str, path))} is {what}", lambda folder, body=body: write(folder, body))
        if isinstance(value, dict):
            body = json.dumps(changed(root, (*path, "surplus"), 1)).encode()
            yield Damage(
                file, f"{'.'.join(map(str, path))} has a key more", lambda folder, body=body: write(folder, body)
            )
    text = json.dumps(root).encode()
    key, first = next(iter(root.items()))
    for what, body in {
        "a key twice": text[:-1] + f", {json.dumps(key)}: {json.dumps(first)}}}".encode(),
        "NaN": text[:-1] + b', "x": NaN}',
        "Infinity": text[:-1] + b', "x": -Infinity}',
        "1e999": text[:-1] + b', "x": 1e999}',
        "deep lists": b"[" * 100_000,
        "deep objects": b'{"a":' * 100_000,
        "closed deep lists": b"[" * 5000 + b"]" * 5000,
        "empty": b"",
        "null": b"null",
        "text": b'"x"',
        "list": b"[]",
        "object": b"{}",
        "not UTF-8": b"\xff\xfe{}",
        "zeros": bytes(5000),
        "512 KiB of brackets": b"[" + b"[]," * 170_000 + b"0]",
    }.items():
        yield Damage(file, what, lambda folder, body=body: write(folder, body))
