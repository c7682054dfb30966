"""Hooks and methods that the engine puts on a model's modules, which copies of the model do without; and the refusal of
torch's compilers and transforms, which would keep the placeholder of an unbound parameter instead of its values."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.compiler import is_compiling

_VMAP = torch._C._functorch.TransformType.Vmap


def refuse_compilers(name: str) -> None:
    """Raise RuntimeError where torch compiles, traces or exports, or differentiates by torch.func, what calls this.

    Args:
        name: of a parameter or a model.
    """
    if is_compiling() or torch._C._is_tracing():
        raise_refusal(name)
    if any(level.key() != _VMAP for level in torch._C._functorch.get_interpreter_stack() or ()):
        raise RuntimeError(
            f"{name}: torch.func.grad, vjp, jvp and what is made of them cannot look into a model in pages; use "
            "torch.autograd, or give them copy.deepcopy(model), which is an ordinary one"
        )


def refuse_compiled(model: torch.nn.Module) -> None:
    """Raise RuntimeError where a part of a model that has parameters was compiled: bound between uses, they look
    ordinary to the compiler."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return  # Nothing is compiled.
    for module in model.modules():
        if module._compiled_call_impl is None and not isinstance(module, compiler.OptimizedModule):
            continue
        if next(module.parameters(), None) is not None:
            raise_refusal(next(name for name, one in model.named_modules() if one is module) or type(model).__name__)


def raise_refusal(name: str) -> None:
    """Raise RuntimeError, also while torch.compile looks through code that has not run yet."""
    refusal = (
        f"{name}: a model in pages cannot be compiled, traced or exported by torch (torch.compile, torch.jit, "
        "torch.export); call it as it is, or compile copy.deepcopy(model), which is an ordinary one"
    )
    if "torch._dynamo.exc" not in sys.modules:
        raise RuntimeError(refusal)
    from torch._dynamo.exc import ShortenTraceback

    class CompilerError(ShortenTraceback):
        """Neither wrapped by torch.compile, nor taken for a reason to go on without compiling."""

        def __str__(self) -> str:
            return refusal

    raise CompilerError(refusal, first_useful_frame=None)


#: Called for good by torch.compile, not looked through: see `torch.compiler.assume_constant_result`, which imports the
#: compiler.
raise_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
