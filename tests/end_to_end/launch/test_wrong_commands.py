"""Whatever a command line says wrongly is one line on stderr, exit code 1 or 2, and nothing is made. Derived from the
parser."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from finished_runs import finished, settings
from small_runs import built
from wrong_input import FILES, refused, run_config, threads_kept

from offload import cli

__all__ = ["refused", "threads_kept"]  # fixtures


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser."""
    return next(
        action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    ).choices  # type: ignore[return-value]


def required(parser: argparse.ArgumentParser, absent: Path) -> list[str]:
    """The arguments that a command must have, all of them naming what is not there."""
    found: list[str] = []
    for action in parser._actions:
        if not action.option_strings and action.nargs != "?":
            found.append(str(absent))
        elif action.required:
            found += [action.option_strings[-1], str(absent)]
    if parser.prog.endswith("profile") or parser.prog.endswith(
        "doctor"
    ):  # FILE is one of two things, or may be left out.
        found.append(str(absent))
    return found


WRONG_VALUES = ("", " ", "-1", "0", "nan", "inf", "1e999", "lots", "-5GiB", "4 parsecs", "9" * 5000, "☃")


@pytest.mark.parametrize("command", commands())
def test_every_argument_missing_unknown_or_wrong(command: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    parser, absent = commands()[command], tmp_path / "absent.toml"
    if command == "bench-ssd":
        absent = tmp_path / "absent" / "below"
    whole = required(parser, absent)
    # What is wrong with a file is among the doctor's findings, on its standard output; `config` needs no argument.
    if command not in ("doctor", "config"):
        refused(command, *whole)
        refused(command)
    refused(command, *whole, "--unknown")
    refused(command, *whole, "more", "and more") if command != "bench-ssd" else None
    for action in parser._actions:
        if not action.option_strings or isinstance(action, argparse._HelpAction):
            continue
        option = action.option_strings[-1]
        if action.nargs == 0:
            refused(command, *whole, f"{option}=yes")
            continue
        refused(command, *whole, option)
        for value in WRONG_VALUES:
            if command != "doctor" or option == "--set":
                refused(command, *whole, f"{option}={value}") if command != "doctor" else None


def test_values_of_options_are_refused_with_a_file_that_is_right(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run_config(tmp_path)))
    for action in commands()["plan"]._actions:
        if action.metavar in ("MB/S", "F"):
            for value in ("0", "-1", "nan", "inf", "fast", ""):
                refused("plan", str(file), f"{action.option_strings[0]}={value}")
        if action.metavar == "SIZE":
            for value in ("-1", "nan", "lots", "", "4 parsecs", "9" * 5000):
                refused("plan", str(file), f"{action.option_strings[0]}={value}")
    for value in ("", "x", "seq.x", "n_head "):
        refused("plan", str(file), f"--depth={value}")
    for value in ("0", "-1", "x", "", "1.5"):
        refused("profile", str(file), f"--steps={value}")
    for value in (
        "",
        "=",
        "memory.ram",
        "memory.ram.x=1",
        "=1",
        ".=1",
        "memory.=1",
        "memory.ram=",
        "a.b.c=1",
        "memory=1",
        "\0=1",
    ):
        for command in ("launch", "plan", "profile"):
            refused(command, str(file), f"--set={value}")


def test_no_command_and_an_unknown_one(refused: Callable[..., str]) -> None:
    refused(codes=(2,))
    refused("fly", codes=(2,))
    refused("--debug", codes=(2,))
    refused("", codes=(2,))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has commits."""
    return finished(built(), settings(tmp_path_factory.mktemp("ended"))).folder


def test_values_of_options_are_refused_with_a_run_that_is_right(
    ended: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    for value in ("", "nope", "-1", "99", "0", "1.0", "../1", "1\n"):
        refused("export", str(ended), "--to", str(tmp_path / "new"), f"--commit={value}")
        refused("verify", str(ended), f"--commit={value}")
    for value in ("", "-1", "0", "nan", "lots", "4 parsecs", "9" * 5000):
        refused("export", str(ended), "--to", str(tmp_path / "new"), f"--max-shard={value}")
    for to in (
        tmp_path / "file",
        tmp_path / "full",
        tmp_path / "file" / "below",
        ended,
        ended / "commits",
        Path("a" * 300),
        Path("nul\0"),
    ):
        refused("export", str(ended), "--to", str(to))
    for run in (
        tmp_path / "file",
        tmp_path / "full",
        tmp_path / "absent",
        ended / "commits",
        ended.parent,
        Path("a" * 300),
        Path("nul\0"),
        Path(""),
    ):
        refused("export", str(run), "--to", str(tmp_path / "new"))
        refused("verify", str(run))
    for path in (tmp_path / "file", tmp_path / "full", tmp_path / "absent"):
        refused("verify", str(ended), "--path", str(path))
        refused("export", str(ended), "--to", str(tmp_path / "new"), "--path", str(path))


def test_values_of_options_are_refused_with_a_folder_that_is_right(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("precious")
    for value in ("", "-1", "0", "nan", "lots", "4 parsecs", "1B", "9" * 5000):
        refused("bench-ssd", str(tmp_path), f"--size={value}")
    for value in ("", "-1", "0", "nan", "inf", "long", "1e999"):
        refused("bench-ssd", str(tmp_path), f"--seconds={value}")
    for path in (tmp_path / "file", tmp_path / "absent", Path("a" * 300), Path("nul\0"), Path("")):
        if path != Path(""):  # which is the current directory
            refused("bench-ssd", str(path))


@pytest.mark.parametrize("name", [*FILES, "folder.toml", "absent.toml", "pipe.toml"])
def test_the_doctor_finds_what_is_wrong_with_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "folder.toml":
        path.mkdir()
    elif name == "pipe.toml":
        os.mkfifo(path)
    elif name != "absent.toml":
        path.write_bytes(FILES[name])
    assert cli.main(["doctor", str(path), "--no-bench"]) == 1
    said = capsys.readouterr()
    problems = [line for line in said.out.splitlines() if line.startswith("problem")]
    assert said.err == "" and len(problems) >= 1 and all(str(path) in line for line in problems if "config" in line)


def test_training_without_the_engine_that_is_none(refused: Callable[..., str]) -> None:
    for reference, said in (
        ("os:getcwd", "--plain os:getcwd returns (str); it must return (model, optimizer, step)"),
        ("os:nothing", "has no attribute 'nothing'"),
        ("nowhere:x", "No module named 'nowhere'"),
        ("os", "is not written as module:callable"),
        ("launch_data:sentence_text", "missing a required argument: 'folder'"),
        ("launch_data:raising", "--plain: launch_data:raising fails: KeyError: 'nowhere'"),
        ("launch_data:raising_step", "--plain: launch_data:raising_step: step() fails: KeyError: 'nowhere'"),
    ):
        assert said in refused("profile", "--plain", reference, "--to", "profile")
