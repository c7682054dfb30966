"""Engines that share a model: the bits of one process that accumulates all ranks' micro-batches, for every degree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import config_of, gather_values, on_engines, trained_on_ranks, trained_plainly
from tied_model import ADAMW, TiedModel, loss_of, steps_of, tied_model
from torch import Tensor

import offload

DEGREES = ("none", "states", "gradients", "all")


Train = Callable[..., list[list[Tensor]]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train with ``degree`` on so many ranks; returns each rank's parameters."""

    def run(
        n_ranks: int, batches: list[list[Tensor]], degree: str, ram: str = "16MiB", *, dtype: str = "fp32",
        degree_of: dict[str, str] | None = None, **update: Any,
    ) -> Any:  # fmt: skip
        built, folder = tied_model(), tmp_path / f"{degree}-{len(list(tmp_path.iterdir()))}"
        sections: Any = {"parallel": {"degree": degree, "degree_of": degree_of or {}}, "update": update}
        sections["model"] = {"dtype": dtype}
        configs = [config_of(folder, ram, **sections) for rank in range(n_ranks)]
        models = [copy.deepcopy(built) for _ in range(n_ranks)]
        return trained_on_ranks(models, ADAMW, batches, loss_of, monkeypatch, configs)

    return run


def equal(found: list[list[Tensor]], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for rank in found for a, b in zip(rank, wanted, strict=True))


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
@pytest.mark.parametrize("degree", DEGREES)
def test_one_micro_batch_a_rank_has_the_bits_of_one_process_that_accumulates(
    n_ranks: int, degree: str, train: Train
) -> None:
    batches = steps_of(6, n_ranks)
    assert equal(train(n_ranks, batches, degree), trained_plainly(tied_model(), ADAMW, batches, loss_of))


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("ram", ["768KiB", "1MiB"])
def test_bits_are_the_same_where_pages_come_and_go(degree: str, ram: str, train: Train) -> None:
    batches = steps_of(8, 2)
    assert equal(train(2, batches, degree, ram), trained_plainly(tied_model(), ADAMW, batches, loss_of))


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_accumulation_gives_the_same_bits_for_every_degree(n_ranks: int, train: Train) -> None:
    batches = steps_of(4, 3 * n_ranks)
    first, *others = (train(n_ranks, batches, degree, accumulation=3) for degree in DEGREES)
    assert all(equal(other, first[0]) for other in (first, *others))


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("ram", ["768KiB", "16MiB"])
def test_clipping_by_blocks_gives_the_bits_of_one_process(degree: str, ram: str, train: Train, tmp_path: Path) -> None:
    batches = steps_of(5, 3)
    one = config_of(tmp_path / "one", "16MiB", update={"clip_norm": 0.05, "norm": "blocks", "accumulation": 3})
    with offload.Engine(tied_model(), one, ADAMW) as engine:
        for step in batches:
            for batch in step:
                engine.backward(loss_of(engine.model, batch))
            assert engine.step()
        wanted = gather_values(engine.model)
    assert equal(train(3, batches, degree, ram, clip_norm=0.05), wanted)


@pytest.mark.parametrize("start", ["auto", "step"])
def test_updates_at_the_steps_end_and_patterns_of_degrees(start: str, train: Train) -> None:
    batches = steps_of(5, 2)
    found = train(2, batches, "all", "1MiB", start=start, degree_of={"*.1.*": "none", "blocks.2*": "states"})
    assert equal(found, trained_plainly(tied_model(), ADAMW, batches, loss_of))


@pytest.mark.parametrize("degree", ["states", "all"])
def test_parameters_in_16_bits_are_equal_on_all_ranks_and_for_all_degrees(degree: str, train: Train) -> None:
    batches = steps_of(5, 2)
    first, second = train(2, batches, degree, "1MiB", dtype="bf16")
    assert equal([second], first) and equal(train(2, batches, "none", "16MiB", dtype="bf16"), first)


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[offload.Engine, int], None]) -> list[str]:
    """What the engines of two ranks raise in the second step, in which ``act`` is called after backward."""
    models, batches = [tied_model(), tied_model()], steps_of(2, 2)

    def body(rank: int) -> str:
        with offload.Engine(models[rank], config_of(tmp_path, "16MiB"), ADAMW) as engine:
            engine.backward(loss_of(engine.model, batches[0][rank]))
            assert engine.step()
            with pytest.raises((RuntimeError, offload.OffloadError)) as raised:
                act(engine, rank)
            return str(raised.value)

    return on_engines(2, monkeypatch, body)


def test_what_is_written_to_a_parameter_of_which_ranks_have_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def directly(engine: offload.Engine, rank: int) -> None:
        with torch.no_grad():
            engine.model.embed.weight.mul_(2)

    def through_a_view(engine: offload.Engine, rank: int) -> None:
        engine.model.embed.weight.data.mul_(2)
        engine.model(steps_of(1, 1)[0][0])

    for number, act in enumerate((directly, through_a_view)):
        for said in refused(tmp_path / str(number), monkeypatch, act):
            assert "what was written is lost" in said


def test_a_gradient_cannot_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(engine: offload.Engine, rank: int) -> None:
        engine.backward(loss_of(engine.model, steps_of(1, 1)[0][0]))
        engine.model.embed.weight.grad.abs()

    assert all("neither read nor changed" in said for said in refused(tmp_path, monkeypatch, act))


def test_a_loss_that_is_no_number_on_one_rank_is_refused_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(engine: offload.Engine, rank: int) -> None:
        loss = loss_of(engine.model, steps_of(1, 1)[0][0])
        engine.backward(loss * float("nan") if rank else loss)

    assert all("on rank 1 is nan" in said for said in refused(tmp_path, monkeypatch, act))


def test_a_gradient_that_one_rank_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(engine: offload.Engine, rank: int) -> None:
        if rank:
            engine.model.blocks[1][1].bias.requires_grad_(False)
        engine.backward(loss_of(engine.model, steps_of(1, 1)[0][0]))
        engine.step()

    for said in refused(tmp_path, monkeypatch, act):
        assert "all ranks must do the same ops" in said or "have not the same gradients" in said, said


def test_what_does_not_work_with_ranks_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(rank: int) -> str:
        config = config_of(tmp_path, "16MiB", update={"mode": "lock-free"})
        with pytest.raises(offload.ConfigError) as raised:
            offload.Engine(TiedModel(), config, ADAMW)
        return str(raised.value)

    assert all('update.mode = "lock-free"' in said for said in on_engines(2, monkeypatch, body))
