"""Whatever a configuration file or a command line says wrongly, it is one line on stderr, exit code 1 or 2, and nothing is made.

What is tried is derived from the configuration's models and from the parser, so that a new key or option is tried as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from annotated_types import Ge, Gt, Le, Lt
from finished_runs import finished, settings
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from small_runs import built

from offload import cli
from offload.config import Config, ConfigError, load_config

HUGE = 10**30
#: A value of each type that a file can hold.
BY_TYPE: dict[type, Any] = {type(None): None, bool: True, int: 7, float: 0.25, str: "x", list: [[]], dict: {"x": {}}}
EXTREMES: dict[type, list[Any]] = {
    int: [0, -1, HUGE, -HUGE], float: [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, HUGE],
    str: ["", " ", "\0", "4 parsecs", "-1GiB", "1e9999", "0B", "9" * 5000, "a" * 5000, "☃", "auto "], list: [[]], dict: [{}], bool: [], type(None): [],
}  # fmt: skip


def run_config(folder: Path) -> dict[str, Any]:
    """A small run, whole."""
    return {
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 1},
        "model": {"factory": "offload.recipe:byte_gpt", "arguments": {"d_model": 64, "n_layer": 1, "n_head": 4, "seq": 16}},
        "data": {"factory": "launch_data:ending_text", "arguments": {"at": 1}},
        "train": {"steps": 3, "batch": 2, "seq": 16, "threads": 1, "evaluate_batches": 1},
        "output": {"run": str(folder / "run")},
    }


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every section and key, dotted."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        for choice in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(choice, type) and issubclass(choice, BaseModel):
                yield from keys(choice, f"{prefix}{name}.")


def accepted_types(annotation: Any, metadata: typing.Iterable[Any] = ()) -> set[type]:
    """The types of a file's values that a key takes."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {type(value) for value in arguments}
    if origin is typing.Annotated:
        return accepted_types(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return set[type]().union(*(accepted_types(choice) for choice in arguments))
    plain = origin or annotation
    if plain in (list, tuple):
        return {list}
    if plain is dict or (isinstance(plain, type) and issubclass(plain, BaseModel)):
        return {dict}
    takes_text = any(getattr(getattr(part, "func", None), "__name__", "") == "_size" for part in metadata)
    return {plain} | ({int} if plain is float else set()) | ({str} if takes_text else set())


def changed(raw: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A configuration with one value put in."""
    made = copy.deepcopy(raw)
    *sections, key = name.split(".")
    target = made
    for section in sections:
        target = target.setdefault(section, {})
    target[key] = value
    return made


def within(field: FieldInfo, value: Any) -> bool:
    """Whether a number keeps to the bounds that its key states itself."""
    number = value if isinstance(value, (int, float)) else 0
    bounds: dict[type, Callable[[Any], bool]] = {
        Gt: lambda b: number > b.gt, Ge: lambda b: number >= b.ge, Lt: lambda b: number < b.lt, Le: lambda b: number <= b.le,
    }  # fmt: skip
    return all(bounds[type(bound)](bound) for bound in field.metadata if type(bound) in bounds)


@pytest.fixture(autouse=True)
def threads_kept() -> Iterator[None]:
    """Runs set torch's compute threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command in an empty folder; it must say one line, fail, and leave everything as it was, but for a cache that the data's
    own factory has made. Returns the line."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*arguments: str, codes: tuple[int, ...] = (1, 2)) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        try:
            code: Any = cli.main(list(arguments))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        where = f"{arguments}: {code}, {said.err!r}"
        assert code in codes and said.err.count("\n") == 1 and ": error: " in said.err and "Traceback" not in said.err, where
        made = {path.name for path in tmp_path.rglob("*") if path not in before}
        assert made in (set(), {"run", "offload-run.json", "data", "train.bin", "validation.bin"}), where
        if made:
            shutil.rmtree(tmp_path / "run")
        return said.err

    return call


# ---- configuration files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_a_value_of_another_type_is_refused_for_every_key(command: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    file, n_tried = tmp_path / "run.json", 0
    for name, field in keys():
        accepted = accepted_types(field.annotation, field.metadata)
        for kind, value in BY_TYPE.items():
            if kind in accepted or (kind is bool and bool in accepted) or (value is None and not field.is_required() and field.default is None):
                continue
            if command == "plan" and n_tried % 5:  # They read the file alike.
                n_tried += 1
                continue
            file.write_text(json.dumps(changed(run_config(tmp_path), name, value)))
            assert name in refused(command, str(file)), (name, value)
            n_tried += 1
    assert n_tried > 250


def test_a_number_out_of_its_bounds_is_refused_for_every_key(tmp_path: Path, refused: Callable[..., str]) -> None:
    file, n_tried = tmp_path / "run.yaml", 0
    for name, field in keys():
        kinds = accepted_types(field.annotation, field.metadata)
        for kind in kinds & {int, float}:
            for value in EXTREMES[kind]:
                if within(field, value) and value == value and abs(value) != float("inf"):
                    continue
                file.write_text(yaml.safe_dump(changed(run_config(tmp_path), name, value)))
                assert name.split(".")[-1] in refused("launch", str(file)), (name, value)
                n_tried += 1
    assert n_tried > 80


@pytest.mark.long
@pytest.mark.timeout(900)
def test_an_extreme_value_that_a_key_takes_trains_or_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tally: Callable[..., None]
) -> None:
    """A run of one step, for every value that the configuration alone does not refuse."""
    monkeypatch.chdir(tmp_path)
    file, n_tried, failures = tmp_path / "run.yaml", 0, []
    for name, field in keys():
        for kind in accepted_types(field.annotation, field.metadata):
            for value in EXTREMES.get(kind, []):
                raw = changed(run_config(tmp_path), name, value)
                try:
                    load_config(raw)
                except ConfigError as error:
                    assert kind is dict or "\n" not in str(error), (name, value)
                    continue
                file.write_text(yaml.safe_dump(json.loads(json.dumps(raw))))
                capsys.readouterr()
                try:
                    code: Any = cli.main(["launch", str(file)])
                except Exception as error:
                    code = f"{type(error).__name__}: {error}"
                said, n_tried = capsys.readouterr().err, n_tried + 1
                if code not in (0, 1) or said.count("\n") != code:
                    failures.append(f"{name} = {str(value)[:40]!r}: {code}, {said[:200]!r}")
                for folder in ("run", "pages"):
                    shutil.rmtree(tmp_path / folder, ignore_errors=True)
    tally("launch with an extreme value of each key", trials=n_tried, failures=len(failures), detail="; ".join(failures))
    assert not failures and n_tried > 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cpu-emulated"}, 'device is "cpu-emulated": set memory.device'),
        ({"memory.device": "1MiB"}, 'device is "cpu": leave memory.device out'),
        ({"device": "cpu-emulated", "memory.device": "1MiB", "update.mode": "lock-free"}, "for which updates are exact"),
        ({"device": "cpu-emulated", "memory.device": "1KiB"}, "less than one page"),
        ({"device": "cuda", "memory.device": "1MiB"}, "CUDA"),
        ({"memory.ram": "64KiB", "memory.page": "1MiB"}, "less than one page"),
        ({"memory.ram": "64KiB"}, "memory.ram is 65536 bytes"),
        ({"memory.ram": HUGE}, "memory.ram"),
        ({"memory.page": 100_000}, "power of two"),
        ({"ssd.max_request": 5000}, "multiple of 4096"),
        ({"ssd.paths": ["a", "a/../a"]}, "the same folder twice"),
        ({"ssd.paths": [""]}, "empty"),
        ({"output.run": ""}, "empty"),
        ({"output.run": "log", "ssd.paths": ["."]}, "lies in the page-file folder"),
        ({"optimizer.nesterov": True}, "nesterov needs"),
        ({"optimizer.name": "sgd", "optimizer.nesterov": True, "optimizer.momentum": 0}, "nesterov needs"),
        ({"train.warmup_steps": 9}, "warmup_steps is 9, more than steps"),
        ({"train.seq": 17}, "17 tokens a row, the model was built for 16"),
        ({"train.seq": None}, "train.seq is not set"),
        ({"train.threads": 10**6}, "train.threads"),
        ({"model.arguments": {"d_model": "wide"}}, "model.factory: offload.recipe:byte_gpt fails: TypeError"),
        ({"model.arguments": {"width": 3}}, "model.arguments: offload.recipe:byte_gpt: got an unexpected keyword argument 'width'"),
        ({"data.arguments": {"at": 1, "seed": "x", "width": 3}}, "data.arguments: launch_data:ending_text: got an unexpected keyword argument 'width'"),
        ({"model.factory": "os:getcwd", "model.arguments": {}}, "model.factory: os:getcwd returns a str; it must return a torch.nn.Module"),
        ({"data.factory": "os:getcwd"}, "data.arguments: os:getcwd: "),
        ({"data.factory": "builtins:dict", "data.arguments": {}}, "data.factory: builtins:dict returns a dict, which has no method batch(step, rows, seq)"),
        ({"model": None}, "launch needs the sections model as well"),
        ({"train": None, "output": None}, "launch needs the sections train, output as well"),
    ],
)
def test_what_contradicts_itself_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    raw = run_config(tmp_path)
    for name, value in changes.items():
        raw = changed(raw, name, value)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    assert said in refused("launch", str(tmp_path / "run.json"))


FILES: dict[str, bytes] = {
    "syntax.toml": b"[memory\n", "syntax.json": b'{"memory": ', "syntax.yaml": b"memory: [1\n  x: {", "encoding.toml": b"seed = '\xff'",
    "encoding.json": b"\xff\xfe{}", "zeros.toml": b"\0" * 100, "empty.json": b"", "empty.yaml": b"", "list.json": b"[1, 2]", "text.yaml": b"hello",
    "number.json": b"3", "null.json": b"null", "deep.json": b"[" * 100_000, "deep.toml": b"a = " + b"[" * 50_000, "deep.yaml": b"[" * 20_000,
    "digits.json": b'{"seed": ' + b"9" * 5000 + b"}", "digits.toml": b"seed = " + b"9" * 5000, "twice.toml": b"seed = 1\nseed = 2\n",
    "tag.yaml": b"!!python/object/apply:os.getcwd []", "date.yaml": b"seed: 2024-99-99", "key.yaml": b"{1: 2, [3]: 4}", "endless.yaml": b"&a [*a]",
    "repeated.yaml": b"a: &a [x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(ord("a"), ord("k"))),
    "large.json": b'{"seed": "' + b"x" * (5 << 20) + b'"}', "kind.ini": b"", "kind": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_configuration_is_one_line(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    line = refused("launch", str(tmp_path / name))
    assert str(tmp_path / name) in line and len(line) < 1000


def test_what_is_no_file_is_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "closed.toml").write_text("")
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    (tmp_path / "device.toml").symlink_to("/dev/zero")
    for name in ("folder.toml", "pipe.toml", "loop.toml", "device.toml", "absent.toml", "closed.toml/below.toml", "a" * 300 + ".toml", "nul\0.toml"):
        for command in ("launch", "plan", "profile"):
            assert name[:9] in refused(command, str(tmp_path / name)) or "null" in name


# ---- the command line --------------------------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser."""
    return next(action for action in cli.build_parser()._actions if isinstance(action, argparse._SubParsersAction)).choices  # type: ignore[return-value]


def required(parser: argparse.ArgumentParser, absent: Path) -> list[str]:
    """The arguments that a command must have, all of them naming what is not there."""
    found: list[str] = []
    for action in parser._actions:
        if not action.option_strings and action.nargs != "?":
            found.append(str(absent))
        elif action.required:
            found += [action.option_strings[-1], str(absent)]
    if parser.prog.endswith("profile") or parser.prog.endswith("doctor"):  # FILE is one of two things, or may be left out.
        found.append(str(absent))
    return found


WRONG_VALUES = ("", " ", "-1", "0", "nan", "inf", "1e999", "lots", "-5GiB", "4 parsecs", "9" * 5000, "☃")


@pytest.mark.parametrize("command", commands())
def test_every_argument_missing_unknown_or_wrong(command: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    parser, absent = commands()[command], tmp_path / "absent.toml"
    if command == "bench-ssd":
        absent = tmp_path / "absent" / "below"
    whole = required(parser, absent)
    if command != "doctor":  # What is wrong with a file is among the doctor's findings, on its standard output.
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
    for value in ("", "=", "memory.ram", "memory.ram.x=1", "=1", ".=1", "memory.=1", "memory.ram=", "a.b.c=1", "memory=1", "\0=1"):
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


def test_values_of_options_are_refused_with_a_run_that_is_right(ended: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    for value in ("", "nope", "-1", "99", "0", "1.0", "../1", "1\n"):
        refused("export", str(ended), "--to", str(tmp_path / "new"), f"--commit={value}")
        refused("verify", str(ended), f"--commit={value}")
    for value in ("", "-1", "0", "nan", "lots", "4 parsecs", "9" * 5000):
        refused("export", str(ended), "--to", str(tmp_path / "new"), f"--max-shard={value}")
    for to in (tmp_path / "file", tmp_path / "full", tmp_path / "file" / "below", ended, ended / "commits", Path("a" * 300), Path("nul\0")):
        refused("export", str(ended), "--to", str(to))
    for run in (tmp_path / "file", tmp_path / "full", tmp_path / "absent", ended / "commits", ended.parent, Path("a" * 300), Path("nul\0"), Path("")):
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
def test_the_doctor_finds_what_is_wrong_with_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        ("os:nothing", "has no attribute 'nothing'"), ("nowhere:x", "No module named 'nowhere'"), ("os", "is not written as module:callable"),
        ("launch_data:sentence_text", "missing a required argument: 'folder'"), ("launch_data:raising", "--plain: launch_data:raising fails: KeyError: 'nowhere'"),
        ("launch_data:raising_step", "--plain: launch_data:raising_step: step() fails: KeyError: 'nowhere'"),
    ):  # fmt: skip
        assert said in refused("profile", "--plain", reference, "--to", "profile")
