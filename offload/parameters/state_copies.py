"""``state_dict()`` returns copies, where plain PyTorch returns the parameters' own memory.

A write to one of them would reach the model there, and does not here. It is noticed by torch's version counter, even if
the tensor itself no longer exists: ``model.state_dict()[name].copy_(value)``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload.hooks import ModelHook
from pagemem.files.spilled import spilled_copy


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy: a tensor without memory that shares its version counter, and the version when it was returned."""

    name: str
    what: str
    copy: weakref.ref[Tensor]
    counter: Tensor
    version: int


@dataclass(slots=True)
class StateCopies:
    """The copies that may have been written to since the last `check`. Training thread only.

    Attributes:
        spill_folder: where the files of large copies are; None: they are in RAM.
        copying: calls of ``state_dict()`` under way, one inside another.
        before_copies: called before the first of them.
    """

    spill_folder: Path | None = None
    copying: int = 0
    before_copies: Callable[[], None] = lambda: None
    _copies: list[_Copy] = field(default_factory=list)

    def watch(self, module: nn.Module) -> list[Callable[[], None]]:
        """Have a module's ``state_dict()`` return copies, not views that keep their pages in host memory.

        Returns:
            What removes the hooks again.
        """

        def before(*_: Any) -> None:
            if not self.copying:
                self.check()
                self.before_copies()
            self.copying += 1

        def after(*_: Any) -> None:
            self.copying -= 1

        handles = [
            module.register_state_dict_pre_hook(ModelHook(before)),  # type: ignore[no-untyped-call]
            module.register_state_dict_post_hook(ModelHook(after)),  # type: ignore[no-untyped-call]
            module.register_load_state_dict_post_hook(ModelHook(lambda *_: self.forget())),  # type: ignore[no-untyped-call]
        ]
        return [handle.remove for handle in handles]

    def give(self, name: str, values: Tensor) -> Tensor:
        """A copy of the parameter of a name; of a large one in a file of its own, so that neither RAM nor a device
        need hold all parameters.

        Raises:
            DiskFullError, StorageError: there is no room for the file.
        """
        copy = values.clone() if values.is_meta else spilled_copy(self.spill_folder, values)
        self.watch_copy(name, "a tensor of state_dict()", copy)
        return copy

    def watch_copy(self, name: str, what: str, copy: Tensor) -> None:
        """Notice writes to a copy of the parameter of a name, or of its gradient.

        Args:
            what: which copy, in words.
        """
        if not copy.is_inference():  # Those cannot be written to, and have no count.
            with torch._C.DisableTorchFunctionSubclass():
                counter = copy.detach()
                counter.data = copy.new_empty(0)
            self._copies.append(_Copy(name, what, weakref.ref(copy), counter, counter._version))

    def forget(self) -> None:
        """The model is given all its values anew, perhaps out of these copies."""
        self._copies.clear()

    def check(self) -> None:
        """Forget the copies that no longer exist.

        Raises:
            RuntimeError: one was written to, which has not changed the model; it is forgotten.
        """
        copies, self._copies = self._copies, []
        self._copies = [one for one in copies if one.counter._version == one.version and one.copy() is not None]
        for one in copies:
            if one.counter._version != one.version:
                raise RuntimeError(
                    f"{one.name}: {one.what} was written to, which changes the parameter in plain "
                    "PyTorch, but is a copy here, so the model has its old values; write to the parameter under "
                    "torch.no_grad(), call load_state_dict(), or change a clone"
                )
