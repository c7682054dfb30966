"""Reads the small files of a run whole: regular files of a limited size, and JSON without surprises in them.

Whoever can write to a folder can put anything in the place of a file. A FIFO, a device, a link or a file of any size
costs neither a hang nor memory; text costs at most some dozens of times its bytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pagemem.folders.own_file import kind_in_words

#: A whole number that counts something: never negative, and far from what 64 bits cannot hold.
Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
#: One line of text: a name, a date.
Line = Annotated[str, Field(strict=True, max_length=1000, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
Flag = Annotated[bool, Field(strict=True)]


class Record(BaseModel):
    """An object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


#: What `open_regular` answers of a link, a socket, a folder, a FIFO or device, and a file that is too large. That can
#: be said for good, whereas other answers may be others the next time.
NO_FILE: Final = frozenset({errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EINVAL, errno.EFBIG})
#: How deeply lists and objects may lie in each other.
MAX_DEPTH: Final = 100


def open_regular(path: Path, max_bytes: int, *, follow: bool = False) -> tuple[int, int]:
    """Open a regular file for reading; returns the descriptor, which is the caller's to close, and the file's size in
    bytes.

    Args:
        follow: a link may be in its place; only for paths that the user names.

    Raises:
        OSError: it cannot be opened, is not a regular file, or has more than ``max_bytes``; ``strerror`` says which.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not followed", str(path)) from error
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is a socket or a device, not a regular file", str(path)) from error
        raise
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind_in_words(found)}, not a regular file", str(path))
        if found.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes; at most {max_bytes} are read", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd, found.st_size


def read_small(path: Path, max_bytes: int, *, follow: bool = False) -> bytes:
    """The content of a regular file; see `open_regular`."""
    fd, n_bytes = open_regular(path, max_bytes, follow=follow)
    try:
        parts, left = [], n_bytes
        while left and (part := os.read(fd, left)):  # not beyond the size it had: somebody may be appending
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def parse_json(content: bytes | str) -> Any:
    """The value that JSON text stands for.

    Raises:
        ValueError: (one line) it is no JSON, or has a key twice in an object, NaN or Infinity, or more than `MAX_DEPTH`
            levels.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content  # UTF-8, and no other guess
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_float)
        if _deeper(found, MAX_DEPTH):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"its lists and objects lie more than {MAX_DEPTH} deep in each other") from None
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in made if keys.count(key) > 1)[:80]!r} is there twice")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _float(text: str) -> float:
    found = float(text)
    if math.isinf(found):
        raise ValueError(f"{text[:40]} is beyond the largest number")
    return found


def _deeper(value: Any, levels: int) -> bool:
    """Whether containers lie more than ``levels`` deep in each other."""
    level = [value] if isinstance(value, (dict, list)) else []
    while level and levels:
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        levels -= 1
    return bool(level)


_T = TypeVar("_T")


def checked(adapter: TypeAdapter[_T], value: Any) -> _T:
    """``value`` as what ``adapter`` is for, every field looked at.

    Raises:
        ValueError: (one line) names the first field that is missing, unknown, of another type or out of its range.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None


def first_fault(error: ValidationError) -> str:
    """The first thing that pydantic found, in one line: field, what it must be, and the value."""
    [first, *more] = error.errors(include_url=False)
    where = ".".join(str(part)[:200] for part in first["loc"]) or "the whole"
    found = (
        "" if first["type"] in ("missing", "unexpected_keyword_argument") else f", not {reprlib.repr(first['input'])}"
    )
    others = f" (and {len(more)} more)" if more else ""
    text = f"{where}: {first['msg'].removeprefix('Value error, ')}{found}{others}".replace("\n", " ")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
