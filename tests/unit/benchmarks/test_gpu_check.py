"""`python -m benchmarks.gpu_check`: its lines, what it makes of processes that hang or die, and its exit codes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import checks as gpu_checks
from benchmarks.gpu_check import command as gpu_check
from benchmarks.gpu_check.checks import CHECKS, Check, beside
from benchmarks.gpu_check.command import NO_CUDA, Line, answer_of, arguments, main, run
from benchmarks.gpu_check.setting import Outcome, Setting, Status

ANSWER = 'print(\'outcome: {"status": "ok", "number": "7 GB/s", "detail": ""}\', flush=True)'


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_the_checks_are_those_that_are_described_in_their_order() -> None:
    assert gpu_checks.__doc__ is not None
    described = [
        line.split("|")[1]
        for line in gpu_checks.__doc__.splitlines()
        if line.startswith("| ") and not line.startswith("| check")
    ]
    assert [check.name for check in CHECKS] == [name.strip() for names in described for name in names.split(",")]
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--device", "cpu"], "--device is 'cpu'; it is cuda, cuda:N or cpu-emulated"),
        (["--device", "cuda:x"], "--device is 'cuda:x'"),
        (["--only", "memory", "nothing"], "invalid choice: 'nothing'"),
        (["--patience", "0"], "--patience must be above 0"),
        (["--size", "7b"], "invalid choice: '7b'"),
    ],
)
def test_a_wrong_command_line_is_refused(options: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(options)
    assert ended.value.code == 2
    assert error in capsys.readouterr().err


def test_what_is_not_asked_for_has_a_default() -> None:
    given = arguments([])
    assert (given.device, given.size, given.only, given.save, given.patience) == ("cuda", "357m", None, None, 1.0)
    assert arguments(["--device", "cpu-emulated"]).size == "27m"
    assert (arguments(["--save"]).save, arguments(["--save", "x.json"]).save) == ("", "x.json")


def test_a_check_is_one_line() -> None:
    assert (
        str(Line("uploads", Outcome(Status.OK, "52.1 GB/s"), 3.21))
        == "uploads              ok           3.2 s  52.1 GB/s"
    )
    assert (
        str(Line("pinning", Outcome(Status.SKIPPED, detail="needs a GPU"), 0))
        == "pinning              skipped      0.0 s  (needs a GPU)"
    )
    assert (
        str(Line("synchronisations", Outcome(Status.FAILED, "2", "a.py:3"), 61))
        == "synchronisations     failed      61.0 s  2 (a.py:3)"
    )


def test_the_last_answer_counts_and_other_lines_do_not() -> None:
    assert answer_of("outcome?\nno outcome: {}\n") is None
    first, last = (
        "outcome: " + json.dumps({"status": status, "number": number, "detail": ""})
        for status, number in (("failed", "1"), ("skipped", "2"))
    )
    assert answer_of(f"{first}\nwords\n{last}\nmore\n") == Outcome(Status.SKIPPED, "2")


def test_a_process_that_answers_and_ends_is_taken_at_its_word() -> None:
    assert run(python(ANSWER), 60) == Outcome(Status.OK, "7 GB/s")


def test_a_process_that_dies_after_its_answer_has_failed() -> None:
    found = run(
        python(f"{ANSWER}; import os, sys; print('terminate called', file=sys.stderr, flush=True); os.abort()"), 60
    )
    assert found == Outcome(
        Status.FAILED, "7 GB/s", f"answered ok, then its process ended with {-signal.SIGABRT}: terminate called"
    )


def test_a_process_that_does_not_answer_has_failed_with_its_last_words() -> None:
    found = run(python("import sys; print('first', file=sys.stderr); sys.exit('no such device\\n\\n')"), 60)
    assert found == Outcome(Status.FAILED, detail="its process ended with 1 and no answer: no such device")


@pytest.mark.parametrize("answers", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_process_that_hangs_is_killed_with_what_it_started(answers: bool, tmp_path: Path) -> None:
    """Its children keep the pipe open, so that waiting for the end of its output would be waiting for them."""
    pipe = tmp_path / "held"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    child = f"import sys, time; held = open({str(pipe)!r}, 'w'); held.write('x'); held.flush(); time.sleep(600)"
    script = (
        f"import subprocess, sys, time; {ANSWER if answers else 'pass'}; subprocess.Popen([sys.executable, '-c', "
        f"{child!r}]); time.sleep(600)"
    )
    found = run(python(script), 4)
    when = "answered, but its process did not end" if answers else "no answer"
    assert found == Outcome(Status.FAILED, "7 GB/s" if answers else "", f"{when} within 4 s")
    assert os.read(reader, 9) == b"x"
    assert os.read(reader, 9) == b"", "nobody has it open any more"
    os.close(reader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use CUDA here")
def test_without_cuda_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == NO_CUDA == 3
    output = capsys.readouterr()
    assert not output.out
    assert output.err.count("\n") == 1
    why = "this torch is a build without CUDA" if torch.version.cuda is None else "torch finds no device"
    assert output.err.startswith(f"no GPU to check: {why}")


@pytest.mark.parametrize(("statuses", "code"), [(["ok", "skipped"], 0), (["ok", "failed", "ok"], 1)])
def test_the_exit_code_says_whether_one_failed(
    statuses: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(_: Setting) -> Outcome:
        raise AssertionError("checks are made in processes of their own")

    checks = tuple(
        Check(f"check {number}", "", nothing, 5.0 + number, needs_gpu=False) for number in range(len(statuses))
    )
    limits: list[float] = []

    def made(command: list[str], limit_s: float) -> Outcome:
        limits.append(limit_s)
        return Outcome(Status(statuses[len(limits) - 1]), f"number {len(limits)}")

    monkeypatch.setattr(gpu_check, "CHECKS", (*checks, Check("on a GPU", "", nothing, 1.0)))
    monkeypatch.setattr(gpu_check, "run", made)
    file = tmp_path / "found.json"
    assert main(["--device", "cpu-emulated", "--patience", "2", "--save", str(file)]) == code
    assert limits == [2 * (5.0 + number) for number in range(len(statuses))]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[:-2]] == statuses
    assert lines[-2].endswith("(needs a GPU)")
    assert str(file) in lines[-1]
    record = json.loads(file.read_text())
    assert [check["status"] for check in record["checks"]] == [*statuses, "skipped"]
    assert record["checks"][0] == {
        "name": "check 0",
        "status": "ok",
        "number": "number 1",
        "detail": "",
        "seconds": record["checks"][0]["seconds"],
    }
    assert record["device"] == "cpu-emulated"
    assert record["surroundings"]["torch"] == torch.__version__


def test_what_a_check_raises_is_its_outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(_: Setting) -> Outcome:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(gpu_check, "CHECKS", (Check("one", "", fails, 1.0),))
    gpu_check.child("one", Setting("cpu-emulated", tmp_path, "27m"))
    assert answer_of(capsys.readouterr().out) == Outcome(
        Status.FAILED, detail="RuntimeError: CUDA error: out of memory"
    )


def test_copies_beside_kernels_are_counted_once() -> None:
    assert beside([], [(0, 5)]) == 0.0
    assert beside([(0, 10)], []) == 0.0
    assert beside([(0, 10), (5, 20)], [(4, 8), (6, 10), (18, 30)]) == (6 + 2) / 20
    assert beside([(3, 4)], [(0, 9)]) == 1.0


@pytest.mark.parametrize(
    ("equal", "deviations", "expected", "said"),
    [
        (True, 0, Status.OK, "losses equal bit for bit"),
        (None, 0, Status.OK, "bits not compared"),
        (False, 0, Status.FAILED, "losses differ"),
        (True, 2, Status.FAILED, ""),
    ],
)
def test_timed_steps_are_those_of_the_benchmark(
    equal: bool | None, deviations: int, expected: Status, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], str]] = []
    spread = {"median": 1.0625, "low": 1.0, "high": 1.25}
    record = {
        "ratio": {"plain": spread}, "step_s": {"engine": spread}, "losses_equal": equal, "deviations": deviations
    }  # fmt: skip

    def runs(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append((command, env.get("CUDA_VISIBLE_DEVICES", "")))
        return subprocess.CompletedProcess(command, 0, f"a table\n{json.dumps(record)}\n", "")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_checks.subprocess, "run", runs)
    home, clipped = (next(check for check in CHECKS if check.name == name) for name in ("home", "streamed-clipped"))
    found = home.make(Setting("cuda:1", tmp_path, "357m"))
    assert found.status is expected
    assert found.number == "1.062 (1.000-1.250) of plain torch"
    assert found.detail == f"1.062 s a step, {deviations} deviations, {said or 'losses equal bit for bit'}"
    clipped.make(Setting("cpu-emulated", tmp_path, "27m"))
    (on_gpu, visible), (emulated, all_visible) = asked
    options = dict(itertools.pairwise(on_gpu))
    assert (options["--device"], options["--device-share"], options["--size"], visible, all_visible) == (
        "cuda",
        "3.3",
        "357m",
        "1",
        "",
    )
    assert "--device" not in emulated
    assert dict(itertools.pairwise(emulated))["--clip-norm"] == "1.0"


def test_a_benchmark_that_fails_says_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_checks.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "step 1\nout of memory\n\n"),
    )
    home = next(check for check in CHECKS if check.name == "home")
    assert home.make(Setting("cuda", tmp_path, "27m")) == Outcome(Status.FAILED, detail="out of memory")


def test_a_check_is_made_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu-emulated", "--only", "fork", "pinning"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["fork", "ok"]
    assert first.endswith("67108864 of 67108864 bytes right")
    assert second.split()[:2] == ["pinning", "skipped"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_can_be_checked_without_a_gpu_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["assert", "fork", "uploads", "bf16", "exit"]
    code = main(["--device", "cpu-emulated", "--only", *wanted])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "ok"] for name in wanted], "\n".join(lines)
    assert code == 0
