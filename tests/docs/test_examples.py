"""Every file in examples/ runs, at small size, and prints what it promises."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from snippets import run_script

from offload import load_config
from offload.launch.train import launch

ROOT = Path(__file__).parents[2]

#: Small arguments of each program, and a text that it must print. byte_gpt.py and byte_corpus.py are factories of
#: byte_gpt.toml, which the pages' commands launch.
PROGRAMS: dict[str, tuple[str, str]] = {
    "own_loop.py": ("--width 128 --steps 4 --ram 1MiB", "outputs equal bit for bit: True"),
    "image_classifier.py": ("--channels 8 --steps 4 --batch 8 --ram 512KiB", "accuracy on new images: "),
    "resume_after_crash.py": ("--steps 8 --crash-at 6", "are equal bit for bit: True"),
    "lock_free.py": ("--width 64 --steps 6 --ram 4MiB --disk 1000", "lock-free  "),
    "profile_plain_loop.py": ("--steps 1 --to plain-profile", "engine, memory.ram "),
    "hf_trainer.py": ("--hidden 32 --steps 4 --ram 2MiB", "equal to those of the Trainer without pages: True"),
    "accelerate_loop.py": ("--width 64 --ram 512KiB", "equal to those without pages: True"),
}
#: What some of them need beside the engine.
NEEDS = {"hf_trainer.py": ("transformers", "accelerate"), "accelerate_loop.py": ("accelerate",)}
FACTORIES = {"byte_gpt.py", "byte_corpus.py", "tensorboard_callback.py"}


@pytest.fixture
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of its own, and one compute thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PROGRAMS)
def test_an_example_runs_and_prints_what_it_promises(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    arguments, promised = PROGRAMS[name]
    run_script([str(ROOT / "examples" / name), *arguments.split()])
    assert promised in capfd.readouterr().out


LAUNCHED: dict[str, Any] = {
    "memory": {"ram": "1MiB"},
    "ssd": {"paths": ["pages"]},
    "model": {"factory": "launch_data:Regression"},
    "data": {"factory": "launch_data:vectors"},
    "train": {"steps": 3, "batch": 2, "evaluate_batches": 1, "threads": 1},
    "output": {"run": "log", "callbacks": ["examples.tensorboard_callback:TensorBoard"]},
}


class FakeWriter:
    """In place of TensorBoard's, where that is not installed: notes its calls."""

    scalars: ClassVar[dict[tuple[str, int], float]] = {}
    calls: ClassVar[list[str]] = []

    def __init__(self, folder: Path, purge_step: int) -> None:
        self.calls.append(f"{folder} from {purge_step}")

    def add_text(self, name: str, text: str, step: int) -> None:
        """A text is text."""
        assert text

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Note a scalar."""
        self.scalars[name, step] = value

    def flush(self) -> None:
        """Before the commit."""
        self.calls.append("flush")

    def close(self) -> None:
        """At the end."""
        self.calls.append("close")


@pytest.mark.usefixtures("one_thread")
def test_the_tensorboard_callback_writes_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.delitem(sys.modules, "examples.tensorboard_callback", raising=False)
    assert launch(load_config(LAUNCHED)) == 0
    del sys.modules["examples.tensorboard_callback"]
    lines = [json.loads(line) for line in Path("log/metrics.jsonl").read_text().splitlines()]
    losses = {step: value for (name, step), value in FakeWriter.scalars.items() if name == "loss/training"}
    assert losses == {line["step"]: line["loss"] for line in lines}
    assert {step for name, step in FakeWriter.scalars if name == "loss/validation"} == {0, 3}
    assert FakeWriter.calls == ["log/tensorboard from 1", "flush", "close"]


@pytest.mark.usefixtures("one_thread")
def test_the_tensorboard_callback_with_tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    assert launch(load_config(LAUNCHED)) == 0
    assert list(Path("log/tensorboard").glob("events.out.tfevents.*"))


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*PROGRAMS, *FACTORIES}
