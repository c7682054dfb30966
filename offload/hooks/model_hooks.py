"""Hooks and methods that the engine puts on a model's modules, and how a copy of the model is rid of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from offload.hooks.compilers import raise_refusal


def _do_nothing(*_: Any) -> None:
    """What a copy of a model has where the model has a hook of an engine."""


class ModelHook:
    """A hook on a module with paged parameters. A copy of the module, whose parameters are ordinary ones, does
    without."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("__name__", "_torchscript_modifier"):  # What torch.jit.script asks.
            raise_refusal("torch.jit.script")
        raise AttributeError(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _do_nothing

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError(
            "a model with paged parameters cannot be pickled; use model.state_dict(), or copy.deepcopy(model) where "
            "it fits in RAM"
        )


class MethodHook(ModelHook):
    """In place of a method of one module, as its attribute until `undo`. A copy of the module has its own method
    again."""

    def __init__(self, call: Callable[..., Any], module: torch.nn.Module, name: str) -> None:
        super().__init__(call)
        self._module = module
        self._name = name
        self._own = module.__dict__.get(name)
        functools.update_wrapper(self, getattr(module, name))
        setattr(module, name, self)

    def undo(self) -> None:
        """Give the module its method back."""
        if self._own is None:
            self._module.__dict__.pop(self._name, None)
        else:
            self._module.__dict__[self._name] = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._module))
        if copied is None or self._own is not None:
            return copy.deepcopy(self._own, memo)
        return MethodType(getattr(type(self._module), self._name), copied)
