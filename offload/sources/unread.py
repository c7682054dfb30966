"""Tensors of a checkpoint that have not been read: they have shape and dtype, and are read by whatever uses them.

Code that only renames, converts and assigns tensors (transformers' loader) moves no bytes with them: ``detach`` and one
conversion of dtype give another unread tensor. Every other function reads what it is given, and works on that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from offload.sources.safetensors_file import FileTensor

_ATEN: Final = torch.ops.aten
#: Arguments of a conversion that change nothing else.
_CONVERSION: Final = frozenset({"dtype", "device", "layout", "pin_memory", "non_blocking", "memory_format"})


@dataclass(frozen=True, slots=True)
class Source:
    """Where values come from.

    Attributes:
        dtype: what they become on the way, as ``.to(dtype)`` does.
    """

    stored: FileTensor
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The values.

        Raises:
            StorageError: they cannot be read.
        """
        return self.stored.read(self.dtype).view(self.stored.shape)


class UnreadTensor(Tensor):
    """A tensor on the CPU whose values are still in a file. It cannot be written to."""

    source: Source

    @staticmethod
    def __new__(cls, source: Source) -> UnreadTensor:
        """Of a source; nothing is read."""
        made: UnreadTensor = Tensor._make_wrapper_subclass(
            cls, source.stored.shape, dtype=source.dtype, device=torch.device("cpu")
        )
        made.source = source
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Stay unread where that is all the same, or call ``func`` with what was read."""
        named = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, UnreadTensor):
            if func is _ATEN.detach.default:
                return UnreadTensor(first.source)
            if func is _ATEN._to_copy.default and _only_converts(first, named):
                return UnreadTensor(Source(first.source.stored, named["dtype"]))
            if func._schema.is_mutable:  # type: ignore[attr-defined]
                raise RuntimeError(
                    f"{first.source.stored.name} is to be written to, and has not been read yet: clone it first"
                )
        return func(*tree_map(read_now, args), **tree_map(read_now, named))


def _only_converts(tensor: UnreadTensor, named: Mapping[str, Any]) -> bool:
    """Whether a copy is the same values in another dtype, and they have been converted at most in name."""
    source = tensor.source
    return (
        named.get("dtype") is not None
        and named.keys() <= _CONVERSION
        and torch.device(named.get("device") or "cpu").type == "cpu"
        and not named.get("pin_memory")
        and named.get("memory_format") in (None, torch.preserve_format)
        and source.dtype is source.stored.dtype
    )


def read_now(value: Any) -> Any:
    """The values of an unread tensor; anything else as it is."""
    return value.source.read() if isinstance(value, UnreadTensor) else value
