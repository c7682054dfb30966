"""LR schedulers and other tracked things over a paged optimizer: committed, resumed and gone on as in plain PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from committed_runs import RANDOM, SMALL, Run
from parity import adamw
from torch.optim import Optimizer, lr_scheduler
from xxhash import xxh3_128_hexdigest

import offload
from pagemem.durable.manifest import FORMAT

Maker = Callable[[Optimizer], Any]

SCHEDULERS: dict[str, Maker] = {
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.95),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
}


def learning_rates(optimizer: Optimizer, schedule: Any, first: int, last: int) -> list[list[float]]:
    """Steps of the schedule alone; what follows from each."""
    found = []
    for step in range(first, last):
        schedule.step(1.0 + step % 3) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()
        found.append(
            [group["lr"] for group in optimizer.param_groups] + [group["betas"][0] for group in optimizer.param_groups]
        )
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.filterwarnings("ignore:To get the last learning rate")
def test_a_scheduler_goes_on_as_it_would_have_in_plain_pytorch(name: str, tmp_path: Path) -> None:
    make = SCHEDULERS[name]
    plain = adamw(RANDOM.build().parameters())
    expected = learning_rates(plain, make(plain), 0, 12)
    states = []
    for first, last in ((0, 4), (4, 12)):
        _, optimizer = offload.prepare(RANDOM.build(), adamw, SMALL.config(tmp_path))
        schedule = make(optimizer)
        optimizer.engine.track("schedule", schedule)
        resumed = optimizer.engine.resume()
        assert (resumed is None) == (first == 0)
        if resumed is not None:
            assert resumed.changed == ()
            assert_alike(schedule.state_dict(), states[-1])
        assert learning_rates(optimizer, schedule, first, last) == expected[first:last]
        states.append(schedule.state_dict())
        optimizer.engine.save()
        optimizer.engine.close()


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, with equal types of the values."""
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


class Kept:
    """Anything with a state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_what_json_does_not_know_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {
        1: "a",
        "milestones": Counter({2: 1}),
        "best": float("inf"),
        "at": (1, 2),
        "seen": {3},
        "t": torch.ones(2, dtype=torch.bfloat16),
    }
    with Run(SMALL, tmp_path) as run:
        run.engine.track("kept", Kept(state))
        run.train(1)
        run.engine.save()
    with Run(SMALL, tmp_path) as run:
        kept = Kept({})
        run.engine.track("kept", kept)
        assert run.engine.resume() is not None
        assert torch.equal(kept.state.pop("t"), state.pop("t"))
        assert kept.state == state and type(kept.state["milestones"]) is Counter and type(kept.state["at"]) is tuple


def test_a_commit_of_before_states_had_types_is_read_as_plain_json(tmp_path: Path) -> None:
    """Such a manifest has neither ``encoding`` nor ``given``; what looks like a tag in it is none."""
    with Run(SMALL, tmp_path) as run:
        run.engine.track("kept", Kept({"x": [1, 2]}))
        run.train(2)
        run.engine.save()
        expected = run.schedule.state_dict()
    [path] = (tmp_path / "pages" / "commits").glob("*.json")
    found = json.loads(path.read_bytes().partition(b"\n")[2])
    del found["state"]["encoding"], found["state"]["given"]
    found["state"]["groups"] = [
        {k: v["v"] if isinstance(v, dict) else v for k, v in group.items()} for group in found["state"]["groups"]
    ]
    found["state"]["tracked"]["kept"] = {"$type": "tuple", "v": [1, 2]}
    body = json.dumps(found).encode()
    path.write_bytes(f"{FORMAT} {len(body)} {xxh3_128_hexdigest(body)}\n".encode() + body)
    with Run(SMALL, tmp_path) as run:
        kept = Kept()
        run.engine.track("kept", kept)
        resumed = run.engine.resume()
        assert resumed is not None and resumed.step == 2 and resumed.changed == ()
        assert kept.state == {"$type": "tuple", "v": [1, 2]} and run.schedule.state_dict() == expected
        assert [group["betas"] for group in run.optimizer.param_groups] == [(0.9, 0.95)] * len(
            run.optimizer.param_groups
        )


def test_a_resume_says_what_is_set_otherwise_and_the_commits_hyper_parameters_hold(tmp_path: Path) -> None:
    def slower(parameters: Any) -> Optimizer:
        made = adamw(parameters)
        for group in made.param_groups:
            group["lr"] = 1e-4
        return made

    config = SMALL.config(tmp_path)
    _, optimizer = offload.prepare(RANDOM.build(), adamw, config)
    rate = optimizer.param_groups[0]["lr"]
    optimizer.engine.save()
    optimizer.engine.close()
    for _ in range(2):  # also a second time: what holds is still the first run's
        _, optimizer = offload.prepare(RANDOM.build(), slower, {**config, "seed": 5})
        resumed = optimizer.engine.resume()
        assert resumed is not None
        assert [str(change).split(";")[0] for change in resumed.changed if change.key != "seed"] == [
            f"optimizer.lr: {rate} -> 0.0001"
        ]
        assert [group["lr"] for group in optimizer.param_groups] == [rate] * len(optimizer.param_groups)
        optimizer.engine.save()
        optimizer.engine.close()
    assert "seed" not in {change.key for change in resumed.changed}
