"""Small language models, some of them quantised, and their training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would stay

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


def base_of(kind: str, layers: int = 2) -> nn.Module:
    """A frozen language model: "fp32", "bf16", "int8" (torchao), "nf4" or "nf4 nested" (bitsandbytes)."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4
    )
    model: Any = transformers.LlamaForCausalLM(config)
    if kind != "fp32":
        model = model.to(torch.bfloat16)
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    if kind.startswith("nf4"):
        _in_4_bits(model.model, nested="nested" in kind)
        model.is_loaded_in_4bit = True  # as transformers sets it
    model.requires_grad_(False)
    return model  # type: ignore[no-any-return]


def _in_4_bits(model: nn.Module, *, nested: bool) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    for module in list(model.modules()):
        for key, linear in list(module.named_children()):
            if isinstance(linear, nn.Linear):
                settings = {"quant_type": "nf4", "compress_statistics": nested}
                packed = layers.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, **settings
                )
                packed.weight = layers.Params4bit(linear.weight.data, requires_grad=False, **settings)
                setattr(module, key, packed.to("cpu"))


def adapted(base: nn.Module, **settings: Any) -> Any:
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2, fused=True)


def trained(model: Any, optimizer: Any, steps: int = 3) -> list[float]:
    """Losses of a plain loop."""
    found = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def resumed(plain: nn.Module, paged: Any) -> torch.optim.Optimizer:
    made = adamw(plain.parameters())
    made.load_state_dict(copy.deepcopy(paged.state_dict()))
    return made
