"""What belongs beside a model's weights so that others can load them: its configuration and its tokenizer's files, of
models that have them, as those of transformers do."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from offload.checkpoint.commit_weights import DTYPES

#: Files of tokenizers and processors in a checkpoint's folder.
TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def write_model_files(model: nn.Module, folder: Path, dtype: str) -> None:
    """Write config.json and generation_config.json of a model that has them, and copy the tokenizer's files from the
    folder that it was loaded from, into ``folder``. Other models: nothing; nor those with adapters of peft, whose
    weights have other names than the model that config.json would have `from_pretrained` make.

    Args:
        dtype: of the weights beside them, as `Engine.export` names it.

    Raises:
        OSError: a file cannot be read or written.
    """
    config: Any = getattr(model, "config", None)
    has_adapters = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    if not hasattr(config, "save_pretrained") or has_adapters:
        return
    saved_dtype = DTYPES[dtype] or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    _as_saved(config, type(model).__name__, saved_dtype).save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "save_pretrained"):
        generation.save_pretrained(folder)
    for source in _tokenizer_files(config):
        shutil.copyfile(source, folder / source.name)


def _as_saved(config: Any, architecture: str, dtype: torch.dtype) -> Any:
    """A copy of the configuration that says what is saved."""
    saved = copy.deepcopy(config)
    saved.architectures, saved.dtype = [architecture], str(dtype).removeprefix("torch.")
    return saved


def _tokenizer_files(config: Any) -> Iterator[Path]:
    loaded_from = getattr(config, "_name_or_path", "") or getattr(config, "name_or_path", "")
    if loaded_from and Path(loaded_from).is_dir():
        yield from (path for name in TOKENIZER_FILES if (path := Path(loaded_from) / name).is_file())
