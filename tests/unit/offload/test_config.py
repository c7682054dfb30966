"""The configuration: what is accepted, what is refused and in which words, and that its reference page is current."""

from __future__ import annotations

import ast
import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from offload.config import Config, ConfigError, resolve_page_bytes
from offload.config_loading import load_config
from pagemem.units import KiB, MiB

ROOT = Path(__file__).parents[3]
SMALL: dict[str, Any] = {"memory": {"ram": "64MiB"}, "ssd": {"paths": ["pages"]}}


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The small configuration with ``(section.key, value)`` pairs put in."""
    raw = copy.deepcopy(SMALL)
    for name, value in changes:
        section, _, key = name.partition(".")
        if key:
            raw.setdefault(section, {})[key] = value
        else:
            raw[section] = value
    return raw


def complaint(*changes: tuple[str, Any]) -> str:
    """What is said about the small configuration with these changes."""
    with pytest.raises(ConfigError) as caught:
        load_config(changed(*changes))
    return str(caught.value)


def fields(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Every key of the configuration, dotted, with its field."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        choices = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
        found |= {prefix + name: field} if section is None else fields(section, f"{prefix}{name}.")
    return found


def test_defaults_are_those_of_the_reference() -> None:
    config = load_config(SMALL)
    assert config.memory.ram == 64 * MiB and config.memory.page == "auto"
    assert config.ssd.direct == "auto" and config.ssd.checksums and config.ssd.max_request == 16 * MiB
    assert config.optimizer.betas == (0.9, 0.95) and config.optimizer.lr == 3e-4
    assert config.model is config.data is config.train is config.output is None


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml", "toml"])
def test_each_kind_of_file_reads_the_same(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"run.{suffix}"
    raw = changed(("optimizer.betas", [0.8, 0.9]), ("optimizer.no_decay", ["1d"]))
    toml = '[memory]\nram = "64MiB"\n[ssd]\npaths = ["pages"]\n[optimizer]\nbetas = [0.8, 0.9]\nno_decay = ["1d"]\n'
    path.write_text({"json": json.dumps(raw), "toml": toml}.get(suffix) or yaml.safe_dump(raw))
    assert load_config(path) == load_config(str(path)) == load_config(raw)


def test_a_configuration_is_itself() -> None:
    config = load_config(SMALL)
    assert load_config(config) is config


def test_the_example_survives_being_saved(tmp_path: Path) -> None:
    config = load_config(ROOT / "examples" / "byte_gpt.toml")
    (tmp_path / "config.json").write_text(config.dumped())
    assert load_config(tmp_path / "config.json") == config


def test_nothing_changes_a_configuration() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config(SMALL).memory.ram = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("memory.rm", 1, "unknown key 'memory.rm'; did you mean 'memory.ram'?"),
        ("updates", {}, "unknown key 'updates'; did you mean 'update'?"),
        ("ram", "4GiB", "unknown key 'ram'; did you mean 'memory.ram'?"),
        ("update.weight_decay", 0, "unknown key 'update.weight_decay'; did you mean 'optimizer.weight_decay'?"),
        (
            "ssd.zzz",
            1,
            "unknown key 'ssd.zzz'; known keys: checksums, direct, limit_mb_per_s, max_request, paths, threads",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_one(name: str, value: Any, said: str) -> None:
    assert complaint((name, value)) == f"configuration: {said}"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"memroy": SMALL["memory"], "ssd": SMALL["ssd"]}, "unknown key 'memroy'; did you mean 'memory'?"),
        ({"memory": {"rma": 1}, "ssd": SMALL["ssd"]}, "unknown key 'memory.rma'; did you mean 'memory.ram'?"),
        (
            {"ssd": SMALL["ssd"], "train": {"step": 1, "batch": 1}},
            "unknown key 'train.step'; did you mean 'train.steps'?",
        ),
    ],
)
def test_a_misspelt_name_comes_first_and_is_not_missing_besides(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"configuration: {said}" and all("memory is missing" in line for line in lines[1:])
    assert len(lines) == (2 if "memory" not in raw and "memroy" not in raw else 1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("memory", 5, "memory must be a section with keys of its own, not 5"),
        ("memory.ram", "lots", "memory.ram: not a size: 'lots'"),
        ("memory.ram", 1.5, "memory.ram: not a size: 1.5"),
        ("memory.ram", True, "memory.ram: not a size: True"),
        ("memory.ram", [1], "memory.ram: not a size: [1]"),
        ("memory.ram", -1, "memory.ram: a size cannot be negative: -1"),
        ("memory.ram", "63KiB", "ram is 63.0 KiB, less than one page of 64.0 KiB; raise ram"),
        ("memory.page", "3MiB", "it must be a power of two from 64KiB to 64MiB"),
        ("memory.page", "128MiB", "it must be a power of two from 64KiB to 64MiB"),
        ("memory.page", None, "memory.page: not a size: None"),
        ("ssd.paths", "pages", "ssd.paths: Input should be a valid list, not 'pages'"),
        ("ssd.paths", [], "ssd.paths is empty; name at least one"),
        ("ssd.paths", ["a", "./a"], "paths name the same folder twice"),
        ("ssd.direct", "yes", "ssd.direct: must be \"auto\", true or false, not 'yes'"),
        ("ssd.direct", 1, 'ssd.direct: must be "auto", true or false, not 1'),
        ("ssd.threads", "4", "ssd.threads: Input should be a valid integer, not '4'"),
        ("ssd.threads", True, "ssd.threads: Input should be a valid integer, not True"),
        ("ssd.max_request", 5000, "it must be a multiple of 4096"),
        ("ssd.limit_mb_per_s", 0, "ssd.limit_mb_per_s: "),
        ("seed", -1, "seed: "),
        ("device", "cuda", 'device is "cuda": set memory.device'),
        ("optimizer.lr", float("nan"), "optimizer.lr: Input should be a finite number, not nan"),
        ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1: Input should be less than 1, not 1.0"),
        ("optimizer.betas", [0.9], "optimizer.betas is too short: [0.9]"),
        ("optimizer.nesterov", True, 'optimizer: nesterov needs name "sgd" and a momentum above 0'),
        ("update.clip_norm", 0, "update.clip_norm: "),
        ("model", {"factory": "no_colon"}, "model.factory: "),
        ("model", {}, "model.factory is missing"),
        ("train", {"steps": 3, "batch": 1, "seq": 1, "warmup_steps": 4}, "warmup_steps is 4, more than steps (3)"),
        ("output", {"run": "pages"}, "output.run (pages) lies in the page-file folder pages"),
        ("output", {"run": "pages/log"}, "output.run (pages/log) lies in the page-file folder pages"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name: str, value: Any, said: str) -> None:
    message = complaint((name, value))
    assert said in message and len(message.splitlines()) == 1


def test_page_files_may_lie_in_the_run_folder() -> None:
    load_config(changed(("output.run", "run"), ("ssd.paths", ["run/pages"])))


def test_every_mistake_has_its_line() -> None:
    lines = complaint(("memory.page", "x"), ("ssd.threads", 0), ("optimiser", {})).splitlines()
    assert len(lines) == 3
    assert lines[0] == "configuration: unknown key 'optimiser'; did you mean 'optimizer'?"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.ini", b"", "unknown kind of file '.ini'; use .toml, .json, .yaml or .yml"),
        ("run.toml", b"= 3", "Invalid"),
        ("run.json", b"{", "Expecting"),
        ("run.json", b"[1]", "holds a list, not a mapping of sections"),
        ("run.yaml", b"a: [1", "while parsing"),
        ("run.yaml", b"", "holds a NoneType, not a mapping of sections"),
        ("run.toml", b"\xff\xfe", "can't decode"),
    ],
)
def test_an_unreadable_file_is_named_in_one_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / name}: ") and said in message and len(message.splitlines()) == 1


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.toml: No such file"):
        load_config(tmp_path / "absent.toml")


@given(st.integers(1, 1 << 45))
def test_automatic_page_is_the_largest_power_of_two_that_is_asked_for(ram_bytes: int) -> None:
    page = resolve_page_bytes(ram_bytes)
    assert page & (page - 1) == 0 and 64 * KiB <= page <= 4 * MiB
    assert page == 64 * KiB or page <= ram_bytes // 128
    assert page <= 256 * KiB or page <= ram_bytes // 4096
    assert page >= 256 * KiB or 2 * page > ram_bytes // 128
    assert page == 4 * MiB or 2 * page > min(ram_bytes // 128, ram_bytes // 4096)


def test_every_key_is_read_by_the_engine() -> None:
    """A key that no code asks for would be a promise without anything behind it."""
    asked: set[str] = set()
    for package in ("offload", "optim", "scheduler", "pagemem"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "config.py":
                tree = ast.parse(path.read_text())
                asked |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    choices_of_one = {"device", "update.mode"}  # Their other values are refused when the file is read.
    unread = {name for name in fields() if name.rpartition(".")[2] not in asked} - choices_of_one
    assert not unread


def test_every_key_is_described() -> None:
    assert [name for name, field in fields().items() if not field.description] == []


def test_the_reference_page_is_current() -> None:
    page = ROOT / "docs" / "configuration.md"
    fresh = runpy.run_path(str(ROOT / "docs" / "configuration_reference.py"))["reference"]()
    assert page.read_text() == fresh, "run: python docs/configuration_reference.py"


def test_the_reference_page_has_every_key_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.+?) \| .+ \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(fields())
    for name, shown in rows:
        field = fields()[name]
        if field.is_required():
            assert shown == "required", name
            continue
        default = json.loads(json.dumps(field.default))
        written = json.loads(shown.strip("`").replace("none", "null"))
        if name == "ssd.max_request":
            written = load_config(changed((name, written))).ssd.max_request
        assert written == default, name


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_a_device_that_there_is_not_is_named(device: str) -> None:
    assert 'device: must be "cpu", "cuda", "cuda:N" or "cpu-emulated", not ' in complaint(("device", device))


def test_a_dtype_alone_is_for_an_own_loop() -> None:
    config = load_config(changed(("model", {"dtype": "bf16"}), ("train", {"steps": 1, "batch": 1, "seq": 1})))
    assert config.model is not None and config.model.dtype == "bf16" and not config.model.has_factory
    with pytest.raises(ConfigError, match=r"^plan needs model\.factory as well$"):
        config.require("plan", "model", "train")
