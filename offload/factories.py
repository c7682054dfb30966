"""Factories that a configuration names as ``module:callable``: found, called, and looked at before long work begins."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from offload.config import ConfigError


def resolve(reference: str) -> Callable[..., Any]:
    """The object that ``module:callable`` names.

    Raises:
        ConfigError: the module cannot be imported or has no such callable.
    """
    module_name, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"factory {reference!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"factory {reference!r} is a {type(found).__name__}, not callable")
    callable_: Callable[..., Any] = found
    return callable_


def factory_of(key: str, reference: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """The factory ``reference``, named by the section ``key``, with its arguments.

    Raises:
        ConfigError: there is no such factory, or it does not take these arguments.
    """
    factory = resolve(reference)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}.arguments: {reference}: {error}") from error
    return partial(factory, **arguments)
