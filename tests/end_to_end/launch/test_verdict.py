"""`plan`, `doctor` and `launch` say the same of whether a run can begin, for budgets and machines around the smallest
that do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import cli
from offload.budget.verdict import Available, decide, verdict_of
from offload.config_loading import load_config
from offload.factories import model_factory
from offload.forecast import forecast
from offload.launch import setup as launch
from offload.machine import doctor
from pagemem.errors import BudgetError

KIB = 1 << 10
PAGE = 64 * KIB
PLENTY = Available(1 << 40, 1 << 40)
RATES = ("--flops", "2e9", "--ram-speed", "2000", "--ssd-read", "400", "--ssd-write", "400")


class OneLargeLayer(nn.Module):
    """One unit of one slice."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, 1024)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Some loss."""
        return self.bytes(x).square().mean()


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """Runs set torch's compute threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def raw_config(folder: Path, ram: int | str = "1MiB", dtype: str = "fp32", **update: Any) -> dict[str, Any]:
    """A run of one step."""
    return {
        "memory": {"ram": ram, "page": PAGE},
        "ssd": {"paths": [str(folder / "pages")], "threads": 1},
        "update": update,
        "model": {
            "factory": "examples.byte_gpt:byte_gpt",
            "arguments": {"d_model": 64, "n_layer": 1, "n_head": 4, "seq": 16},
            "dtype": dtype,
        },
        "data": {"factory": "launch_data:sentence_text"},
        "train": {"steps": 1, "batch": 2, "seq": 16, "threads": 1, "evaluate_batches": 0},
        "output": {"run": str(folder / "run")},
    }


def said_by_all(
    folder: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, bool], dict[str, str]]:
    """Whether each command says that the run fits, and in which words."""
    folder.mkdir()
    file = folder / "run.json"
    file.write_text(json.dumps(raw))
    fits, words = {}, {}
    for command, more in (("plan", (*RATES, "--json")), ("doctor", ("--no-bench", "--json")), ("launch", ())):
        code, said = cli.main([command, str(file), *more]), capsys.readouterr()
        fits[command], words[command] = code == 0, said.err
        if command == "doctor":
            findings = [f for f in json.loads(said.out.splitlines()[-1])["findings"] if f["what"] == "budget"]
            fits[command] = all(finding["level"] != "problem" for finding in findings)
            words[command] = "; ".join(f"{finding['said']}; {finding['remedy']}" for finding in findings)
        elif command == "plan" and code == 0:
            found = json.loads(said.out)["fit"]
            fits[command], words[command] = found["fits"], "; ".join(found["advice"])
    return fits, words


@pytest.mark.parametrize(
    ("dtype", "update"), [("fp32", {}), ("bf16", {"clip_norm": 1.0})], ids=["fp32", "bf16, clipped"]
)
def test_budgets_around_the_smallest(
    dtype: str, update: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(raw_config(tmp_path, dtype=dtype, **update))
    assert config.model is not None
    smallest = offload.smallest_budget(model_factory(config.model), None, config).smallest_bytes
    for ram in (PAGE, smallest - PAGE, smallest - 1, smallest, smallest + 1, smallest + PAGE):
        fits, words = said_by_all(tmp_path / str(ram), raw_config(tmp_path / str(ram), ram, dtype, **update), capsys)
        assert set(fits.values()) == {ram >= smallest}, (ram - smallest, fits, words)
        if ram < smallest:
            assert all(f"set memory.ram to at least {smallest}" in line for line in words.values()), words


def test_lock_free_budgets_around_the_smallest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(raw_config(tmp_path, mode="lock-free"))
    assert config.model is not None
    smallest = offload.smallest_budget(model_factory(config.model), None, config).smallest_bytes
    exact = load_config(raw_config(tmp_path))
    assert exact.model is not None
    assert smallest > offload.smallest_budget(model_factory(exact.model), None, exact).smallest_bytes
    for ram in (smallest // 2, smallest - 1, smallest, smallest + PAGE):
        folder = tmp_path / str(ram)
        fits, words = said_by_all(folder, raw_config(folder, ram, mode="lock-free"), capsys)
        assert set(fits.values()) == {ram >= smallest}, (ram - smallest, fits, words)
        if ram < smallest:
            remedy = f'set memory.ram to at least {smallest}, or update.mode to "exact"'
            assert all(remedy in line for line in words.values()), words


def test_a_budget_above_the_smallest_that_needs_more_is_refused_as_the_engine_refuses_it(tmp_path: Path) -> None:
    for ram, needed in ((3 << 20, 3_407_872), ((4 << 20) - 1, 0), (4 << 20, 4_718_592)):
        raw = raw_config(tmp_path, ram, mode="lock-free")
        raw["memory"]["page"] = "auto"
        config = load_config(raw)
        shortages = verdict_of(config, OneLargeLayer, PLENTY).shortages
        assert [f"at least {needed}, or" in shortage.remedy for shortage in shortages] == [True] * bool(needed)
        if needed:
            with pytest.raises(BudgetError, match=f"set memory.ram to at least {needed}, or") as caught:
                offload.initialize(OneLargeLayer(), config)
            assert caught.value.smallest_bytes == needed
        else:
            offload.initialize(OneLargeLayer(), config).close()


@pytest.mark.parametrize("what", ["ram", "disk", "limit"])
def test_machines_around_the_smallest(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(raw_config(tmp_path))
    assert config.model is not None
    content = offload.smallest_budget(model_factory(config.model), None, config).content_bytes
    least = {"ram": content, "disk": content, "limit": (1 << 20) + 1}[what]
    for there in (least - 1, least, 1 << 40):
        available = {
            "ram": Available(there, 1 << 40),
            "disk": Available(1 << 40, there),
            "limit": Available(1 << 40, 1 << 40, limits=(("RLIMIT_DATA", there),)),
        }[what]
        for module in (doctor, forecast, launch):
            monkeypatch.setattr(module, "available_here", lambda config, available=available: available)
        fits, words = said_by_all(tmp_path / str(there), raw_config(tmp_path / str(there)), capsys)
        assert fits["doctor"] == fits["launch"] == (there >= least), (there, fits, words)
        # Activations, whole pages and Python itself come on top, which plan knows beforehand: where the others see no
        # room, nor does it.
        assert fits["plan"] == (there == 1 << 40 or (what == "limit" and there == least)), (there, fits, words)
        if there < least:
            shown = {"ram": "of RAM can be had", "disk": "page files take at least", "limit": "RLIMIT_DATA is 1.0 MiB"}[
                what
            ]
            assert shown in words["doctor"] and shown in words["launch"], words


def test_a_budget_beyond_the_machine_is_no_shortage_where_the_model_is_small(tmp_path: Path) -> None:
    config = load_config(raw_config(tmp_path, "1TiB"))
    assert config.model is not None
    need = offload.smallest_budget(model_factory(config.model), None, config)
    n_parameters = sum(parameter.numel() for parameter in model_factory(config.model)().parameters())
    assert need.content_bytes >= 12 * n_parameters and need.content_bytes < 12.2 * n_parameters
    assert decide(config, need, "", Available(1 << 30, 1 << 40)).shortages == ()
    (shortage,) = decide(config, None, "who knows", Available(1 << 30, 0)).shortages
    assert shortage.said == "memory.ram 1.0 TiB, 1.0 GiB of RAM can be had"
    with pytest.raises(BudgetError, match="end what uses the memory"):
        decide(config, None, "", Available(1 << 30, 0)).check()


def test_a_run_that_is_there_has_its_room_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = raw_config(tmp_path / "a")
    assert set(said_by_all(tmp_path / "a", raw, capsys)[0].values()) == {True}
    before, there = (
        launch.available_here(load_config(raw_config(tmp_path / "b"))),
        launch.available_here(load_config(raw)),
    )
    taken = (tmp_path / "a" / "pages" / "pages.bin").stat().st_blocks * 512
    assert taken > 0 and there.disk_bytes - before.disk_bytes == pytest.approx(taken, abs=64 << 20)
