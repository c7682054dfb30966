"""Whatever a configuration file says wrongly is one line on stderr, exit code 1, and nothing is made.

What is tried is derived from the configuration's models, so that a new key is tried as well.
"""

from __future__ import annotations

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
import wrong_factories
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from wrong_input import FILES, refused, run_config, threads_kept

from offload import cli
from offload.config import Config, ConfigError
from offload.config_loading import load_config

__all__ = ["refused", "threads_kept"]  # fixtures

HUGE = 10**30
#: A value of each type that a file can hold.
BY_TYPE: dict[type, Any] = {type(None): None, bool: True, int: 7, float: 0.25, str: "x", list: [[]], dict: {"x": {}}}
EXTREMES: dict[type, list[Any]] = {
    int: [0, -1, HUGE, -HUGE],
    float: [0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, HUGE],
    str: ["", " ", "\0", "4 parsecs", "-1GiB", "1e9999", "0B", "9" * 5000, "a" * 5000, "☃", "auto "],
    list: [[]],
    dict: [{}],
    bool: [],
    type(None): [],
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
        Gt: lambda b: number > b.gt,
        Ge: lambda b: number >= b.ge,
        Lt: lambda b: number < b.lt,
        Le: lambda b: number <= b.le,
    }
    return all(bounds[type(bound)](bound) for bound in field.metadata if type(bound) in bounds)


# ---- configuration files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["launch", "plan"])
def test_a_value_of_another_type_is_refused_for_every_key(
    command: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file, n_tried = tmp_path / "run.json", 0
    for name, field in keys():
        accepted = accepted_types(field.annotation, field.metadata)
        for kind, value in BY_TYPE.items():
            if (
                kind in accepted
                or (kind is bool and bool in accepted)
                or (value is None and not field.is_required() and field.default is None)
            ):
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
    tmp_path: Path,
    threads_kept: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tally: Callable[..., None],
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
    tally(
        "launch with an extreme value of each key", trials=n_tried, failures=len(failures), detail="; ".join(failures)
    )
    assert not failures and n_tried > 50


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cpu-emulated"}, 'device is "cpu-emulated": set memory.device'),
        ({"memory.device": "1MiB"}, 'device is "cpu": leave memory.device out'),
        (
            {"device": "cpu-emulated", "memory.device": "1MiB", "update.mode": "lock-free"},
            "for which updates are exact",
        ),
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
        ({"model.arguments": {"d_model": "wide"}}, "model.factory: examples.byte_gpt:byte_gpt fails: TypeError"),
        (
            {"model.arguments": {"width": 3}},
            "model.arguments: examples.byte_gpt:byte_gpt: got an unexpected keyword argument 'width'",
        ),
        (
            {"data.arguments": {"at": 1, "seed": "x", "width": 3}},
            "data.arguments: launch_data:ending_text: got an unexpected keyword argument 'width'",
        ),
        (
            {"model.factory": "os:getcwd", "model.arguments": {}},
            "model.factory: os:getcwd returns a str; it must return a torch.nn.Module",
        ),
        ({"data.factory": "os:getcwd"}, "data.arguments: os:getcwd: "),
        (
            {"data.factory": "builtins:dict", "data.arguments": {}},
            "data.factory: builtins:dict returns a dict, which has no method batch(step, rows, seq)",
        ),
        ({"model": None}, "launch needs the sections model as well"),
        ({"train": None, "output": None}, "launch needs the sections train, output as well"),
    ],
)
def test_what_contradicts_itself_is_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    raw = run_config(tmp_path)
    for name, value in changes.items():
        raw = changed(raw, name, value)
    (tmp_path / "run.json").write_text(json.dumps(raw))
    assert said in refused("launch", str(tmp_path / "run.json"))


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
    for name in (
        "folder.toml",
        "pipe.toml",
        "loop.toml",
        "device.toml",
        "absent.toml",
        "closed.toml/below.toml",
        "a" * 300 + ".toml",
        "nul\0.toml",
    ):
        for command in ("launch", "plan", "profile"):
            assert name[:9] in refused(command, str(tmp_path / name)) or "null" in name


# ---- factories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["launch", "profile"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("model", name) for name in wrong_factories.MODELS), *(("data", name) for name in wrong_factories.DATA)],
)
def test_a_factory_that_returns_something_else_is_one_line(
    kind: str, name: str, command: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    raw = run_config(tmp_path)
    _, said = {"model": wrong_factories.MODELS, "data": wrong_factories.DATA}[kind][name]
    if kind == "model":
        raw["model"] = {"factory": "wrong_factories:model", "arguments": {"name": name}}
    else:
        raw |= {
            "model": {"factory": "wrong_factories:regression"},
            "data": {"factory": "wrong_factories:data", "arguments": {"name": name}},
        }
    if "validation" in name and command == "profile":
        return  # which evaluates nothing
    if name in ("one_tensor", "failing_batch"):
        raw["train"]["evaluate_batches"] = 0
    (tmp_path / "run.json").write_text(json.dumps(raw))
    line = refused(command, str(tmp_path / "run.json"))
    assert said in line and f"{kind}.factory: wrong_factories:{kind}" in line
