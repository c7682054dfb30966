"""What launch files name to train language models of transformers: `causal_lm` as model, `text` as data.

[model]
factory = "offload.integrations.recipes:causal_lm"
arguments = { folder = "checkpoints/llama", lora = { r = 16, target_modules = ["q_proj", "v_proj"] } }
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from offload.integrations.token_batches import TokenBatches
from offload.integrations.tokenized_text import load_tokens, tokenize


def causal_lm(
    folder: str, dtype: str = "auto", lora: Mapping[str, Any] | None = None, checkpointing: bool = False
) -> nn.Module:
    """A language model with the weights of a checkpoint, whose forward takes tokens and the ones after them, (B, T)
    each, and returns the mean loss in nats, as `offload launch` wants it. Names of parameters are transformers' own.

    Args:
        folder: of the checkpoint.
        dtype: "auto" is the checkpoint's, else "float32", "bfloat16" or "float16".
        lora: arguments of ``peft.LoraConfig``; the base is frozen then. None: all parameters are trained.
        checkpointing: compute activations again in the backward pass.

    Raises:
        ValueError, OSError: the folder holds no such checkpoint. ImportError: peft is missing.
    """
    model: Any
    _check_folder(folder, "config.json")
    if torch.get_default_device().type == "meta":  # asked for its sizes alone
        made = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_config(made, dtype=made.dtype if dtype == "auto" else dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is not None:
        model = _with_lora(model, dict(lora))
    model.train()
    return _as_trained(model)


def _check_folder(folder: str, name: str) -> None:
    """Say that a checkpoint is missing before transformers asks the network for it."""
    if not Path(folder, name).is_file():
        raise ValueError(f"{folder} is no folder of a checkpoint, it has no {name} (looked in {Path.cwd()})")


def _with_lora(model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    import peft

    adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **arguments))
    return adapted


def _as_trained(model: Any) -> nn.Module:
    """The model, with a forward of two tensors beside its own; its class keeps its name, for config.json."""
    own: Any = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 2 or kwargs:
            return own.forward(self, *args, **kwargs)
        tokens, following = args
        logits: Tensor = own.forward(self, input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    model.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": own.__module__})
    return model  # type: ignore[no-any-return]


def text(
    folder: Path,
    seed: int,
    files: Sequence[str],
    tokenizer: str,
    tokens: str | None = None,
    column: str = "text",
    validation_share: float = 0.02,
) -> TokenBatches:
    """Batches of local text, tokenised once.

    Args:
        folder, seed: the run's folder for data, and the configuration's seed.
        files: paths or patterns of .txt, .md, .jsonl or .parquet files (the last with pyarrow).
        tokenizer: folder with the files of one of transformers, which that of a checkpoint is.
        tokens: folder for the tokens, for several runs to share; new, or one that this has made. None: the run's own.
        column: of .jsonl and .parquet files, the one with the text.
        validation_share: of the tokens, those at the end.

    Raises:
        ValueError: the files or the tokenizer do not fit. StorageError: the folder cannot be used.
    """
    _check_folder(tokenizer, "tokenizer_config.json")
    made: Any = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    if made.eos_token_id is None:
        raise ValueError(f"the tokenizer in {tokenizer} has no end-of-text token, which is to follow each document")
    at = folder if tokens is None else Path(tokens)
    tokenize(
        files,
        at,
        lambda texts: made(texts, add_special_tokens=False, verbose=False)["input_ids"],
        identity=hashlib.sha256(made.backend_tokenizer.to_str().encode()).hexdigest() if made.is_fast else repr(made),
        n_vocabulary=len(made),
        end=made.eos_token_id,
        column=column,
    )
    return load_tokens(at, seed=seed, validation_share=validation_share)
