"""`offload config`: a configuration file with every key, its description and its default, in TOML."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from pydantic.fields import FieldInfo

from offload.config import Config
from offload.config_errors import sections
from pagemem.units import MiB

_HEAD: Final = """\
Every key of a configuration file, at its default. Edit the lines that end in "required": they have no default, their
values are examples. model.factory and data.factory name functions of your own, in a file of the current folder or an
installed module. In a training loop of your own only memory.ram and ssd.paths are required; leave the sections model,
data, train and output out there, they are for `offload launch`.\
"""


def config_template() -> str:
    """The file; what is read from it equals a configuration with the required keys alone."""
    nested = sections(Config)
    lines = [*_comment(_HEAD), ""]
    lines += [line for name, field in Config.model_fields.items() if name not in nested for line in _key(name, field)]
    for name, section in nested.items():
        lines += ["", *_comment(section.__doc__ or ""), f"[{name}]", ""]
        lines += [line for key, field in section.model_fields.items() for line in _key(key, field)]
    return "\n".join(lines).rstrip() + "\n"


def _key(name: str, field: FieldInfo) -> Iterator[str]:
    yield from _comment(field.description or "")
    value = (field.examples or [None])[0] if field.is_required() else field.get_default()
    if value is None:
        yield f"# {name} = (not set)"
    else:
        yield f"{name} = {_toml(value)}" + ("  # required" if field.is_required() else "")
    yield ""


def _toml(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= MiB and value % MiB == 0:
        return f'"{value // MiB}MiB"'
    return json.dumps(value)


def _comment(text: str) -> list[str]:
    paragraph = " ".join(text.replace("``", "`").split())
    return [f"# {line}" for line in textwrap.wrap(paragraph, 118)]
