"""Checkpoints into parameters in slices: read where they lie (`offload.from_pretrained`, `offload.load_weights`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import adamw
from small_runs import PAGE_BYTES, assert_equal, config
from torch import Tensor, nn

import offload
from offload.cutting.cut_parameter import CutParameter

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm").tqdm.monitor_interval = 0  # its thread would stay

RAM_BYTES = 8 * PAGE_BYTES


def settings(*, tied: bool) -> Any:
    """A small Llama of 3001 words."""
    return transformers.LlamaConfig(
        vocab_size=3001, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=32, torch_dtype="float32",
    )  # fmt: skip


def saved(folder: Path, *, tied: bool) -> nn.Module:
    """A model whose checkpoint is in ``folder``."""
    torch.manual_seed(7)
    model: nn.Module = transformers.LlamaForCausalLM(settings(tied=tied))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def steps(model: Any, optimizer: Any, count: int = 3) -> list[Tensor]:
    """A few steps; returns the losses."""
    generator, losses = torch.Generator().manual_seed(11), []
    for _ in range(count):
        x = torch.randint(0, 3001, (2, 9), generator=generator)
        loss = model(x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("way", ["from_pretrained", "load_weights"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_goes_into_slices(way: str, tied: bool, tmp_path: Path) -> None:
    plain = saved(tmp_path / "checkpoint", tied=tied)
    these = config(tmp_path, ram=RAM_BYTES)
    if way == "from_pretrained":
        model = offload.from_pretrained(tmp_path / "checkpoint", these)
    else:
        with offload.deferred_init(these):
            model = transformers.LlamaForCausalLM(settings(tied=tied))
    model, optimizer = offload.prepare(model, adamw, these)
    if way == "load_weights":
        offload.load_weights(model, tmp_path / "checkpoint")
    head = model.lm_head.weight
    assert isinstance(head, CutParameter) and (head is model.model.embed_tokens.weight) is tied
    assert all(part._place.unit.parameters.origin is not None for part in head.slices)  # type: ignore[attr-defined]
    assert_equal(model, plain)
    expected = steps(plain, adamw(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(steps(model, optimizer), expected, strict=True))
    assert_equal(model, plain)
    optimizer.engine.close()
