"""Calls back for every module that is registered in another one while a model is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_watched_by: str | None = None


@contextmanager
def watching_modules(by: str, built: Callable[[nn.Module, str, nn.Module], None]) -> Iterator[None]:
    """Have ``built`` called with parent, name and module for every module registered in a parent inside the block.

    Args:
        by: the caller's name, for the error.

    Raises:
        RuntimeError: another block is open; neither would see what the other does to the modules.
    """
    global _watched_by
    if _watched_by is not None:
        raise RuntimeError(f"{by} inside {_watched_by}: a model has one store; leave the outer block first")

    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            built(parent, name, child)

    handle = register_module_module_registration_hook(registered)
    _watched_by = by
    try:
        yield
    finally:
        _watched_by = None
        handle.remove()


def named_parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it, with paths that begin with ``name``."""
    for path, part in module.named_modules():
        yield f"{name}.{path}" if path else name, part
