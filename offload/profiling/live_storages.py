"""Which storages of tensors are alive, and what for: followed from the op that makes them to their end.

Works on any device, torch's meta device included, where a storage has a size and no bytes. What a kernel takes for
itself while it runs is not seen, nor are tensors that were made before, unless somebody names them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pagemem.tier import Tag


@dataclass(frozen=True, slots=True)
class Holder:
    """What a storage is held for, by the module of a name ("": nobody's yet), on which kind of device."""

    tag: Tag
    name: str
    device: str


#: Told that so many bytes more (or less) are held; on any thread, in the order of the changes.
Changed = Callable[[Holder, int], None]


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an op makes while this mode is on, and those that are named, until they end.

    Entered and left on one thread; ops of autograd's own threads are seen as well, and storages may end on any thread.

    Args:
        changed: called under this object's lock; must not make or free tensors.
    """

    def __init__(self, changed: Changed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._changed = changed
        # Reentrant: a storage may end while another is noted, on the same thread.
        self._lock = threading.RLock()
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Holder, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op and follow what it makes."""
        named = kwargs or {}
        result = func(*args, **named)
        made = [tensor for tensor in tensors_in(result) if _has_storage(tensor)]
        if made:
            given = {t.untyped_storage()._cdata for t in tensors_in((args, named)) if _has_storage(t)}
            for tensor in made:
                # A view, or an argument changed in place, is not new; a parameter's would be counted anew.
                if tensor.untyped_storage()._cdata not in given:
                    self._follow(tensor, Tag.TEMPORARY, "", known_too=False)
        return result

    def hold(self, tensor: Tensor, tag: Tag, name: str) -> None:
        """Say what a tensor's storage is held for from now on, whether it was followed before or not. Any thread."""
        if _has_storage(tensor):
            self._follow(tensor, tag, name, known_too=True)

    def holder(self, tensor: Tensor) -> Holder | None:
        """What a tensor's storage is held for; None where nobody follows it. Any thread."""
        if not _has_storage(tensor):
            return None
        found = self._live.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def _follow(self, tensor: Tensor, tag: Tag, name: str, *, known_too: bool) -> None:
        storage = tensor.untyped_storage()
        place, holder = storage._cdata, Holder(tag, name, tensor.device.type)
        with self._lock:
            known = self._live.get(place)
            if known is not None:
                if known_too and known[1] != holder:
                    self._live[place] = (known[0], holder, known[2])
                    self._changed(known[1], -known[2])
                    self._changed(holder, known[2])
                return
            n_bytes = storage.nbytes()
            # The weak reference lasts as long as the storage, not only as this Python object of it.
            self._live[place] = (weakref.ref(storage, lambda _: self._ended(place)), holder, n_bytes)
            self._changed(holder, n_bytes)

    def _ended(self, place: int) -> None:
        with self._lock:
            _, holder, n_bytes = self._live.pop(place)
            self._changed(holder, -n_bytes)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among an op's arguments or results, in lists, tuples and dicts, too; `torch.utils._pytree` is far
    slower."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def _has_storage(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not torch._is_functional_tensor(value)
