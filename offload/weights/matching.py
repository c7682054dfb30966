"""Which tensor of a checkpoint goes into which parameter or buffer of a model, by name. Nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from offload.sources.safetensors_file import FileTensor


@dataclass(frozen=True, slots=True)
class Wanted:
    """A parameter or persistent buffer.

    Attributes:
        names: all its names: several where it is tied.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Naming:
    """What a model says of the names in its checkpoints.

    Attributes:
        prefix: that of the base model (``model``, ``bert``), which checkpoints of the base alone lack, and the base
            alone does not have.
        may_lack, may_add: patterns of names that are passed over.
    """

    prefix: str = ""
    may_lack: Sequence[str] = ()
    may_add: Sequence[str] = ()


@dataclass(slots=True)
class Match:
    """What fits, and all that does not.

    Attributes:
        pairs: targets, each with the tensor that it gets.
        misfits: shapes, dtypes and other things that cannot be, in words.
    """

    pairs: list[tuple[Wanted, FileTensor]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)

    def check(self, folder: Path, model: str, *, strict: bool) -> None:
        """Raise ValueError, in one line that lists each tensor, unless the checkpoint fits.

        Args:
            strict: whether something missing or surplus is an error, too.
        """
        found = [f"misfits: {', '.join(self.misfits)}"] if self.misfits else []
        if strict:
            found += [f"missing: {', '.join(self.missing)}"] if self.missing else []
            found += [f"surplus: {', '.join(self.surplus)}"] if self.surplus else []
        if found:
            lenient = "" if self.misfits else " (strict=False leaves these as they are)"
            raise ValueError(f"{folder} does not fit {model}; {'; '.join(found)}{lenient}")


def match(targets: Sequence[Wanted], tensors: Mapping[str, FileTensor], naming: Naming) -> Match:
    """Match names as transformers does: as they are, without the base model's prefix, or with it.

    Of two tensors with one name then, the one whose name is as it is counts, and the other is surplus.
    """
    by_name = {name: target for target in targets for name in target.names}
    offered: dict[Wanted, dict[str, FileTensor]] = {}
    found = Match()
    for name, stored in tensors.items():
        known = _known_as(name, by_name, naming.prefix)
        if known is not None and known != name and (known in tensors or known in offered.get(by_name[known], {})):
            known = None
        if known is not None:
            offered.setdefault(by_name[known], {})[known] = stored
        elif not _is_any(naming.may_add, name):
            found.surplus.append(name)
    for target in targets:
        if target not in offered:
            if not any(_is_any(naming.may_lack, name) for name in target.names):
                found.missing.append(target.names[0])
            continue
        # Of several names the last one's values stay, as load_state_dict has it.
        stored = offered[target][max(offered[target], key=target.names.index)]
        misfit = _misfit(target, stored)
        if misfit is None:
            found.pairs.append((target, stored))
        else:
            found.misfits.append(misfit)
    return found


def _known_as(name: str, known: Container[str], prefix: str) -> str | None:
    names = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]
    return next((one for one in names if one in known), None)


def _misfit(target: Wanted, stored: FileTensor) -> str | None:
    """Why a target cannot have a tensor, in words."""
    if target.shape != stored.shape:
        return f"{stored.name} is {list(stored.shape)} in the file and {list(target.shape)} in the model"
    if _kind(target.dtype) != _kind(stored.dtype):
        return f"{stored.name} is {stored.dtype} in the file and {target.dtype} in the model"
    return None


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_complex, dtype.is_floating_point


def _is_any(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
