"""fp16 with a dynamic loss scale equals the same arithmetic written out in plain PyTorch; overflowing steps are
dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import full_product
from tiny_models import CASES
from torch import nn

import offload

SCALE = 2.0**16


def settings(folder: Path, **update: Any) -> dict[str, Any]:
    return {
        "memory": {"ram": "8MiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 2},
        "update": update,
        "model": {"factory": "unused:unused", "dtype": "fp16"},
    }


def built() -> nn.Module:
    torch.manual_seed(7)
    return CASES["gpt"].build()


@full_product(accumulation=[1, 2], clip_norm=[None, 0.5], mode=["exact", "lock-free"])
def test_fp16_equals_plain_pytorch(mode: str, clip_norm: float | None, accumulation: int, tmp_path: Path) -> None:
    masters = [nn.Parameter(p.detach().clone()) for p in built().parameters()]
    plain = built().half()
    plain_optimizer = torch.optim.AdamW(masters, lr=1e-2, fused=True)
    config = settings(tmp_path, mode=mode, clip_norm=clip_norm, accumulation=accumulation, max_staleness=0)
    scale, generator = SCALE, torch.Generator().manual_seed(11)
    with offload.initialize(built(), config, lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True)) as engine:
        for step in range(5):
            for _ in range(accumulation):
                batch = CASES["gpt"].batch(generator)
                losses = [m(*batch) for m in (plain, engine.model)]
                assert torch.equal(*losses), f"step {step}"
                (losses[0] / accumulation * scale).backward()
                engine.backward(losses[1])
            grads = []
            for parameter in plain.parameters():
                assert parameter.grad is not None
                grads.append(parameter.grad.float())
                parameter.grad = None
            total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
            if torch.isfinite(total):
                inverse = 1 / scale
                clipped = 1.0 if clip_norm is None else torch.clamp(clip_norm / (total * inverse + 1e-6), max=1.0)
                for master, gradient in zip(masters, grads, strict=True):
                    master.grad = gradient.mul_(torch.as_tensor(clipped * inverse))
                plain_optimizer.step()
            else:
                scale /= 2
            assert engine.step()
            with torch.no_grad():
                for master, parameter in zip(masters, plain.parameters(), strict=True):
                    parameter.copy_(master)
            assert engine.loss_scale is not None and engine.loss_scale.scale == scale
        ours = engine.model.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("mode", ["exact", "lock-free"])
def test_an_overflowing_step_changes_nothing_but_the_scale(mode: str, tmp_path: Path) -> None:
    config = settings(tmp_path, mode=mode, max_staleness=0)
    generator = torch.Generator().manual_seed(11)
    with offload.initialize(built(), config) as engine:
        for _ in range(3):
            engine.backward(engine(*CASES["gpt"].batch(generator)))
            engine.step()
        before, scale = engine.model.state_dict(), engine.loss_scale
        assert scale is not None
        was, dropped = scale.scale, scale.dropped_steps
        # Finite as a loss, infinite in fp16 gradients.
        engine.backward(engine(*CASES["gpt"].batch(generator)).float() * 1e6)
        engine.step()
        assert (scale.scale, scale.dropped_steps) == (was / 2, dropped + 1)
        after = engine.model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        engine.backward(engine(*CASES["gpt"].batch(generator)))
        engine.step()
        assert not all(torch.equal(before[n], v) for n, v in engine.model.state_dict().items())


def test_the_scale_is_part_of_a_commit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(11)
    with offload.initialize(built(), settings(tmp_path)) as engine:
        engine.backward(engine(*CASES["gpt"].batch(generator)).float() * 1e6)
        engine.step()
        assert engine.loss_scale is not None and engine.loss_scale.scale == SCALE / 2
        engine.save()
    with offload.initialize(built(), settings(tmp_path)) as engine:
        assert engine.loss_scale is not None and engine.loss_scale.scale == SCALE
        resumed = engine.resume()
        assert resumed is not None and resumed.step == 1
        assert engine.loss_scale.scale == SCALE / 2
