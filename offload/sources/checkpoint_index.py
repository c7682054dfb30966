"""A checkpoint's folder as Hugging Face lays it out: ``model.safetensors``, or shards and their index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from offload.sources.safetensors_file import FileTensor, json_of, read_header
from pagemem.errors import StorageError
from pagemem.folders.small_file import checked

WHOLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
_MAX_INDEX_BYTES: Final = 32 << 20
#: Files that hold pickled tensors: code that runs when it is read.
_PICKLES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt.index", "*.bin", "*.pt", "*.pth")
#: A file beside the index: no path.
_FileName = Annotated[str, Field(strict=True, max_length=255, pattern=r"^[^/\x00-\x1f\\]+\.safetensors$")]


class _Index(BaseModel):
    """What an index says; its metadata is anybody's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    weight_map: Annotated[dict[str, _FileName], Field(min_length=1)]


_INDEX: Final[TypeAdapter[_Index]] = TypeAdapter(_Index)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder by name, file by file in the order of their bytes."""

    folder: Path
    tensors: Mapping[str, FileTensor]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """What a folder holds; only headers are read.

    Raises:
        StorageError: (one line) it has no safetensors files, or they are damaged or not those of its index.
    """
    folder = Path(folder)
    if (folder / WHOLE_NAME).exists():
        return Checkpoint(folder, read_header(folder / WHOLE_NAME).tensors)
    if (folder / INDEX_NAME).exists():
        return Checkpoint(folder, _of_index(folder, json_of(folder / INDEX_NAME, _MAX_INDEX_BYTES)))
    raise StorageError(_nothing_in(folder))


def _of_index(folder: Path, value: Any) -> dict[str, FileTensor]:
    try:
        weight_map = checked(_INDEX, value).weight_map
    except ValueError as error:
        raise StorageError(f"{folder / INDEX_NAME}: {error}") from error
    found: dict[str, FileTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        held = read_header(folder / file_name).tensors.items()
        found |= {name: tensor for name, tensor in held if weight_map.get(name, file_name) == file_name}
    for name, file_name in weight_map.items():
        if name not in found:
            raise StorageError(f"{folder / INDEX_NAME} says that {name[:200]!r} is in {file_name}, which lacks it")
    return found


def _nothing_in(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; name the folder that holds {WHOLE_NAME}"
    pickle = next((path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))), None)
    if pickle is None:
        return f"{folder} has neither {WHOLE_NAME} nor {INDEX_NAME}"
    return (
        f"{folder} has {pickle} and no {WHOLE_NAME}; reading a pickle runs the code in it, so it is not read here. "
        "Convert it once, where you trust it: model.from_pretrained(folder).save_pretrained(new_folder)"
    )
