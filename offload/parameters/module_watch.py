"""Calls back for every module that is registered in another one while a model is built."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_watched_by: str | None = None
_is_paused = False


@contextmanager
def watching_modules(by: str, built: Callable[[nn.Module, str, nn.Module], None]) -> Iterator[None]:
    """Have ``built`` called with parent, name and module for every module that this thread registers in a parent inside
    the block. What other threads build meanwhile is left alone.

    Args:
        by: the caller's name, for the error.

    Raises:
        RuntimeError: another block is open; neither would see what the other does to the modules.
    """
    global _watched_by
    if _watched_by is not None:
        raise RuntimeError(f"{by} inside {_watched_by}: a model has one store; leave the outer block first")

    thread = threading.get_ident()

    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None and not _is_paused and threading.get_ident() == thread:
            built(parent, name, child)

    handle = register_module_module_registration_hook(registered)
    _watched_by = by
    try:
        yield
    finally:
        _watched_by = None
        handle.remove()


@contextmanager
def unwatched() -> Iterator[None]:
    """Have the modules that are built inside the block stay ordinary until the model is prepared: adapters, say, which
    are small and are converted once they are built."""
    global _is_paused
    before, _is_paused = _is_paused, True
    try:
        yield
    finally:
        _is_paused = before


def named_parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it, with paths that begin with ``name``."""
    for path, part in module.named_modules():
        yield f"{name}.{path}" if path else name, part
