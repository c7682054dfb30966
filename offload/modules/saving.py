"""``save_pretrained`` of transformers' models: it writes, and removes, files of a folder, where parameters in pages may
still lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from offload.hooks import MethodHook
from pagemem.errors import StorageError
from pagemem.folders.own_file import naming
from pagemem.process.interrupts import left_open

_NAME = "save_pretrained"


class _SavingHook(MethodHook):
    """Saving takes long: Ctrl-C does not wait for its end."""

    @left_open
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def guard_saving(module: nn.Module, in_use: Callable[[], Collection[Path]]) -> list[Callable[[], None]]:
    """Have ``save_pretrained`` of a model of transformers raise StorageError, before it writes anything, for a folder
    with a file in use. Other modules stay as they are.

    Args:
        in_use: the files that parameters lie in, links resolved.

    Returns:
        What makes it save as before.
    """
    owner = next((one for one in type(module).__mro__ if _NAME in vars(one)), None)
    if owner is None or not owner.__module__.startswith("transformers."):
        return []
    plain = module.save_pretrained

    @left_open
    def save(save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        _check(Path(save_directory), in_use())
        return plain(save_directory, *args, **kwargs)  # type: ignore[operator]

    return [_SavingHook(save, module, _NAME).undo]


def _check(folder: Path, in_use: Collection[Path]) -> None:
    if not (in_use and folder.is_dir()):
        return
    with naming("looking into", folder):
        for path in folder.iterdir():
            if Path(os.path.realpath(path)) in in_use:
                raise StorageError(
                    f"parameters of this model still lie in {path}, and saving to its folder would destroy them and "
                    "commits that name it; nothing was written: save to another folder"
                )
