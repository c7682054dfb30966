"""What launch files name to train language models of transformers: `causal_lm` as model, `text` as data, and
`AdapterFiles` as callback.

[model]
factory = "offload.integrations.recipes:causal_lm"
arguments = { folder = "checkpoints/llama", lora = { r = 16, target_modules = ["q_proj", "v_proj"] } }

[output]
callbacks = ["offload.integrations.recipes:AdapterFiles"]
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from offload.callbacks import Callback, RunEnded, RunStarted
from offload.integrations.token_batches import TokenBatches
from offload.integrations.tokenized_text import load_tokens, tokenize
from offload.parameters.module_watch import unwatched

#: How the base of adapters is quantised: as QLoRA does, https://arxiv.org/abs/2305.14314.
_FOUR_BIT: Final = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def causal_lm(
    folder: str,
    dtype: str = "auto",
    lora: Mapping[str, Any] | None = None,
    checkpointing: bool = False,
    four_bit: bool = False,
) -> nn.Module:
    """A language model with the weights of a checkpoint, whose forward takes tokens and the ones after them, (B, T)
    each, and returns the mean loss in nats, as `offload launch` wants it. Names of parameters are transformers' own.

    Args:
        folder: of the checkpoint.
        dtype: "auto" is the checkpoint's, else "float32", "bfloat16" or "float16".
        lora: arguments of ``peft.LoraConfig``; the base is frozen then. None: all parameters are trained.
        checkpointing: compute activations again in the backward pass.
        four_bit: have bitsandbytes quantise the base to 4 bits, while it is read; for ``lora``.

    Raises:
        ValueError, OSError: the folder holds no such checkpoint. ImportError: peft or bitsandbytes is missing.
    """
    if four_bit and lora is None:
        raise ValueError("four_bit: what is quantised is not trained; give lora, too")
    auto: Any = transformers.AutoModelForCausalLM
    model: Any
    _check_folder(folder, "config.json")
    if torch.get_default_device().type == "meta":  # asked for its sizes alone
        made = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        model = auto.from_config(made, dtype=made.dtype if dtype == "auto" else dtype)
        if four_bit:
            with unwatched():
                _quantise_on_meta(model)
    else:
        options = {"quantization_config": _four_bit_settings(), "device_map": "cpu"} if four_bit else {}
        model = auto.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
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


def _four_bit_settings() -> Any:
    made: Any = transformers.BitsAndBytesConfig
    return made(**_FOUR_BIT)


def _quantise_on_meta(model: nn.Module) -> None:
    """What transformers' loader does with ``_FOUR_BIT``, of shapes alone."""
    from transformers.quantizers.auto import AutoHfQuantizer

    bitsandbytes: Any = importlib.import_module("bitsandbytes")

    quantizer: Any = AutoHfQuantizer.from_config(_four_bit_settings(), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    make_state: Any = bitsandbytes.functional.QuantState
    for module in model.modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        weight: Any = module.weight
        n_blocks = -(-weight.numel() // weight.blocksize)
        nested = make_state(torch.empty(-(-n_blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        weight.quant_state = make_state(
            torch.empty(n_blocks, dtype=torch.uint8), weight.shape, torch.empty(16), weight.blocksize,
            weight.quant_type, weight.dtype, torch.empty(()), nested,
        )  # fmt: skip
        weight.data = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
        weight.bnb_quantized = True
    quantizer.postprocess_model(model)


class AdapterFiles(Callback):
    """Saves the adapter in the run's folder when the run ends, without an error: ``adapter/`` there, as peft loads it
    (``peft.PeftModel.from_pretrained(base, folder)``)."""

    def on_start(self, run: RunStarted) -> None:
        """Check that there is an adapter.

        Raises:
            ValueError: there is none.
        """
        import peft

        if not isinstance(run.model, peft.PeftModel):
            raise ValueError(f"{type(run.model).__name__} has no adapter to save; leave AdapterFiles out")
        self._model: Any = run.model
        self._folder = run.folder / "adapter"

    def on_end(self, end: RunEnded) -> None:
        """Save it."""
        if end.error is None:
            save_adapter(self._model, self._folder)


def save_adapter(model: Any, folder: Path) -> None:
    """What ``model.save_pretrained(folder)`` of peft saves, without reading or copying the frozen base.

    Args:
        model: a ``peft.PeftModel``, in pages or not.
    """
    trained = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    }
    model.save_pretrained(folder, state_dict=trained)


def _with_lora(model: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    import peft

    settings = peft.LoraConfig(task_type="CAUSAL_LM", **arguments)
    with unwatched():
        adapted: nn.Module = peft.get_peft_model(model, settings)
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
