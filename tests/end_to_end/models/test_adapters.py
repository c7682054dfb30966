"""Adapters of peft over a paged frozen base, which may be quantised: the bits of plain PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import assert_closed
from torch import Tensor, nn

import offload

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would stay

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pages(tmp_path: Path) -> dict[str, Any]:
    """A configuration that holds about half of the base."""
    return {"memory": {"ram": "384KiB", "page": "64KiB"}, "ssd": {"paths": [str(tmp_path / "pages")]}}


def base_of(kind: str) -> nn.Module:
    """A frozen language model: "fp32", "bf16", "int8" (torchao), "nf4" or "nf4 nested" (bitsandbytes)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
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


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        found = other[name]
        assert type(found) is type(value), name
        if isinstance(value, Tensor):
            both = (value, found) if type(value) is Tensor else (value.dequantize(), found.dequantize())
            assert torch.equal(*both), name


KINDS = ["fp32", "bf16", "int8", "nf4", "nf4 nested"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, settings) for kind in KINDS for settings in ({}, {"use_dora": True})),
        ("fp32", {"modules_to_save": ["lm_head"]}),  # of 16 bits, plain PyTorch would round each update
    ],
    ids=str,
)
def test_adapters_over_a_paged_base(kind: str, settings: dict[str, Any], pages: dict[str, Any], tmp_path: Path) -> None:
    plain = adapted(base_of(kind), **settings)
    expected = trained(plain, adamw(plain.parameters()))
    model, optimizer = offload.prepare(adapted(base_of(kind), **settings), adamw, pages)
    engine = optimizer.engine
    assert trained(model, optimizer) == expected
    assert_equal(plain.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base_of(kind), tmp_path / "adapter")
    assert_equal(plain.state_dict(), again.state_dict())
    engine.save()
    expected = trained(plain, _resumed(plain, optimizer))
    trained(model, optimizer)
    assert engine.resume() is not None
    assert trained(model, optimizer) == expected
    engine.close()
    assert_closed(engine)


def _resumed(plain: nn.Module, paged: Any) -> torch.optim.Optimizer:
    made = adamw(plain.parameters())
    made.load_state_dict(copy.deepcopy(paged.state_dict()))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_added_after_prepare(kind: str, pages: dict[str, Any]) -> None:
    plain = adapted(base_of(kind))
    expected = trained(plain, adamw(plain.parameters()))
    base, optimizer = offload.prepare(base_of(kind), None, pages)
    model = adapted(base)
    assert trained(model, adamw(model.parameters())) == expected
    optimizer.engine.close()


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "nf4 nested"])  # of Int8Tensor peft cannot
def test_a_merged_model_is_that_of_plain_pytorch(kind: str, pages: dict[str, Any]) -> None:
    plain = adapted(base_of(kind))
    trained(plain, adamw(plain.parameters()))
    model, optimizer = offload.prepare(adapted(base_of(kind)), adamw, pages)
    trained(model, optimizer)
    adapter = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    optimizer.engine.close()
    again = adapted(base_of(kind))
    again.load_state_dict(adapter, strict=False)
    assert_equal(plain.merge_and_unload().state_dict(), again.merge_and_unload().state_dict())


def test_a_quantised_parameter_is_not_trained(pages: dict[str, Any]) -> None:
    model = base_of("int8")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"is quantised \(Int8Tensor\) and requires a gradient; freeze it"):
        offload.prepare(model, adamw, pages)
