"""Reading a configuration: from a mapping, or from a file with the changes of ``--set``, checked whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from offload.config import Config, OptimizerConfig
from offload.config_errors import described_errors
from offload.config_file import ConfigError, apply_changes, read_config_file

_AnySection = TypeVar("_AnySection", bound=BaseModel)

#: What the calls of the engine take: a configuration, its content, or the path of its file.
ConfigLike = Config | Mapping[str, Any] | str | Path


def load_config(source: ConfigLike, where: str = "configuration") -> Config:
    """The configuration in a mapping or a file, checked.

    Args:
        where: what errors call a mapping.

    Raises:
        ConfigError: it cannot be read, has unknown keys, or values that do not fit; one line for each.
    """
    if isinstance(source, Config):
        return source
    if not isinstance(source, (Mapping, str, Path)):
        raise ConfigError(
            f"the configuration is a {type(source).__name__}; give a mapping of sections, the name of a file, or a "
            "Config"
        )
    if not isinstance(source, Mapping):
        source, where = read_config_file(Path(source)), str(source)
    return _checked(Config, source, where)


def load_config_file(path: Path, changes: Sequence[str]) -> Config:
    """The configuration in a file with the changes of ``--set`` put in, checked.

    Raises:
        ConfigError: as `load_config`; a value that ``--set`` has given is said to be read as JSON.
    """
    raw = apply_changes(read_config_file(path), changes)
    try:
        return load_config(raw, str(path))
    except ConfigError as error:
        keys = tuple(f"{path}: {change.partition('=')[0]}" for change in changes)
        hint = ' (--set takes JSON such as 3, true, null or ["a"]; anything else is text)'
        lines = (f"{line}{hint}" if line.startswith(keys) else line for line in str(error).splitlines())
        raise ConfigError("\n".join(lines)) from None


def load_optimizer(raw: Mapping[str, Any]) -> OptimizerConfig:
    """The optimizer section in a mapping, checked.

    Raises:
        ConfigError: as `load_config`.
    """
    return _checked(OptimizerConfig, raw, "configuration", "optimizer")


def _checked(section: type[_AnySection], raw: Mapping[str, Any], where: str, *name: str) -> _AnySection:
    try:
        return section.model_validate(dict(raw))
    except ValidationError as error:
        lines = described_errors(error, Config, name)
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None
