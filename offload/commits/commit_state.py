"""The state in a commit's manifest: every field is checked before any is used.

A manifest is read by engines, `offload verify` and `offload export` through `read_commit`: what it returns can be
believed as far as one file can tell. Whether it fits the model, and whether pages hold what they should, is looked at
later.
"""

from __future__ import annotations

import base64
import binascii
import random
from collections.abc import Mapping
from typing import Annotated, Any, Final

import numpy as np
import torch
from pydantic import BaseModel, Field, TypeAdapter

from offload.commits.plain_state import decode
from offload.commits.stored_layout import StoredUnit
from optim.layout import SLICE_ALIGN_NUMEL
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest
from pagemem.errors import CommitError
from pagemem.folders.small_file import Count, Line, Record, checked
from pagemem.tier import Tag

#: ``state.encoding``: groups, what they were given and tracked states are as `offload.commits.plain_state` writes them.
#: Where the key is missing, plain JSON.
ENCODING: Final = 2

_Index = Annotated[int, Field(strict=True, ge=-1, le=2**31)]
_Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Word = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
_Base64 = Annotated[str, Field(strict=True, max_length=1 << 20)]


class Beside(Record):
    """The file beside the manifest."""

    n_bytes: Annotated[int, Field(strict=True, gt=0, le=2**48)]
    xxh3: Annotated[str, Field(strict=True, pattern=r"^[0-9a-f]{32}$")]


class _Random(Record):
    torch: _Base64
    cuda: _Base64 | None = None
    numpy: tuple[Line, Annotated[list[_Word], Field(max_length=624)], Count, Count, _Float]
    python: tuple[Count, Annotated[list[_Word], Field(max_length=625)], _Float | None]


class _Ssd(BaseModel):
    paths: Annotated[
        list[Annotated[str, Field(strict=True, max_length=4096, pattern=r"^[^\x00]*$")]], Field(max_length=64)
    ]


class _Config(BaseModel):
    """Of the configuration then, only what is used; keys come and go with versions."""

    ssd: _Ssd


class CommitState(Record):
    """``Manifest.state``. Keys with a default came later than format 1."""

    slice_numel: Annotated[int, Field(strict=True, gt=0, le=2**40)]
    cut_bytes: Count = 0
    staleness: Count
    optimizer: Line
    parameters: dict[Line, tuple[list[Count], Line, _Index]]
    update_steps: dict[Line, Count]
    lookahead: dict[Line, Annotated[list[_Float], Field(max_length=8)]] = {}  # noqa: RUF012 - pydantic copies it
    edited: list[Line]
    units: tuple[StoredUnit, ...]
    names: dict[Line, Line]
    unlike: Line | None = None
    encoding: Annotated[int, Field(strict=True, ge=ENCODING, le=ENCODING)] = ENCODING
    groups: list[dict[str, Any]]
    given: list[dict[str, Any]] | None = None
    random: _Random
    tracked: dict[str, Any]
    config: _Config
    versions: dict[str, str]
    sidecar: Beside | None = None


_ADAPTER: Final = TypeAdapter(CommitState)


def state_of(manifest: Manifest) -> CommitState:
    """The state of a commit that `read_commit` returned, or that this process made."""
    return _ADAPTER.validate_python(manifest.state)


def read_commit(folder: CommitFolder, number: int) -> Manifest:
    """One commit's manifest, checked.

    Raises:
        CommitError: it is damaged or impossible; names the file, the field and the value.
    """
    manifest = folder.read(number)
    try:
        check_commit(manifest)
    except ValueError as error:
        raise CommitError(f"{folder.manifest(number)} is damaged: its content cannot be read: {error}") from error
    return manifest


def check_commit(manifest: Manifest) -> None:
    """Whether every field of a manifest's state is one that can be, and agrees with the others and with the tensors.

    Raises:
        ValueError: (one line) the first that is not.
    """
    try:
        state = checked(_ADAPTER, manifest.state)
    except ValueError as error:
        raise ValueError(f"state.{error}") from None
    if state.slice_numel % SLICE_ALIGN_NUMEL:
        raise ValueError(f"state.slice_numel: {state.slice_numel} is no multiple of {SLICE_ALIGN_NUMEL}")
    _check_random(state.random)
    stored = manifest.sizes
    slots: dict[str, list[Any]] = {}
    for place, unit in enumerate(state.units):
        _check_unit(f"state.units.{place}", unit, stored)
        for slot in unit.slots:
            if slot.name in slots:
                raise ValueError(f"state.units.{place}: parameter {slot.name} is there twice")
            slots[slot.name] = [list(slot.shape), f"torch.{unit.dtype}"]
    for key, names in (("parameters", set(state.parameters)), ("update_steps", set(state.update_steps))):
        if names != set(slots):
            raise ValueError(f"state.{key}: {sorted(names ^ set(slots))[0]} is there or in state.units, not in both")
    for key, named in (("lookahead", set(state.lookahead)), ("edited", set(state.edited))):
        if named - set(slots):
            raise ValueError(f"state.{key}: there is no parameter {sorted(named - set(slots))[0]}")
    for name, (shape, dtype, group) in state.parameters.items():
        if [shape, dtype] != slots[name]:
            raise ValueError(f"state.parameters.{name}: {shape}, {dtype} here and {slots[name]} in state.units")
        if group >= len(state.groups):
            raise ValueError(f"state.parameters.{name}: it is of group {group}; there are {len(state.groups)}")
    for place, group_ in enumerate(state.groups):
        if "params" in group_:
            raise ValueError(f"state.groups.{place}: it has parameters")
    if state.given is not None and len(state.given) != len(state.groups):
        raise ValueError(f"state.given: of {len(state.given)} groups; there are {len(state.groups)}")
    if "encoding" in manifest.state:
        for key in ("groups", "given", "tracked"):
            try:
                decode(manifest.state.get(key))
            except ValueError as error:
                raise ValueError(f"state.{key}: {error}") from None


def encoded(manifest: Manifest) -> bytes:
    """The content of a manifest's file, which `read_commit` will take.

    Raises:
        CommitError: it would not.
    """
    content = manifest.encode()
    try:
        check_commit(Manifest.decode(content))
    except (CommitError, ValueError) as error:
        raise CommitError(f"commit {manifest.number} could not be read back, so it is not made: {error}") from error
    return content


def _check_unit(where: str, unit: StoredUnit, stored: dict[str, int]) -> None:
    """Whether a unit's parameters and masters have room in the tensors that they are said to be in."""

    def room(key: str, tag: Tag, n_bytes: int) -> None:
        if not key.startswith(f"{tag.value}: ") or key not in stored:
            raise ValueError(f"{where}: the commit has no {tag.value} tensor {key!r}")
        if stored[key] < n_bytes:
            raise ValueError(f"{where}: {key} has {stored[key]} bytes, what lies in it takes {n_bytes}")

    end = 0
    for slot in unit.slots:
        if slot.offset < end:
            raise ValueError(f"{where}: {slot.name} begins at element {slot.offset}, the one before it ends at {end}")
        end = slot.end
    first, last = unit.values
    room(unit.parameters, Tag.PARAM, max(0, last - first) * unit.torch_dtype.itemsize)
    reached, updated = (0, end) if unit.own is None else unit.own
    for part in unit.slices:
        if part.begin != reached or part.end < part.begin:
            raise ValueError(
                f"{where}: a slice has elements {part.begin} to {part.end}, the one before it ends at {reached}"
            )
        reached = part.end
        if part.master is not None:
            room(part.master, Tag.MASTER, 4 * (part.end - part.begin))
    if reached < updated:
        raise ValueError(f"{where}: its slices end at element {reached}, what is updated at {updated}")


def _check_random(states: _Random) -> None:
    """Whether generators would take these states; tried on some of their own."""
    for kind, take in (
        ("torch", lambda: torch.Generator().set_state(state_tensor(states.torch))),
        ("cuda", lambda: state_tensor(states.cuda or "")),
        ("numpy", lambda: np.random.RandomState().set_state(numpy_state(states.numpy))),
        ("python", lambda: random.Random().setstate(python_state(states.python))),
    ):
        try:
            take()
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"state.random.{kind}: no state of a generator: {str(error).splitlines()[0][:120]}"
            ) from None


# ---- random generators ----------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and torch's global generators, as JSON has it."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": _text_of(torch.get_rng_state()),
        **({"cuda": _text_of(torch.cuda.get_rng_state(device))} if device.type == "cuda" else {}),
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put the global generators where `random_states` found them; the device's only if it was of that kind then."""
    torch.set_rng_state(state_tensor(states["torch"]))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(state_tensor(states["cuda"]), device)
    np.random.set_state(numpy_state(states["numpy"]))
    random.setstate(python_state(states["python"]))


def _text_of(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def state_tensor(text: str) -> torch.Tensor:
    """Bytes in base64 as torch's generators have them.

    Raises:
        ValueError: it is no base64.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def numpy_state(saved: Any) -> Any:
    """What `numpy.random.set_state` takes."""
    name, keys, position, has_gauss, gauss = saved
    if name != "MT19937" or len(keys) != 624 or position > 624:
        raise ValueError(f"{name[:20]!r} with {len(keys)} numbers at {position}; it is 'MT19937' with 624")
    return name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss


def python_state(saved: Any) -> Any:
    """What `random.setstate` takes."""
    version, internal, gauss_next = saved
    return version, tuple(internal), gauss_next
