"""Checkpoints that transformers quantises while it loads them, or that hold quantised values, go to pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import adamw, adapted, trained
from tiny_checkpoint import make_checkpoint

import offload

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


def _nf4() -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("settings", [_nf4, _int8])
def test_they_train_as_in_plain_pytorch(settings: Callable[[], Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", torch.bfloat16, 64)
    auto: Any = transformers.AutoModelForCausalLM
    made = auto.from_pretrained(folder, quantization_config=settings(), device_map="cpu")
    made.save_pretrained(tmp_path / "quantised")

    def ready(model: Any) -> Any:
        model.requires_grad_(False)
        return adapted(model).train()

    plain = ready(made)
    expected = trained(plain, adamw(plain.parameters()))
    for name in ("deferred", "from_pretrained", "quantised"):
        config = {"memory": {"ram": "512KiB", "page": "64KiB"}, "ssd": {"paths": [str(tmp_path / f"{name} in pages")]}}
        if name == "deferred":
            with offload.deferred_init(config) as store:
                model = auto.from_pretrained(folder, quantization_config=settings(), device_map="cpu")
            assert all(isinstance(p, offload.PagedParameter) for _, p in _inside(model)), store
        elif name == "from_pretrained":
            model = offload.from_pretrained(folder, config, quantization_config=settings())
        else:
            model = offload.from_pretrained(tmp_path / "quantised", config)
        model, optimizer = offload.prepare(ready(model), adamw, config)
        assert trained(model, optimizer) == expected, name
        optimizer.engine.close()


def _inside(model: Any) -> list[tuple[str, Any]]:
    from offload.parameters.inner_tensors import all_parameters, is_wrapper

    return [(name, parameter) for name, parameter in all_parameters(model) if not is_wrapper(parameter)]


def test_llm_int8_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = make_checkpoint(tmp_path / "checkpoint", torch.bfloat16)
    config = {"memory": {"ram": "512KiB"}, "ssd": {"paths": [str(tmp_path / "pages")]}}
    asked = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(
        ValueError, match=r"LLM\.int8\(\), .*; quantise to 8 bits by torchao .* or to 4 bits"
    ) as refused:
        offload.from_pretrained(folder, config, quantization_config=asked)
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": asked.to_dict()}
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"LLM\.int8\(\)"):
        offload.from_pretrained(folder, config)
    assert "\n" not in str(refused.value) and not (tmp_path / "pages").exists()
