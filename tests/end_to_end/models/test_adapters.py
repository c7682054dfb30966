"""Adapters of peft over a paged frozen base, which may be quantised: the bits of plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import TOKENS, adamw, adapted, base_of, resumed, trained
from small_runs import assert_closed
from torch import Tensor

import offload

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture
def pages(tmp_path: Path) -> dict[str, Any]:
    """A configuration that holds about half of the base."""
    return {"memory": {"ram": "384KiB", "page": "64KiB"}, "ssd": {"paths": [str(tmp_path / "pages")]}}


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
    expected = trained(plain, resumed(plain, optimizer))
    trained(model, optimizer)
    assert engine.resume() is not None
    assert trained(model, optimizer) == expected
    engine.close()
    assert_closed(engine)


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
    expected = plain.merge_and_unload().state_dict()
    assert_equal(expected, model.merge_and_unload().state_dict())
    optimizer.engine.close()
    again = adapted(base_of(kind))
    again.load_state_dict(adapter, strict=False)
    assert_equal(expected, again.merge_and_unload().state_dict())


def test_a_quantised_parameter_is_not_trained(pages: dict[str, Any]) -> None:
    model = base_of("int8")
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"is quantised \(Int8Tensor\) and requires a gradient; freeze it"):
        offload.prepare(model, adamw, pages)


def test_an_export_has_no_config_that_names_another_model(pages: dict[str, Any], tmp_path: Path) -> None:
    """From a config.json beside weights of other names, from_pretrained would make a model with random values."""
    model, optimizer = offload.prepare(adapted(base_of("fp32")), adamw, pages)
    trained(model, optimizer, 1)
    found = optimizer.engine.export(tmp_path / "exported")
    assert sorted(path.name for path in found.iterdir()) == ["model.safetensors", "model.safetensors.index.json"]
    optimizer.engine.close()


def test_a_merge_in_mid_training_is_that_of_plain_pytorch(pages: dict[str, Any], tmp_path: Path) -> None:
    plain = adapted(base_of("fp32"))
    kept = adamw(plain.parameters())
    model, optimizer = offload.prepare(adapted(base_of("fp32")), adamw, pages)
    for one, its in ((plain, kept), (model, optimizer)):
        trained(one, its)
        one.merge_adapter()
        one.unmerge_adapter()
    assert trained(plain, kept) == trained(model, optimizer)
    assert_equal(plain.state_dict(), model.state_dict())
    merged = plain.merge_and_unload()
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert_equal(merged.state_dict(), again.state_dict())
    optimizer.engine.close()


OTHERS = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
    "ia3": ("IA3Config", {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds(kind: str, pages: dict[str, Any], tmp_path: Path) -> None:
    name, settings = OTHERS[kind]

    def made() -> Any:
        base = base_of("bf16")
        torch.manual_seed(1)
        return peft.get_peft_model(base, getattr(peft, name)(task_type="CAUSAL_LM", **settings))

    plain = made()
    model, optimizer = offload.prepare(made(), adamw, pages)
    assert trained(plain, adamw(plain.parameters())) == trained(model, optimizer)
    for saved, folder in ((plain, "plain"), (model, "paged")):
        saved.save_pretrained(tmp_path / folder)
    one, other = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("plain", "paged"))
    assert one == other
    optimizer.engine.close()


def test_several_adapters_and_none(pages: dict[str, Any]) -> None:
    """Switched in mid-training, and left out for the reference of a preference loss."""

    def made() -> Any:
        model = adapted(base_of("fp32"))
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        return model

    def run(model: Any, optimizer: Any) -> list[float]:
        found = []
        for name in ("default", "other", "default"):
            model.set_adapter(name)
            found += trained(model, optimizer, 2)
            with torch.no_grad(), model.disable_adapter():
                reference = model(input_ids=TOKENS).logits
            loss = (model(input_ids=TOKENS).logits - reference).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    def of_adapters(model: Any) -> Any:
        wanted = {id(p) for name, p in model.named_parameters() if "lora_" in name}
        return lambda given: torch.optim.AdamW([p for p in given if id(p) in wanted], lr=1e-2, fused=True)

    torch.manual_seed(2)
    plain = made()
    expected = run(plain, of_adapters(plain)(plain.parameters()))
    torch.manual_seed(2)
    model = made()
    model, optimizer = offload.prepare(model, of_adapters(model), pages)
    assert run(model, optimizer) == expected
    optimizer.engine.close()
