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
#: What makes a folder an adapter of peft.
ADAPTER_NAME: Final = "adapter_config.json"
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


def read_checkpoint(folder: str | Path, variant: str | None = None) -> Checkpoint:
    """What a folder holds; only headers are read.

    Args:
        variant: of the files' names, as transformers has it: ``model.fp16.safetensors``.

    Raises:
        StorageError: (one line) it has no safetensors files, or they are damaged or not those of its index.
    """
    folder = Path(folder)
    whole, index = folder / _named(WHOLE_NAME, variant), folder / _named(INDEX_NAME, variant)
    if whole.exists():
        return Checkpoint(folder, read_header(whole).tensors)
    if index.exists():
        return Checkpoint(folder, _of_index(index, json_of(index, _MAX_INDEX_BYTES)))
    raise StorageError(_nothing_in(folder, whole.name, index.name))


def _named(name: str, variant: str | None) -> str:
    stem, _, end = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{end}"


def _of_index(index: Path, value: Any) -> dict[str, FileTensor]:
    try:
        weight_map = checked(_INDEX, value).weight_map
    except ValueError as error:
        raise StorageError(f"{index}: {error}") from error
    found: dict[str, FileTensor] = {}
    places: dict[str, str] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, tensor in read_header(index.parent / file_name).tensors.items():
            if name in places:
                raise StorageError(
                    f"{index.parent} has {name[:200]!r} twice, in {places[name]} and in {file_name}; which one is "
                    "meant cannot be known: remove one"
                )
            found[name], places[name] = tensor, file_name
    for name, file_name in weight_map.items():
        if places.get(name) != file_name:
            raise StorageError(f"{index} says that {name[:200]!r} is in {file_name}, which lacks it")
    return found


def _nothing_in(folder: Path, whole: str, index: str) -> str:
    if not folder.is_dir():
        return (
            f"{folder} is not a folder; name the folder that holds {whole} (of a model of the hub, what "
            "huggingface_hub.snapshot_download(name) returns)"
        )
    if (folder / ADAPTER_NAME).exists():
        return (
            f"{folder} has {ADAPTER_NAME} and no {whole}: it is an adapter; load the base model that this file names, "
            f"then peft.PeftModel.from_pretrained(base, {str(folder)!r})"
        )
    pickle = next((path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))), None)
    if pickle is not None:
        return pickle_refused(folder, pickle)
    gguf = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    if gguf is not None:
        return (
            f"{folder} has {gguf} and no {whole}; convert it once, in plain transformers: "
            f"model.from_pretrained(folder, gguf_file={gguf!r}).save_pretrained(new_folder)"
        )
    return f"{folder} has neither {whole} nor {index}"


def pickle_refused(folder: Path, name: str) -> str:
    """What to say of a checkpoint that is a pickle."""
    return (
        f"{folder} has {name} and no {WHOLE_NAME}; reading a pickle runs the code in it, so it is not read here. "
        "Convert it once, where you trust it: model.from_pretrained(folder).save_pretrained(new_folder)"
    )
