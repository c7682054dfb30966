"""What is wrong with a configuration, in one line each: pydantic's errors in the words of a user."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError

#: Lines of an error at the most.
_MOST_LINES: Final = 20


def described_errors(error: ValidationError, root: type[BaseModel], path: Sequence[str] = ()) -> list[str]:
    """A line for each thing that is wrong, misspelt names first. A key that is missing because its name is misspelt is
    not wrong twice.

    Args:
        path: the section of ``root`` that was validated.
    """
    entries: list[Any] = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    lines: dict[str, None] = {}
    for entry in entries:
        line = _described([*path, *map(str, entry["loc"])], entry, root)
        meant = f"did you mean {line.removesuffix(' is missing')!r}?"
        if entry["type"] != "missing" or not any(found.endswith(meant) for found in lines):
            lines[line] = None
    more = len(lines) - _MOST_LINES
    return list(lines) if more <= 0 else [*list(lines)[:_MOST_LINES], f"and {more} things more"]


def _described(parts: list[str], entry: Any, root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors."""
    where, kind = ".".join(parts), entry["type"]
    if kind == "extra_forbidden":
        return _unknown_key(parts, root)
    if kind == "missing" and isinstance(entry["loc"][-1], int):
        return f"{'.'.join(parts[:-1])} is too short: {reprlib.repr(entry['input'])}"
    if kind == "too_short" and not entry["input"]:
        return f"{where} is empty; name at least one"
    if kind == "string_pattern_mismatch":  # of factories, which alone have one
        return f"{where}: {reprlib.repr(entry['input'])} is not written as module:callable"
    if kind == "missing":
        return f"{where} is missing"
    if kind in ("model_type", "model_attributes_type"):
        return f"{where} must be a section with keys of its own, not {reprlib.repr(entry['input'])}"
    if kind == "value_error":
        message = entry["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    return f"{where}: {entry['msg']}, not {reprlib.repr(entry['input'])}"


def _unknown_key(parts: list[str], root: type[BaseModel]) -> str:
    """What is wrong with a key that nothing knows: the nearest key of its section, or else the section it belongs
    to."""
    *path, key = parts
    section: Any = root
    for name in path:
        section = _section_type(section, name)
    known = sorted(section.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    elsewhere = [f"{name}.{key}" for name, type_ in sections(root).items() if key in type_.model_fields]
    if near:
        hint = f"did you mean {'.'.join([*path, near[0]])!r}?"
    elif elsewhere:
        hint = f"did you mean {' or '.join(map(repr, elsewhere))}?"
    else:
        hint = f"known keys: {', '.join(known)}"
    return f"unknown key {'.'.join(parts)!r}; {hint}"


def sections(root: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every section of the configuration by its name."""
    found = {name: _section_type(root, name) for name in root.model_fields}
    return {name: type_ for name, type_ in found.items() if type_ is not None}


def _section_type(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a key that holds a section, or None for a plain value."""
    annotation = section.model_fields[name].annotation
    choices = [annotation, *getattr(annotation, "__args__", ())]
    return next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)
