"""The refusal of torch's compilers and transforms, which would keep what a paged parameter holds while nobody uses it:
no values."""

from __future__ import annotations

import sys

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
