"""Families of transformers' models beyond the list of test_pretrained_models.py, small and random: built plainly and
out of pages, they train to plain PyTorch's bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_references import check_mover
from parity import compare
from small_runs import assert_closed, config
from torch import Tensor, nn
from transformers_models import FAMILIES, LIST, Inputs, built, library

import offload

STEPS = 3


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Inputs) -> list[Tensor]:
    """Losses of a few steps, with dropout, and the loss in eval."""
    generator = torch.Generator().manual_seed(11)
    torch.manual_seed(13)
    found = []
    model.train()
    for _ in range(STEPS):
        loss = model(**inputs(generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs(generator))
    return [
        *found,
        outputs.loss,
        *(value for value in (outputs.get("logits"), outputs.get("logits_per_image")) if value is not None),
    ]


def equal_when_trained(name: str, how: str, folder: Path) -> str | None:
    """None, or what differs."""
    inputs = FAMILIES[name][3]
    plain = built(name)
    plain_optimizer = adamw(plain.parameters())
    settings = config(folder)
    if how == "deferred":
        with offload.deferred_init(settings):
            model = built(name)
    else:
        model = built(name)
    with offload.initialize(model, settings, adamw) as engine:
        expected, found = trained(plain, plain_optimizer, inputs), trained(model, engine.optimizer, inputs)
        if len(expected) != len(found) or not all(map(torch.equal, expected, found)):
            return (
                f"{name} {how}: losses {[float(loss) for loss in found[: STEPS + 1]]}, plain "
                f"{[float(loss) for loss in expected[: STEPS + 1]]}"
            )
        try:
            compare(plain, plain_optimizer, model, engine.optimizer, f"{name} {how}")
        except AssertionError as error:
            return str(error)
        check_mover(engine.debug.mover)
    assert_closed(engine)
    return None


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_family_trains_and_evaluates_to_plain_bits(tally: Callable[..., None], tmp_path: Path) -> None:
    different = []
    others = [name for name in FAMILIES if name not in LIST]
    for name in others:
        for how in ("plain", "deferred"):
            try:
                found = equal_when_trained(name, how, tmp_path / f"{name}_{how}")
            except (
                Exception
            ) as error:  # Counted, like any other way not to be plain's: the others are still to be tried.
                found = f"{name} {how}: {type(error).__name__}: {error}"
            if found is not None:
                different.append(found)
    tally(
        f"further families of transformers {library().__version__}, built plainly and out of pages, bit-equal after "
        f"{STEPS} steps and in eval",
        trials=2 * len(others),
        failures=len(different),
        detail="; ".join(different),
    )
    assert not different


@pytest.mark.parametrize("name", ["GPT-2", "Wav2Vec2", "CLIP"])
def test_what_was_refused(name: str, tmp_path: Path) -> None:
    """Tied weights that are drawn first, a parametrization, and a parameter without dimensions."""
    assert equal_when_trained(name, "deferred", tmp_path) is None
