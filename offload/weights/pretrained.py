"""Models of transformers whose weights go from their checkpoint to pages."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from offload.config_loading import ConfigLike
from offload.modules.checks import LLM_INT8_INSTEAD, check_values
from offload.parameters.paged_parameter import PagedParameter
from offload.sources.checkpoint_index import read_checkpoint
from offload.sources.safetensors_file import json_of
from offload.sources.transformers_files import check_loader
from offload.store.deferred_init import deferred_init
from offload.weights.matching import Match
from pagemem.process.interrupts import left_open

_OLDEST: Final = 5
_MAX_CONFIG_BYTES: Final = 16 << 20
#: What `transformers` would do with these needs memory beside the budget, or puts weights elsewhere.
_REFUSED: Final = {
    "device_map": "weights go to pages, and compute where config.device says",
    "state_dict": "give the folder that holds the weights",
    "gguf_file": "convert the file to safetensors first",
    "disable_mmap": "files are not mapped, nor read as a whole",
    "use_safetensors": "nothing else is read",
    "ignore_mismatched_sizes": "tensors of other shapes are an error",
    "output_loading_info": "what does not fit is an error",
}


@left_open
def from_pretrained(
    source: str | Path | type[nn.Module],
    config: ConfigLike,
    *,
    folder: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    strict: bool = True,
    model_config: Any = None,
    **options: Any,
) -> nn.Module:
    """A model of transformers with the weights of a checkpoint, in pages: parameters and buffers are bit for bit those
    of ``cls.from_pretrained(folder, dtype=dtype)``. Give it to `prepare` or `initialize` with the same configuration.

    Tensors that the checkpoint has in the dtype asked for stay where they are until they are changed: its files are to
    stay as they are as long as the engine, or a commit of it, is in use.

    Args:
        source: the checkpoint's folder, whose config.json names the class; or a model class, with ``folder``.
        dtype: of the parameters; None: as transformers has it, what config.json says.
        strict: whether it is an error if weights are missing or surplus; else they are initialised, or left out.
            Weights of another shape always are.
        model_config: transformers' configuration of the model; None: that of the folder.
        options: for transformers' ``from_pretrained``.

    Raises:
        ImportError: there is no transformers 5, or its loader is not known here.
        ValueError: the checkpoint does not fit the model, or pages cannot hold it; lists every tensor.
        StorageError: the folder has no safetensors files, or one is damaged.
        BudgetError, RunDirectoryError: as `deferred_init`. After any of these no file of ours is in use.
    """
    for name in _REFUSED.keys() & options.keys():
        raise ValueError(f"from_pretrained into pages takes no {name}: {_REFUSED[name]}")
    path = _folder_of(source, folder)
    weights = path / options.get("subfolder", "")
    transformers = _transformers()
    read_checkpoint(weights, options.get("variant"))
    model_class = _class_of(transformers, source, weights)
    if model_config is not None:
        options["config"] = model_config
    quantised = options.get("quantization_config") or _config_of(weights).get("quantization_config")
    if quantised is not None:
        _check_quantisation(quantised, path)
        options["device_map"] = "cpu"  # Else bitsandbytes would take the first GPU.
    return _loaded(model_class, path, config, strict=strict, options=options | {"dtype": dtype})


@left_open
def _loaded(
    model_class: Any, folder: Path, config: ConfigLike, *, strict: bool, options: Mapping[str, Any]
) -> nn.Module:
    store = None
    try:
        with deferred_init(config) as store:
            model, report = model_class.from_pretrained(
                str(folder), ignore_mismatched_sizes=True, output_loading_info=True, use_safetensors=True,
                local_files_only=True, **options,
            )  # fmt: skip
            _found(model, report).check(folder, type(model).__name__, strict=strict)
        return model  # type: ignore[no-any-return]
    except BaseException:  # Ctrl-C, too: nobody else could close it
        if store is not None:
            store.close()
        raise


def _check_quantisation(settings: Any, folder: Path) -> None:
    """Raise ValueError before anything is read for a kind of quantisation that no parameter in pages can have."""
    asked = settings if isinstance(settings, dict) else vars(settings)
    if asked.get("load_in_8bit") or asked.get("_load_in_8bit"):
        raise ValueError(f"{folder} is to be quantised by bitsandbytes' LLM.int8(), {LLM_INT8_INSTEAD}")


def _folder_of(source: str | Path | type[nn.Module], folder: str | Path | None) -> Path:
    if not isinstance(source, type):
        return Path(source if folder is None else folder)
    if folder is None:
        raise ValueError(f"which weights {source.__name__} is to have is not said; give folder, too")
    return Path(folder)


def _class_of(transformers: Any, source: str | Path | type[nn.Module], folder: Path) -> Any:
    """The class that was given, or that a checkpoint's config.json names."""
    if not isinstance(source, type):
        return _named_class(transformers, folder)
    auto: Any = importlib.import_module("transformers.models.auto.auto_factory")
    if not issubclass(source, (transformers.PreTrainedModel, auto._BaseAutoModelClass)):
        raise ValueError(
            f"{source.__name__} is no model class of transformers; build the model under offload.deferred_init and "
            "call offload.load_weights"
        )
    return source


def _transformers() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError("offload.from_pretrained needs transformers: pip install 'offload[hf]'") from error
    if int(transformers.__version__.partition(".")[0]) < _OLDEST:
        raise ImportError(
            f"offload.from_pretrained needs transformers {_OLDEST}, this is {transformers.__version__}: "
            "pip install --upgrade 'offload[hf]'"
        )
    importlib.import_module("transformers.modeling_utils")
    check_loader()
    return transformers


def _named_class(transformers: Any, folder: Path) -> Any:
    names = _config_of(folder).get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise ValueError(f"{folder / 'config.json'} names no architecture; give the model class, and folder={folder}")
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(model_class, type):
        raise ValueError(
            f"{folder / 'config.json'} names {name[:200]!r}, which transformers {transformers.__version__} does not "
            f"have; give the model class, and folder={folder}"
        )
    return model_class


def _config_of(folder: Path) -> dict[str, Any]:
    found = json_of(folder / "config.json", _MAX_CONFIG_BYTES)
    return found if isinstance(found, dict) else {}


def _found(model: nn.Module, report: Any) -> Match:
    """What transformers reports that does not fit, and what pages cannot hold."""
    found = Match(missing=sorted(report["missing_keys"]), surplus=sorted(report["unexpected_keys"]))
    for name, theirs, ours in sorted(report["mismatched_keys"]):
        found.misfits.append(f"{name} is {list(theirs)} in the file and {list(ours)} in the model")
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, PagedParameter):
            try:
                check_values(name, parameter, "cpu")
            except ValueError:
                found.misfits.append(f"{name} is {parameter.dtype}, which pages cannot hold")
    return found
