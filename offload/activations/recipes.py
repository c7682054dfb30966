"""Saved tensors that are cheaper to recompute than to keep: results of elementwise ops whose inputs are saved anyway.

A linear layer saves its input. Where that is ``gelu(x)``, the activation's own backward saves ``x``; the result can
be freed and recomputed from ``x`` when the backward asks for it, by the same kernel and so with the same bits.

What an op was and what it saved is read off autograd's graph (``grad_fn``), while the graph is whole: in the pack hook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class _Elementwise:
    """An op that autograd's graph tells enough about.

    Attributes:
        inputs: names under which its node saves the inputs. again: from the node, what computes the result of them.
    """

    inputs: tuple[str, ...]
    again: Callable[[Any], Callable[..., Tensor]]


#: Elementwise, without random numbers, and saving what they read. By names of nodes in autograd's graph.
_OPS: Final = {
    "GeluBackward0": _Elementwise(
        ("self",), lambda node: partial(functional.gelu, approximate=node._saved_approximate)
    ),
    "SiluBackward0": _Elementwise(("self",), lambda _: functional.silu),
    "MishBackward0": _Elementwise(("self",), lambda _: functional.mish),
    "HardswishBackward0": _Elementwise(("self",), lambda _: functional.hardswish),
    "LeakyReluBackward0": _Elementwise(
        ("self",), lambda node: partial(functional.leaky_relu, negative_slope=node._saved_negative_slope)
    ),
    "PowBackward0": _Elementwise(("self",), lambda node: partial(torch.pow, exponent=node._saved_exponent)),
    "MulBackward0": _Elementwise(("self", "other"), lambda _: torch.mul),
}
#: Nodes of ops whose result has its input's storage.
_VIEWS: Final = frozenset(
    f"{name}Backward0"
    for name in (
        "Alias",
        "Expand",
        "Permute",
        "ReshapeAlias",
        "Select",
        "Slice",
        "T",
        "Transpose",
        "UnsafeView",
        "Unsqueeze",
        "View",
    )
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in its storage, but for where it begins."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    contiguous: bool

    @staticmethod
    def of(tensor: Tensor) -> Layout:
        """A tensor's."""
        return Layout(tensor.dtype, tensor.size(), tensor.stride(), tensor.is_contiguous())


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to recompute the contents of a storage.

    Attributes:
        again: the op. inputs: what the pack hook made of each of its inputs.
    """

    again: Callable[..., Tensor]
    inputs: tuple[Any, ...]

    @torch.no_grad()
    def result(self, unpack: Callable[[Any], Tensor]) -> Tensor:
        """The storage's contents, as a tensor of its own."""
        return self.again(*(unpack(packed) for packed in self.inputs))


def recipe_of(saved: Tensor, layout_of: Callable[[Any], Layout | None]) -> Recipe | None:
    """The recipe for the storage of a tensor that is being saved; None where there is none.

    Args:
        saved: as autograd hands it to a pack hook: strided, not empty.
        layout_of: of what the pack hook made of an input; None for what cannot be unpacked a second time.
    """
    node: Any = saved.grad_fn
    if node is None or saved._version:  # changed in place since the op
        return None
    while node.name() in _VIEWS:
        node = node.next_functions[0][0]
        if node is None:
            return None
    op = _OPS.get(node.name())
    inputs = None if op is None else _inputs(node, op.inputs)
    if op is None or inputs is None:
        return None
    layouts = [layout_of(packed) for packed in inputs]
    return Recipe(op.again(node), inputs) if _fills(saved, layouts) else None


def _inputs(node: Any, names: Sequence[str]) -> tuple[Any, ...] | None:
    """What the pack hook made of inputs; None if some were not saved, or not under hooks."""
    try:
        return tuple(getattr(node, f"_raw_saved_{name}").data for name in names)
    except (AttributeError, RuntimeError):
        return None


def _fills(saved: Tensor, layouts: Sequence[Layout | None]) -> bool:
    """Whether an elementwise op of contiguous inputs like these makes exactly the storage of ``saved``."""
    fitting = [layout.size for layout in layouts if layout and layout.dtype == saved.dtype and layout.contiguous]
    if len(fitting) < len(layouts):
        return False
    result: torch.Size = torch.broadcast_shapes(*fitting)  # type: ignore[no-untyped-call]
    return saved.untyped_storage().nbytes() == result.numel() * saved.dtype.itemsize
