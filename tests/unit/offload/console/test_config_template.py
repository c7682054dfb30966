"""The commented configuration file: every key, its description and its default, and it can be loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from offload.cli import main
from offload.config import Config
from offload.config_errors import sections
from offload.config_loading import load_config
from offload.console.config_template import config_template

REQUIRED = {
    "memory": {"ram": "4GiB"},
    "ssd": {"paths": ["runs/example/pages"]},
    "model": {"factory": "my_module:make_model"},
    "data": {"factory": "my_module:make_data"},
    "train": {"steps": 1000, "batch": 8},
    "output": {"run": "runs/example/log"},
}


def test_what_is_read_from_it_are_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    assert printed == config_template()
    (tmp_path / "run.toml").write_text(printed)
    assert load_config(tmp_path / "run.toml") == load_config(REQUIRED)


def test_every_key_is_there_once_with_its_description() -> None:
    lines = config_template().splitlines()
    assert max(map(len, lines)) <= 120
    words = " ".join(line.removeprefix("# ") for line in lines)
    nested = sections(Config)
    for section, model in (("", Config), *nested.items()):
        begin = lines.index(f"[{section}]") if section else 0
        end = next((at for at in range(begin + 1, len(lines)) if re.match(r"\[", lines[at])), len(lines))
        for name, field in model.model_fields.items():
            if section or name not in nested:
                found = [line for line in lines[begin:end] if re.match(rf"(# )?{name} = ", line)]
                assert len(found) == 1, (section, name)
                assert ("# required" in found[0]) == field.is_required()
                assert " ".join(str(field.description).replace("``", "`").split()) in words
