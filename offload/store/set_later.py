"""Parameters that a constructor leaves on meta and somebody sets later, as transformers' ``from_pretrained`` does.

They go to pages when they are set: those of one module together, once the next module's turn has come, so that no more
than one module's are ordinary at any time. What has not been read from its file yet goes there unread.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from offload.cutting.cuttable import block_of
from offload.cutting.make_cut import release
from offload.modules.checks import check_values
from offload.parameters.inner_tensors import is_slice
from offload.sources.transformers_files import FilesOfTransformers
from offload.sources.unread import UnreadTensor
from offload.store.new_units import of_slices
from offload.store.page_store import PageStore

T = TypeVar("T", bound=Tensor)


class SetLater:
    """Watches what its thread assigns to the modules of a store that have been built on meta. A context manager."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._paths: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._pending: nn.Module | None = None
        self._files = FilesOfTransformers()
        self._thread = threading.get_ident()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> SetLater:
        watching: Any = torch_module  # its stub has hooks that return nothing
        self._handles = [
            watching.register_module_parameter_registration_hook(self._set_parameter),
            watching.register_module_buffer_registration_hook(self._set_buffer),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._files.give_back()

    def built(self, path: str, module: nn.Module) -> None:
        """A module was built; its parameters on meta may be set later."""
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(map(self._store.awaits_values, own)):
            self._paths[module] = path
            self._files.take_over()

    def flush(self) -> None:
        """Have what was set go to pages now."""
        module, self._pending = self._pending, None
        if module is None:
            return
        path = self._paths[module]
        here = [p for p in module._parameters.values() if p is not None and not self._store.awaits_values(p)]
        if all(self._can_hold(path, parameter) for parameter in here):
            self._store.add_module(path, module)

    def _can_hold(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether pages can; if not, the parameter stays ordinary, and whoever takes the finished model lists all."""
        try:
            check_values(name, parameter, self._store.parts.device)
        except ValueError:
            return False
        return True

    def _set_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != self._thread or self._store.awaits_values(parameter):
            return None
        if module is not self._pending:
            self.flush()
        if module in self._paths:
            self._files.note_values(f"{self._paths[module]}.{name}")
        if isinstance(parameter, UnreadTensor):
            return self._add_unread(module, name, parameter)
        if module in self._paths:
            self._pending = module
        return None

    def _add_unread(self, module: nn.Module, name: str, unread: UnreadTensor) -> nn.Parameter:
        path = f"{self._paths.get(module, type(module).__name__)}.{name}"
        source = unread.source
        on_meta = nn.Parameter(torch.empty(unread.shape, dtype=unread.dtype, device="meta"), unread.requires_grad)
        if not (on_meta.is_floating_point() and self._can_hold(path, on_meta)):
            return _marked_alike(nn.Parameter(source.read(), unread.requires_grad), unread)
        # What is cut is decided by all of the module's parameters, as when they are there together.
        others = [(key, p) for key, p in module._parameters.items() if p is not None and key != name]
        together = [(path, on_meta), *((key, p) for key, p in others if p.dtype is on_meta.dtype)]
        groups = self._store.cut(together, block_of(module, name, on_meta))
        groups = [group for group in groups if is_slice(group[0][1])] or [[(path, on_meta)]]
        sources = of_slices({on_meta: source.stored.pieces(source.dtype)})
        for group in groups:
            self._store.maker.make(group, sources)
        release([on_meta])
        return _marked_alike(on_meta, unread)

    def _set_buffer(self, module: nn.Module, name: str, buffer: Tensor | None) -> Tensor | None:
        if not isinstance(buffer, UnreadTensor):
            return None
        return _marked_alike(buffer.source.read(), buffer)


def _marked_alike(made: T, other: Tensor) -> T:
    """Have a tensor in another's place bear transformers' mark, too: that it needs no initial values."""
    vars(made).update({key: value for key, value in vars(other).items() if key.startswith("_is_hf")})
    return made
