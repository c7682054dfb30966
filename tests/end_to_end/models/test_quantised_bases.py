"""Quantised parameters in pages: every way to use, write, copy, convert and load them has the bits of plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import TOKENS, adamw, adapted, base_of, resumed, trained
from torch import Tensor, nn

import offload

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

KINDS = ["int8", "nf4", "nf4 nested"]


@pytest.fixture
def pages(tmp_path: Path) -> dict[str, Any]:
    return {"memory": {"ram": "256KiB", "page": "64KiB"}, "ssd": {"paths": [str(tmp_path / "pages")]}}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def one_of(model: Any) -> Any:
    """A quantised parameter."""
    return model.model.layers[1].self_attn.o_proj.weight


def scale_of(weight: Any) -> Any:
    return weight.scale if hasattr(weight, "scale") else (weight.quant_state.state2 or weight.quant_state).absmax


def values_of(weight: Any) -> Any:
    return weight.qdata if hasattr(weight, "qdata") else weight


@pytest.mark.parametrize("kind", KINDS)
def test_bases_larger_than_ram_and_on_a_device(kind: str, pages: dict[str, Any]) -> None:
    plain = adapted(base_of(kind, layers=6))
    expected = trained(plain, adamw(plain.parameters()), 1)
    for memory in ({}, {"device": "384KiB", "ram": "1MiB"}):
        on_device: dict[str, Any] = {"device": "cpu-emulated"} if memory else {}
        config = {**pages, **on_device, "memory": {**pages["memory"], "ram": "320KiB", **memory}}
        model, optimizer = offload.prepare(adapted(base_of(kind, layers=6)), adamw, config)
        assert trained(model, optimizer, 1) == expected
        optimizer.engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_generation_change_nothing(kind: str, pages: dict[str, Any]) -> None:
    plain = adapted(base_of(kind))
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True  # type: ignore[assignment]  # as where it repacks
    model, optimizer = offload.prepare(copy.deepcopy(plain), adamw, pages)
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    assert trained(model, optimizer, 1) == trained(plain, adamw(plain.parameters()), 1)
    for one in (plain, model):
        one.eval()
    assert torch.equal(logits(plain), logits(model))
    words = [one.generate(TOKENS[:1], max_new_tokens=4, do_sample=False) for one in (plain, model)]
    assert torch.equal(*words)
    for one in (plain, model):
        one.train()
    assert trained(model, optimizer, 1) == trained(plain, resumed(plain, optimizer), 1)
    optimizer.engine.close()


WRITES: dict[str, Callable[[Any], Any]] = {
    "values": lambda weight: values_of(weight).data.zero_(),
    "scale": lambda weight: scale_of(weight).mul_(2),
    "through a view": lambda weight: scale_of(weight).detach()[:1].fill_(3),
    "through a wrapper's view": lambda weight: values_of(weight.detach()).fill_(1),
    "copy_": lambda weight: weight.copy_(weight.detach().clone()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_stays(kind: str, pages: dict[str, Any]) -> None:
    plain = base_of(kind)
    model, optimizer = offload.prepare(base_of(kind), None, pages)
    for name, write in WRITES.items():
        with torch.no_grad():
            write(one_of(plain))
            write(one_of(model))
        logits(model)  # pages come and go
        assert torch.equal(logits(plain), logits(model)), name
    optimizer.engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_conversions(kind: str, pages: dict[str, Any]) -> None:
    plain = base_of(kind)
    model, optimizer = offload.prepare(base_of(kind), None, pages)
    weight, expected = one_of(model), one_of(plain)
    assert type(weight).__name__ == type(expected).__name__
    model.to("cpu")
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="Nothing was converted"):
        model.half()
    assert torch.equal(logits(plain), logits(model))
    for made in (copy.deepcopy(weight), weight.clone(), weight.detach().clone()):
        assert torch.equal(values_of(made), values_of(expected))
    with offload.gathered(model):
        assert torch.equal(logits(plain), logits(model))
    copied = copy.deepcopy(model)
    optimizer.engine.close()
    assert type(one_of(copied)) is type(expected)
    assert torch.equal(logits(plain), logits(copied))
    again, optimizer = offload.prepare(copied, None, pages)
    assert torch.equal(logits(plain), logits(again))
    optimizer.engine.close()


def test_int8_loads_a_state_dict(pages: dict[str, Any]) -> None:
    plain = base_of("int8")
    model, optimizer = offload.prepare(base_of("int8"), None, pages)
    other = plain.state_dict()
    with torch.no_grad():
        for value in other.values():
            if hasattr(value, "scale"):
                value.scale.mul_(2)
    model.load_state_dict(other)
    assert torch.equal(logits(plain), logits(model))
    optimizer.engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_cannot_be_prepared_is_as_it_was(kind: str, pages: dict[str, Any]) -> None:
    model = base_of(kind)
    before = {name: type(parameter).__name__ for name, parameter in model.named_parameters()}
    flags = [vars(module).get("support_avx512bf16_for_cpu") for module in model.modules()]
    with pytest.raises(offload.OffloadError):
        offload.prepare(model, None, {**pages, "ssd": {"paths": ["/proc/none"]}})
    assert {name: type(parameter).__name__ for name, parameter in model.named_parameters()} == before
    assert [vars(module).get("support_avx512bf16_for_cpu") for module in model.modules()] == flags
    assert torch.equal(logits(base_of(kind)), logits(model))


def _tied(kind: str) -> Any:
    model: Any = base_of(kind)
    first, second = (layer.self_attn.k_proj for layer in model.model.layers)
    second.weight = first.weight
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return model


def _shared(kind: str) -> Any:
    model: Any = base_of(kind)
    (first, second), (third, fourth) = (
        (layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight) for layer in model.model.layers
    )
    third.quant_state = first.quant_state
    fourth.quant_state.absmax = second.quant_state.absmax
    return model


@pytest.mark.parametrize(
    ("make", "kind"), [*((_tied, kind) for kind in KINDS), (_shared, "nf4"), (_shared, "nf4 nested")]
)
def test_tied_and_shared(make: Callable[[str], Any], kind: str, pages: dict[str, Any]) -> None:
    model, optimizer = offload.prepare(make(kind), None, pages)
    assert torch.equal(logits(make(kind)), logits(model))
    optimizer.engine.close()


def test_repacked_weights_are_refused(pages: dict[str, Any]) -> None:
    model = base_of("nf4")
    one_of(model).quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="has been repacked by bitsandbytes for evaluation"):
        offload.prepare(model, None, pages)


def test_a_bias_in_pages_beside_quantised_values(pages: dict[str, Any]) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(64, 64).bfloat16())
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
        return layer.requires_grad_(False)

    inputs = torch.randn(4, 64, dtype=torch.bfloat16)
    model, optimizer = offload.prepare(build(), None, pages)
    assert torch.equal(build()(inputs), model(inputs))
    optimizer.engine.close()


def test_a_base_of_llm_int8_is_refused(pages: dict[str, Any]) -> None:
    layers = pytest.importorskip("bitsandbytes").nn
    linear = layers.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    linear.weight = layers.Int8Params(torch.ones(64, 64), requires_grad=False, has_fp16_weights=False)
    with pytest.raises(ValueError, match=r"^0\.weight is quantised by bitsandbytes' LLM\.int8\(\), .* by torchao"):
        offload.prepare(nn.Sequential(linear.to("cpu"), nn.Linear(64, 64)), adamw, pages)
