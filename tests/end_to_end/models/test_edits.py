"""Values put into paged parameters while an engine trains are there for good, wherever their pages and masters are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edits import EDITS
from faulty_disk import FaultyDisk
from parity import adamw, compare
from small_runs import assert_closed, built, config, engine_of, train, train_plain
from torch import nn

import offload


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "dtype",
    ["fp32", "bf16"],
)
def test_what_was_put_in_survives_updates_and_moves(
    dtype: str, edit: Callable[[nn.Module, float], None], tmp_path: Path
) -> None:
    made = config(tmp_path, start="step") | {"model": {"factory": "unused:unused", "dtype": dtype}}
    with offload.initialize(built(), made, lambda ps: torch.optim.SGD(ps, lr=0.0, fused=True)) as engine:
        edit(engine.model, 2.0)
        train(engine, 1)
        engine.drain()
        engine.debug.driver.evict_all()
        weight = engine.model.get_parameter("tok.weight")
        assert torch.equal(weight, torch.full_like(weight, 2.0))
    assert_closed(engine)


def test_an_edit_while_its_page_is_being_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FaultyDisk.install(monkeypatch)
    engine = engine_of(built(), tmp_path)
    weight, mover = engine.model.get_parameter("tok.weight"), engine.debug.mover
    try:
        weight.data.fill_(2.0)
        assert isinstance(weight, offload.PagedParameter)
        disk.gates["write"] = threading.Event()
        mover.start_store(weight._place.unit.parameters)
        weight.data.fill_(3.0)
        disk.gates["write"].set()
        with mover.changed:
            while mover.monitor.in_flight:
                mover.changed.wait(0.01)  # Not `settle`: the end of the copy might not be announced.
        engine.debug.driver.evict_all()
        assert torch.equal(weight, torch.full_like(weight, 3.0))
    finally:
        engine.close()
    assert_closed(engine)


def test_weights_taken_back_in_the_middle_of_training(tmp_path: Path) -> None:
    plain = built()
    optimizer = adamw(plain.parameters())
    with engine_of(built(), tmp_path) as engine:
        train(engine, 4)
        train_plain(plain, optimizer, 4)
        for model in (engine.model, plain):
            model.load_state_dict(built().state_dict())
        train(engine, 4)
        train_plain(plain, optimizer, 4)
        compare(plain, optimizer, engine.model, engine.optimizer, "with the old weights and the new states")
    assert_closed(engine)
