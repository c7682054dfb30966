"""States of tracked things (LR schedulers, data sources, ...) as JSON and back, exactly: values and their types.

JSON knows numbers, text, lists and objects with text for keys. Everything else is an object with one key, `TAG`, that
names its type, and ``v``: tuples, dicts with other keys, infinities, bytes, NumPy's scalars and arrays, tensors, ... No
pickle: what has no entry here is refused, with its place inside the state.

What is shared comes back as copies: a list that a state has at two places becomes two lists.
"""

from __future__ import annotations

import base64
import math
import reprlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from pagemem.folders.small_file import MAX_DEPTH

TAG: Final = "$type"
#: What the bytes of arrays, tensors and text of one state may add up to; the manifest that holds them is read whole.
MAX_BYTES: Final = 16 << 20
_MAX_INT_BITS: Final = 8192
_INT64: Final = 1 << 63
# Each level takes up to three of JSON's, and the manifest has some above.
_MAX_LEVELS: Final = (MAX_DEPTH - 10) // 3

#: Types of sequences that are built from an iterable of their items.
_SEQUENCES: Final[dict[type, str]] = {
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
    torch.Size: "torch.Size",
}
_MAPPINGS: Final[dict[type, str]] = {dict: "dict", Counter: "Counter", OrderedDict: "OrderedDict"}


class UnknownState(ValueError):
    """A state that cannot be committed; the message names the place and the reason."""


def encode(state: Any, name: str) -> Any:
    """JSON from which `decode` makes an equal state of equal types.

    Args:
        name: of the state, for errors.

    Raises:
        UnknownState: it has something that cannot be written down, more than `MAX_BYTES`, or too many levels.
    """
    return _Encoder().encode(state, name, _MAX_LEVELS)


class _Encoder:
    def __init__(self) -> None:
        self._left_bytes = MAX_BYTES

    def encode(self, value: Any, where: str, levels: int) -> Any:
        """One value."""
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            if value.bit_length() > _MAX_INT_BITS:
                raise UnknownState(
                    f"{where} is a number of {value.bit_length()} bits; at most {_MAX_INT_BITS} are committed"
                )
            return value
        if kind is float:
            return value if math.isfinite(value) else {TAG: "float", "v": str(value)}
        if kind is str:
            self._take(where, len(value))
            return value
        if levels == 0:
            raise UnknownState(
                f"{where} lies {_MAX_LEVELS} levels deep, or its state holds itself; that is not committed"
            )
        if kind is list:
            return self._items(value, where, levels)
        if kind in _SEQUENCES:
            more = {"maxlen": value.maxlen} if kind is deque else {}
            return {TAG: _SEQUENCES[kind], "v": self._items(value, where, levels), **more}
        if kind in _MAPPINGS:
            return self._mapping(value, where, levels)
        return self._bytes_of(value, where)

    def _items(self, items: Collection[Any], where: str, levels: int) -> list[Any]:
        self._take(where, 8 * len(items))
        # Long lists are of numbers: a permutation of the data, say.
        kinds = set(map(type, items))
        if (kinds <= {float} and all(map(math.isfinite, items))) or (
            kinds <= {int} and all(-_INT64 < item < _INT64 for item in items)
        ):
            return list(items)
        return [self.encode(item, f"{where}[{place}]", levels - 1) for place, item in enumerate(items)]

    def _mapping(self, value: Any, where: str, levels: int) -> Any:
        inner = [(key, self.encode(item, f"{where}[{reprlib.repr(key)}]", levels - 1)) for key, item in value.items()]
        if type(value) is dict and TAG not in value and all(type(key) is str for key in value):
            self._take(where, sum(len(key) for key in value))
            return dict(inner)
        pairs = [[self.encode(key, f"{where}, key {reprlib.repr(key)},", levels - 1), item] for key, item in inner]
        self._take(where, 8 * len(pairs))
        return {TAG: _MAPPINGS[type(value)], "v": pairs}

    def _bytes_of(self, value: Any, where: str) -> Any:
        if type(value) in (bytes, bytearray):
            self._take(where, len(value))
            return {TAG: type(value).__name__, "v": _text(bytes(value))}
        if type(value) is complex:
            return {TAG: "complex", "v": [self.encode(part, where, 1) for part in (value.real, value.imag)]}
        if isinstance(value, np.generic) or type(value) is np.ndarray:
            array = np.asarray(value)
            if array.dtype.kind not in "biufc" or array.dtype.byteorder not in "=|":
                raise UnknownState(
                    f"{where} is a NumPy {type(value).__name__} of {array.dtype}, which is not committed; numbers are"
                )
            self._take(where, array.nbytes)
            tag = "ndarray" if isinstance(value, np.ndarray) else "numpy"
            return {TAG: tag, "dtype": array.dtype.str, "shape": list(array.shape), "v": _text(array.tobytes())}
        if type(value) is Tensor:
            return self._tensor(value, where)
        raise UnknownState(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which is not committed; numbers, "
            "text, lists, dicts, tensors are"
        )

    def _tensor(self, value: Tensor, where: str) -> Any:
        if value.device.type != "cpu" or value.layout is not torch.strided or value.is_quantized or value.requires_grad:
            raise UnknownState(
                f"{where} is a tensor on {value.device}, {value.layout}, requires_grad {value.requires_grad}; plain "
                "ones on the CPU are committed"
            )
        self._take(where, value.numel() * value.element_size())
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {
            TAG: "tensor",
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "v": _text(content),
        }

    def _take(self, where: str, n_bytes: int) -> None:
        self._left_bytes -= n_bytes
        if self._left_bytes < 0:
            raise UnknownState(
                f"{where} takes the state above {MAX_BYTES} bytes, more than is committed; keep large tensors in "
                "buffers of the model"
            )


def decode(written: Any) -> Any:
    """The state that `encode` was given.

    Raises:
        ValueError: it was not made by `encode`; names the tag.
    """
    if isinstance(written, list):
        return [decode(item) for item in written]
    if not isinstance(written, dict):
        return written
    if TAG not in written:
        return {key: decode(item) for key, item in written.items()}
    tag = written[TAG]
    try:
        more = set(written) - {TAG, "v", *_MORE.get(tag, ())}
        if more:
            raise ValueError(f"it has a key {reprlib.repr(min(more))}")
        return _DECODERS[tag](written)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        why = (
            "no such type"
            if isinstance(error, KeyError) and tag not in _DECODERS
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"{reprlib.repr(tag)} with {reprlib.repr(written.get('v'))} is no value: {why[:300]}"
        ) from None


def _items(written: dict[str, Any]) -> list[Any]:
    if not isinstance(written["v"], list):
        raise TypeError("it is no list")
    return [decode(item) for item in written["v"]]


def _pairs(written: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(key, value) for key, value in _items(written)]


def _array(written: dict[str, Any]) -> Any:
    dtype = np.dtype(written["dtype"])
    if dtype.kind not in "biufc":
        raise ValueError(f"{dtype} is not a number's")
    return np.frombuffer(_bytes(written), dtype=dtype).reshape(_shape(written)).copy()


def _tensor_of(written: dict[str, Any]) -> Tensor:
    dtype = getattr(torch, str(written["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{written['dtype']!r} is no dtype")
    content = np.frombuffer(_bytes(written), dtype=np.uint8).copy()
    flat = torch.from_numpy(content).view(dtype) if content.size else torch.empty(0, dtype=dtype)
    return flat.reshape(_shape(written))


def _shape(written: dict[str, Any]) -> list[int]:
    shape = written["shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape!r} is no shape")
    return shape


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(written: dict[str, Any]) -> bytes:
    return base64.b64decode(written["v"], validate=True)


def _complex(written: dict[str, Any]) -> complex:
    real, imaginary = _items(written)
    return complex(real, imaginary)


#: Keys that a type has beside ``v``.
_MORE: Final[dict[str, tuple[str, ...]]] = {
    "deque": ("maxlen",), "numpy": ("dtype", "shape"), "ndarray": ("dtype", "shape"), "tensor": ("dtype", "shape"),
}  # fmt: skip
_DECODERS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "float": lambda written: float(written["v"]),
    "complex": _complex,
    "tuple": lambda written: tuple(_items(written)),
    "set": lambda written: set(_items(written)),
    "frozenset": lambda written: frozenset(_items(written)),
    "torch.Size": lambda written: torch.Size(_items(written)),
    "deque": lambda written: deque(_items(written), written["maxlen"]),
    "dict": lambda written: dict(_pairs(written)),
    "Counter": lambda written: Counter(dict(_pairs(written))),
    "OrderedDict": lambda written: OrderedDict(_pairs(written)),
    "bytes": _bytes,
    "bytearray": lambda written: bytearray(_bytes(written)),
    "numpy": lambda written: _array(written)[()],
    "ndarray": _array,
    "tensor": _tensor_of,
}
