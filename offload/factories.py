"""Factories that a configuration names as ``module:callable``: found, called, and looked at before long work begins."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from offload.config import PLACEHOLDER, ConfigError, DataConfig, ModelConfig
from pagemem.errors import OffloadError


def resolve(key: str, reference: str) -> Callable[..., Any]:
    """The object that ``module:callable`` names; errors name ``key``, which it stands at.

    Raises:
        ConfigError: the module cannot be imported or has no such callable.
    """
    module_name, _, path = reference.partition(":")
    if not all(name.isidentifier() for name in [*module_name.split("."), *path.split(".")]):
        raise ConfigError(f"{key}: {reference!r} is not written as module:callable")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # Importing runs whatever is in the module.
        raise ConfigError(f"{key}: {reference!r}: {_of_import(error, module_name)}") from error
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except AttributeError as error:
        near = difflib.get_close_matches(name, dir(found), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}: {reference!r}: {error}{hint}") from error
    if not callable(found):
        raise ConfigError(f"{key}: {reference!r} is a {type(found).__name__}, not callable")
    callable_: Callable[..., Any] = found
    return callable_


def factory_of(key: str, reference: str, arguments: dict[str, Any]) -> Callable[[], Any]:
    """The factory ``reference`` with its arguments.

    Args:
        key: what names it, ``section.factory`` or the like.

    Raises:
        ConfigError: there is no such factory, or it does not take these arguments.
    """
    factory = resolve(key, reference)
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key.removesuffix('.factory')}.arguments: {reference}: {error}") from error
    except ValueError:  # It has no signature, as some of C: whether it takes them shows when it is called.
        pass
    return partial(factory, **arguments)


def _of_import(error: Exception, module_name: str) -> str:
    said = " ".join(str(error).split())
    if not isinstance(error, ImportError):
        return f"importing it fails: {type(error).__name__}: {said} (--debug shows where)"
    if not isinstance(error, ModuleNotFoundError) or not f"{module_name}.".startswith(f"{error.name}."):
        return said  # of an import inside the module
    if module_name == PLACEHOLDER:
        return f"{said}: this is the placeholder of `offload config`; name a function of yours"
    return f"{said} in the current folder ({os.getcwd()}) or elsewhere on sys.path"


@contextmanager
def calls_of(key: str, what: str) -> Iterator[None]:
    """Code of the user's own runs inside: what it raises becomes one line that names it.

    Raises:
        ConfigError: it has raised; the cause is what it was. Errors of the engine, of the system and of memory pass as
            they are, as does AssertionError, which may be of ours.
    """
    try:
        yield
    except (OffloadError, ConfigError, OSError, MemoryError, AssertionError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{key}: {what} fails: {type(error).__name__}{': ' if said else ''}{said} (--debug shows where)"
        ) from error


def described(value: object) -> str:
    """A value in a few words, for errors that say what came instead of what was expected."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(described(part) if isinstance(part, Tensor) else type(part).__name__ for part in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inner}{', ...' if len(value) > 4 else ''})"
    return "None" if value is None else f"a {type(value).__name__}"


def model_factory(section: ModelConfig) -> Callable[[], nn.Module]:
    """The factory of the configuration's model, which looks at what it makes.

    Raises:
        ConfigError: there is no such factory, or it does not take these arguments. So does what is returned, when it
            makes something that cannot be trained; what the factory raises itself passes as it is.
    """
    make = factory_of("model.factory", section.factory, section.arguments)

    def made() -> nn.Module:
        model = make()
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model.factory: {section.factory} returns {described(model)}; it must return a torch.nn.Module"
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            what = (
                "without trainable parameters (none requires grad)"
                if any(True for _ in model.parameters())
                else "without parameters"
            )
            raise ConfigError(
                f"model.factory: {section.factory} returns {described(model)} {what}; there is nothing to train"
            )
        return model

    return made


def data_factory(section: DataConfig, folder: Path, seed: int) -> Callable[[], Any]:
    """The factory of the configuration's data, called with ``folder``, ``seed`` and its arguments; see
    `model_factory`."""
    make = factory_of("data.factory", section.factory, {"folder": folder, "seed": seed, **section.arguments})

    def made() -> Any:
        with calls_of("data.factory", section.factory):
            return make()

    return made
