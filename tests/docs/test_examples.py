"""Every file in examples/ runs, at small size, and prints what it promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from snippets import run_script

ROOT = Path(__file__).parents[2]

#: Small arguments of each program, and a text that it must print. byte_gpt.py and byte_corpus.py are factories of
#: byte_gpt.toml, which the pages' commands launch.
PROGRAMS: dict[str, tuple[str, str]] = {
    "own_loop.py": ("--width 128 --steps 4 --ram 1MiB", "outputs equal bit for bit: True"),
    "image_classifier.py": ("--channels 8 --steps 4 --batch 8 --ram 512KiB", "accuracy on new images: "),
    "resume_after_crash.py": ("--steps 8 --crash-at 6", "are equal bit for bit: True"),
    "lock_free.py": ("--width 64 --steps 6 --ram 4MiB --disk 1000", "lock-free  "),
    "profile_plain_loop.py": ("--steps 1 --to plain-profile", "engine, memory.ram "),
}
FACTORIES = {"byte_gpt.py", "byte_corpus.py"}


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
    arguments, promised = PROGRAMS[name]
    run_script([str(ROOT / "examples" / name), *arguments.split()])
    assert promised in capfd.readouterr().out


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*PROGRAMS, *FACTORIES}
