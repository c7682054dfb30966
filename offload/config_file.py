"""Configuration files as they are read: TOML, JSON or YAML text to plain values, and the changes of ``--set``; nothing
is checked here.

A file that cannot be read ends in one line, whatever it is: a folder, a pipe, a device, text of another encoding, or
values nested or repeated without end.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml

from pagemem.folders.small_file import parse_json, read_small
from pagemem.units import KiB

#: A configuration is written by hand: what is larger is something else.
MOST_BYTES: Final = 64 * KiB
MOST_VALUES: Final = 10_000
_LONG_KEY: Final = re.compile(r"(?:[\w-]+[ \t]*\.[ \t]*){50}")


class ConfigError(ValueError):
    """A configuration that cannot be used. One line for each thing that is wrong."""


class _YamlLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader; a key that is there twice is refused, which YAML does and PyYAML does not."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping's values by their keys."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise ValueError(f"key {twice[:80]!r} is there twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def _toml(text: str) -> Any:
    if _LONG_KEY.search(text):  # the time that tomllib takes for one grows with the square of its length
        raise ValueError("a key has more than 50 parts")
    return tomllib.loads(text)


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    ".toml": _toml,
    ".json": parse_json,
    ".yaml": partial(yaml.load, Loader=_YamlLoader),
    ".yml": partial(yaml.load, Loader=_YamlLoader),
}


def read_config_file(path: Path) -> dict[str, Any]:
    """What a configuration file holds, unchecked.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    read = _READERS.get(path.suffix)
    if read is None:
        raise ConfigError(f"{path}: unknown kind of file {path.suffix!r}; use .toml, .json, .yaml or .yml")
    try:
        loaded = read(read_small(path, MOST_BYTES, follow=True).decode("utf-8"))
        _check_size(loaded)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: values are nested too deep") from error
    except (
        ValueError,
        yaml.YAMLError,
    ) as error:  # also text that is not UTF-8, dates that are none, numbers without end
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds a {type(loaded).__name__}, not a mapping of sections")
    return loaded


def _check_size(loaded: object) -> None:
    """Raise ValueError for more values than anybody writes, counted as they would be written out: YAML repeats them by
    name."""
    found, left = 0, [loaded]
    while left:
        value = left.pop()
        found += 1
        if found > MOST_VALUES:
            raise ValueError(f"holds more than {MOST_VALUES:,} values, which no configuration does")
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value


def apply_changes(raw: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """``raw`` with each ``section.key=value`` put in; a value is JSON where it is valid JSON, text otherwise.

    Raises:
        ConfigError: a change has no ``=``, or goes through a value that is not a section.
    """
    changed: dict[str, Any] = copy.deepcopy(raw)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: write section.key=value, the value as JSON or else plain text")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        *sections, key = name.split(".")
        target: Any = changed
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {change}: {section!r} is not a section")
        target[key] = value
    return changed
