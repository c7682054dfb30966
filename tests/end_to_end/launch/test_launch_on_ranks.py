"""`offload launch --ranks`: the losses of one process that accumulates as many micro-batches; jobs that end early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from offload.checkpoint.export import export_run

ROOT = Path(__file__).parents[3]
CONFIG = """
seed = 1
[memory]
ram = "16MiB"
[ssd]
paths = ["{folder}/pages"]
[model]
factory = "examples.byte_gpt:byte_gpt"
arguments = {{ d_model = 64, n_layer = 2, n_head = 4, seq = 32 }}
[data]
factory = "examples.byte_gpt:python_source_text"
[train]
steps = {steps}
batch = 2
seq = 32
evaluate_batches = 2
[commit]
every_steps = 2
[output]
run = "{folder}/log"
"""


FAILING = """
import os
from examples.byte_gpt import python_source_text

class Text:
    def __init__(self, whole):
        self.whole = whole

    def batch(self, number, rows, seq):
        if os.environ["RANK"] == "1" and number >= 3:
            raise ValueError("no more text")
        return self.whole.batch(number, rows, seq)

    def validation_batches(self, count, rows, seq):
        return self.whole.validation_batches(count, rows, seq)

def text(folder, seed):
    return Text(python_source_text(folder, seed))
"""


def start(folder: Path, *words: str, steps: int = 4) -> subprocess.Popen[str]:
    """Begin a launch in a process group of its own, which finds modules in ``folder``."""
    folder.mkdir(exist_ok=True)
    file = folder / "run.toml"
    file.write_text(CONFIG.format(folder=folder, steps=steps))
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1",
        "OFFLOAD_CALIBRATION": "off",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "offload", "launch", str(file), *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], timeout_s: float = 90) -> tuple[int, str, str]:
    """Exit code, output and errors; kills all of it after the time."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output, errors


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Of each step."""
    return [json.loads(line) for line in (folder / "log/metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [step["loss"] for step in metrics(folder)]


def weights(folder: Path) -> dict[str, bytes]:
    """Of the newest commit, bit by bit."""
    export_run(
        folder / "pages", folder / "export", paths=[], commit=None, dtype="keep", max_shard_bytes=2**30,
        console=Console(quiet=True),
    )  # fmt: skip
    found = {path.name: path.read_bytes() for path in (folder / "export").glob("*.safetensors")}
    assert found
    return found


def rank_processes(process: subprocess.Popen[str]) -> list[int]:
    """The ranks, in order."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found]


def await_steps(folder: Path, n_steps: int, timeout_s: float = 60) -> None:
    """Wait until the metrics have so many steps."""
    deadline_s = time.monotonic() + timeout_s
    while not (folder / "log/metrics.jsonl").exists() or len(losses(folder)) < n_steps:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_losses_are_those_of_one_process_that_accumulates(tmp_path: Path) -> None:
    code, output, errors = ended(start(tmp_path / "two", "--ranks", "2"))
    assert code == 0, errors
    assert '2 ranks, degree "all"; a step has 4 rows, 2 of each rank; 1 thread each, by OMP_NUM_THREADS' in output
    assert "process peak of ranks 0 to 1" in output
    assert "waiting for other ranks between steps of ranks 0 to 1" in output
    assert ended(start(tmp_path / "one", "--set", "update.accumulation=2"))[0] == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and len(losses(tmp_path / "two")) == 4
    assert weights(tmp_path / "two") == weights(tmp_path / "one")
    code, output, errors = ended(start(tmp_path / "two", steps=6))  # one process goes on from two
    assert code == 0 and "resumes after step 4" in output, errors


def test_the_error_of_a_rank_ends_the_job_and_is_printed_once_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    code, output, errors = ended(start(tmp_path, "--ranks", "2", "--set", "data.factory=failing:text"))
    assert code == 1 and "step 1/4" in output
    said = "offload: rank 1: error: data.factory: failing:text: batch 3 fails: ValueError: no more text"
    assert [line for line in errors.splitlines() if line.startswith(said)] == errors.splitlines()[-1:]
    assert errors.count("error") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ranks", "0"), "--ranks is 0; give a number from 1 to 1024"),
        (
            ("--ranks", "2", "--set", "update.mode=lock-free"),
            'several ranks do not work with update.mode = "lock-free"',
        ),
        (("--ranks", "3", "--set", "parallel.shard=2"), "do not make up 3 ranks"),
    ],
)
def test_ranks_that_cannot_be_are_refused_before_any_is_started(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    code, _, errors = ended(start(tmp_path, *words))
    assert code == 1 and said in errors and errors.count("\n") == 1
    assert not (tmp_path / "log").exists()


@pytest.mark.long
def test_a_rank_that_is_killed_ends_the_job_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "--ranks", "2", steps=100_000)
    await_steps(tmp_path, 10)
    os.kill(rank_processes(process)[1], signal.SIGKILL)
    began_s = time.monotonic()
    code, _, errors = ended(process)
    assert code == 1 and time.monotonic() - began_s < 30
    assert "rank 0: error: rank 1 (process " in errors and "rank 1 was ended by SIGKILL" in errors
    done = losses(tmp_path)
    process = start(tmp_path, "--ranks", "2", steps=len(done) + 2)
    code, output, errors = ended(process)
    assert code == 0 and "resumes after step" in output, errors
    assert losses(tmp_path)[: len(done)] == done, "what is done again has the same losses"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks_after_the_step_with_a_commit(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, "--ranks", "2", steps=100_000)
    await_steps(tmp_path, 5)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    code, output, errors = ended(process)
    assert code == 128 + number, errors
    assert f"interrupted after step {len(losses(tmp_path))}, which is committed" in output
    assert errors.count("stopping after this step") == 1


@pytest.mark.long
def test_a_signal_ends_a_job_of_which_a_rank_hangs(tmp_path: Path) -> None:
    process = start(tmp_path, "--ranks", "2", steps=100_000)
    await_steps(tmp_path, 5)
    os.kill(rank_processes(process)[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    code, _, errors = ended(process)
    assert code == 1 and "has been silent for 15 s" in errors, errors


@pytest.mark.long
def test_two_agents_on_one_machine(tmp_path: Path) -> None:
    assert ended(start(tmp_path / "one", "--set", "update.accumulation=2"))[0] == 0
    folder = tmp_path / "two"
    folder.mkdir()
    (folder / "run.toml").write_text(CONFIG.format(folder=folder, steps=4))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OFFLOAD_CALIBRATION": "off"}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    torchrun += ["--rdzv-endpoint=127.0.0.1:29871", "-m", "offload", "launch", str(folder / "run.toml")]
    agents = [
        subprocess.Popen(torchrun, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for agent in agents:
        code, _, errors = ended(agent)
        assert code == 0, errors
    assert losses(folder) == losses(tmp_path / "one")
