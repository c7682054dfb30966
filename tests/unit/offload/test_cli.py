"""The command line: its surface is pinned here, and errors are lines, not tracebacks."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import offload
from offload import cli
from offload.checkpoint.verify import Report
from offload.config import Config, ConfigError
from offload.config_file import apply_changes
from pagemem.errors import OffloadError

SMALL = '[memory]\nram = "64MiB"\n[ssd]\npaths = ["pages"]\n'


def surface(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Options, positionals and commands of a parser."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: surface(command) for name, command in action.choices.items()}
        else:
            found["/".join(action.option_strings) or str(action.metavar)] = None
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration file."""
    path = tmp_path / "run.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What would have been launched."""
    seen: list[Config] = []

    def launch(config: Config) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr(cli, "launch", launch)
    return seen


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launching raise ``error``."""

    def launch(_config: Config) -> int:
        raise error

    monkeypatch.setattr(cli, "launch", launch)


def test_the_surface() -> None:
    assert surface(cli.build_parser()) == {
        "-h/--help": None,
        "--version": None,
        "--debug": None,
        "launch": dict.fromkeys(("-h/--help", "FILE", "--set", "--ranks", "--debug")),
        "config": dict.fromkeys(("-h/--help", "--debug")),
        "profile": dict.fromkeys(("-h/--help", "--debug", "FILE", "--plain", "--set", "--steps", "--to")),
        "plan": dict.fromkeys(
            (
                "-h/--help",
                "--debug",
                "FILE",
                "--set",
                "--ram",
                "--ssd-read",
                "--ssd-write",
                "--flops",
                "--ram-speed",
                "--device-ram-speed",
                "--h2d",
                "--ranks",
                "--link",
                "--machine-ram",
                "--machine-disk",
                "--machine-device",
                "--largest",
                "--depth",
                "--explain",
                "--explain-trace",
                "--json",
            )
        ),
        "export": dict.fromkeys(
            ("-h/--help", "--debug", "RUN", "--path", "--commit", "--to", "--dtype", "--max-shard")
        ),
        "verify": dict.fromkeys(("-h/--help", "--debug", "RUN", "--path", "--commit")),
        "bench-ssd": dict.fromkeys(("-h/--help", "--debug", "PATH", "--size", "--seconds", "--json")),
        "doctor": dict.fromkeys(("-h/--help", "--debug", "FILE", "--set", "--no-bench", "--json")),
    }


@pytest.mark.parametrize("command", ["launch", "profile", "plan", "export", "verify", "bench-ssd", "doctor"])
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    actions = (
        next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
        .choices[command]
        ._actions
    )
    assert [action.dest for action in actions if not action.help] == []
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0 and f"usage: offload {command}" in capsys.readouterr().out


def test_the_version_in_a_process_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-m", "offload", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"offload {offload.__version__}\n"


def test_factories_beside_the_configuration_are_found_and_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make():\n    return 1\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('a file here took the place of a package')\n")
    # -P: as the installed command is started, without the current directory.
    command = [sys.executable, "-P", "-m", "offload.cli", "profile", "--plain", "mine:make", "--to", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "--plain mine:make returns (int)" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["launch"],
        ["launch", "a", "b"],
        ["launch", "--unknown", "a"],
        ["plan"],
        ["plan", "a", "--flops", "fast"],
        ["plan", "a", "--machine-ram", "lots"],
        ["export", "run", "--to", "out", "--max-shard", "big"],
        ["bench-ssd", "a", "--size", "much"],
        ["export", "run"],
        ["export", "run", "--to", "out", "--dtype", "int8"],
        ["verify"],
        ["verify", "a", "b"],
        ["profile"],
        ["profile", "a", "--plain", "b:c"],
        ["profile", "a", "--steps", "few"],
        ["bench-ssd"],
        ["bench-ssd", "a", "--seconds", "long"],
        ["doctor", "a", "b"],
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("offload") and ": error: " in said and said.count("\n") == 1


def test_what_export_and_verify_are_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "export_run", lambda *a, console, **named: seen.append((*a, named)))
    monkeypatch.setattr(
        cli, "verify_run", lambda *a, console, **named: (seen.append((*a, named)), Report([], {3: ["wrong"]}))[1]
    )
    paths = ["--path", "b", "--path", "c"]
    assert (
        cli.main(["export", "a", "--to", "out", *paths, "--commit", "5", "--dtype", "bf16", "--max-shard", "2MB"]) == 0
    )
    assert cli.main(["export", "a", "--to", "out"]) == 0
    assert cli.main(["verify", "a", *paths]) == 1
    named = {"paths": [Path("b"), Path("c")], "commit": "5"}
    assert seen == [
        (Path("a"), Path("out"), {**named, "dtype": "bf16", "max_shard_bytes": 2_000_000}),
        (Path("a"), Path("out"), {"paths": [], "commit": None, "dtype": "keep", "max_shard_bytes": 5_000_000_000}),
        (Path("a"), {**named, "commit": None}),
    ]


def test_what_profile_is_called_with(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(cli, "profile_run", lambda config, *rest: seen.append((config.memory.ram, *rest[:2])))
    assert cli.main(["profile", str(file), "--set", "memory.ram=128MiB", "--steps", "7", "--to", "out"]) == 0
    assert cli.main(["profile", str(file)]) == 0
    assert seen == [(128 << 20, 7, Path("out")), (64 << 20, 4, Path("profile"))]


def test_changes_go_into_the_configuration(file: Path, launched: list[Config]) -> None:
    changes = ["memory.ram=128MiB", "ssd.direct=false", "optimizer.lr=1e-3", 'ssd.paths=["a", "b"]', "seed=7"]
    assert cli.main(["launch", str(file), *(part for change in changes for part in ("--set", change))]) == 0
    (config,) = launched
    assert config.memory.ram == 128 << 20 and config.ssd.direct is False and config.optimizer.lr == 1e-3
    assert config.ssd.paths == ["a", "b"] and config.seed == 7


def test_changes_leave_what_they_start_from_alone() -> None:
    raw = {"a": {"b": 1}}
    assert apply_changes(raw, ["a.b=2", "a.c.d=x=y"]) == {"a": {"b": 2, "c": {"d": "x=y"}}}
    assert raw == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("memory.ram", "offload: error: --set memory.ram: write section.key=value"),
        ("memory.ram.deep=1", "offload: error: --set memory.ram.deep=1: 'ram' is not a section"),
        ("memory.rm=1", "did you mean 'memory.ram'?"),
        ("memory.ram=lots", "memory.ram: not a size: 'lots'"),
        ("seed=[4", "not '[4' (--set takes JSON such as 3, true, null or [\"a\"]; anything else is text)"),
        ("model.factory=mymodel", "model.factory: 'mymodel' is not written as module:callable (--set takes JSON"),
    ],
)
def test_a_wrong_change_is_one_line(change: str, said: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", str(file), "--set", change]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("offload: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("one\ntwo"), "offload: error: one\noffload: error: two\n"),
        (OffloadError("no room"), "offload: error: no room\n"),
        (MemoryError(), "offload: error: MemoryError (--debug shows where)\n"),
        (ValueError("bad shape"), "offload: error: bad shape (--debug shows where)\n"),
        (
            OSError(28, "No space left on device"),
            "offload: error: [Errno 28] No space left on device (--debug shows where)\n",
        ),
    ],
)
def test_an_error_is_a_line_and_exit_code_1(
    error: Exception, said: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(error, monkeypatch)
    assert cli.main(["launch", str(file)]) == 1
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("where", [0, 1, 2])
def test_debug_keeps_the_traceback_before_and_after_the_command(
    where: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(OffloadError("no room"), monkeypatch)
    arguments = ["launch", str(file)]
    with pytest.raises(OffloadError):
        cli.main([*arguments[:where], "--debug", *arguments[where:]])


def test_the_packages_are_typed() -> None:
    for package in ("pagemem", "scheduler", "optim", "offload"):
        assert (Path(offload.__file__).parents[1] / package / "py.typed").is_file()


def test_a_defect_keeps_its_traceback(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(AssertionError("cannot happen"), monkeypatch)
    with pytest.raises(AssertionError):
        cli.main(["launch", str(file)])


def test_ctrl_c_is_exit_code_130(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["launch", str(file)]) == 130
    assert capsys.readouterr().err == "offload: interrupted\n"
