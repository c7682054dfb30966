"""`offload plan` for several ranks: what each has and sends, before any is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.config import ParallelConfig
from offload.parallel.shareable import sent_share

FILE = Path(__file__).parents[4] / "examples" / "byte_gpt.toml"
RATES = ["--flops", "1e11", "--ram-speed", "20000", "--ssd-read", "2000", "--ssd-write", "2000"]
SMALL = ["--set", "model.arguments={'d_model': 128, 'n_layer': 2, 'n_head': 2, 'seq': 32}".replace("'", '"')]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    small = [*SMALL, "--set", "train.seq=32", "--set", "memory.ram=64MiB"]
    assert main(["plan", str(FILE), *RATES, *small, "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_rank_has_its_part_and_sends_it_to_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    one, four = planned(capsys), planned(capsys, "--ranks", "4", "--link", "100")
    parameter_bytes = 4 * one["parameters"]
    assert one["comm_bytes"] == 0
    # Everything has room, so a step gathers each unit once and sums its gradients once.
    assert four["comm_bytes"] == pytest.approx(2 * parameter_bytes, rel=0.02)
    assert four["busy"]["comm"] > 0.2 and four["step_s"] > one["step_s"]
    whole = planned(capsys, "--ranks", "4", "--link", "100", "--set", "parallel.degree=none")
    assert whole["comm_bytes"] == pytest.approx(parameter_bytes, rel=0.02)
    states = planned(capsys, "--ranks", "4", "--set", "parallel.degree=states")
    pages = {"all": four, "states": states, "none": whole}
    assert pages["all"]["resident_ram_bytes"] < pages["none"]["resident_ram_bytes"]
    assert pages["states"]["resident_ram_bytes"] < pages["none"]["resident_ram_bytes"]


def test_shares_of_a_unit_that_a_rank_sends() -> None:
    assert sent_share(ParallelConfig(), 4) == 0.75
    assert sent_share(ParallelConfig(degree="none"), 4) == 1.5
    assert sent_share(ParallelConfig(shard=2), 4) == 0.5 + 0.25


def test_wrong_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["--ranks", "0"], "--ranks is 0"), (["--ranks", "2", "--link", "-1"], "--link is -1e+06")):
        assert main(["plan", str(FILE), *RATES, *SMALL, *words]) == 1
        assert said in capsys.readouterr().err
