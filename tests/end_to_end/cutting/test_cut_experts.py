"""Weights of several experts are cut by expert: of transformers' models that compute with one expert at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity import adamw
from small_runs import PAGE_BYTES, assert_closed, assert_equal, config
from torch import Tensor, nn

import offload
from offload.cutting.cut_parameter import CutParameter

transformers = pytest.importorskip("transformers")

EXPERTS, WIDTH = 8, 64
RAM_BYTES = 10 * PAGE_BYTES


class Mixture(nn.Module):
    """A Mixtral with eight experts in each of two layers; the loss is its output."""

    def __init__(self, implementation: str = "eager") -> None:
        super().__init__()
        settings = transformers.MixtralConfig(
            vocab_size=128, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=2, max_position_embeddings=32,
            experts_implementation=implementation,
        )  # fmt: skip
        self.model = transformers.MixtralForCausalLM(settings)

    def forward(self, x: Tensor) -> Tensor:
        """The loss of tokens (rows, tokens), which are their own targets."""
        loss: Tensor = self.model(x, labels=x).loss
        return loss


def built(implementation: str = "eager") -> Mixture:
    """The model, always with the same weights."""
    torch.manual_seed(7)
    return Mixture(implementation)


def batches(count: int) -> list[Tensor]:
    """Few tokens, so that some experts get none."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 128, (1, 3), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("update", [{}, {"clip_norm": 0.1}])
def test_experts_in_slices_have_the_bits_of_plain_pytorch(update: dict[str, float], tmp_path: Path) -> None:
    plain, model = built(), built()
    optimizer = adamw(plain.parameters())
    with offload.initialize(model, config(tmp_path, ram=RAM_BYTES, **update), adamw) as engine:
        experts = model.model.model.layers[0].mlp.experts
        assert isinstance(experts.gate_up_proj, CutParameter) and len(experts.gate_up_proj.slices) > 1
        for x in batches(5):
            loss, expected = engine(x), plain(x)
            assert torch.equal(loss, expected)
            engine.backward(loss)
            expected.backward()
            if update:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), update["clip_norm"])
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(model, plain)
        mine, theirs = engine.optimizer.state_dict()["state"], optimizer.state_dict()["state"]
        for number, state in theirs.items():
            for name, value in state.items():
                assert torch.equal(mine[number][name], value), (number, name)
    assert_closed(engine)


def test_experts_that_are_multiplied_together_stay_whole(tmp_path: Path) -> None:
    smallest = [
        offload.smallest_budget(lambda name=name: built(name), adamw, config(tmp_path)).smallest_bytes  # type: ignore[misc]
        for name in ("eager", "grouped_mm")
    ]
    assert 2 * smallest[0] <= smallest[1]
