"""Write docs/configuration.md from the fields and docstrings of offload/config.py.

Usage: ``python docs/configuration_reference.py``
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from offload.config import Config
from pagemem.units import MiB

PAGE: Final = Path(__file__).with_name("configuration.md")

_INTRODUCTION: Final = """\
# Configuration

<!-- Generated from offload/config.py by `python docs/configuration_reference.py`; edit the docstrings there. -->

The configuration is one file (TOML, JSON or YAML) or a mapping. Sizes are bytes or text such as `"4GiB"`. An unknown
key is an error that names the nearest known one. Only `memory.ram` and `ssd.paths` are required everywhere. The
sections `model`, `data`, `train` and `output` are for [`offload launch`](launch.md); any engine reads `model.dtype`.

`--set section.key=value` changes one value on the command line and may be repeated. `offload config` prints a file with
every key, its description and its default.
"""


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or None for a single value."""
    choices = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the configuration, dotted, with its field."""
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is None:
            yield prefix + name, field
        else:
            yield from keys(section, f"{prefix}{name}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, int) and not isinstance(value, bool) and value >= MiB:
        return f'`"{value // MiB}MiB"`'
    return f"`{json.dumps(value)}`"


def _markdown(text: str) -> str:
    """A docstring as one cell of a table."""
    return re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|").strip()


def reference() -> str:
    """The whole page."""
    lines = [_INTRODUCTION]
    section = None
    for name, field in keys():
        found = name.rpartition(".")[0]
        if found != section:
            section = found
            title = f"`{section}`" if section else "Top level"
            lines.append(f"\n## {title}\n\n| key | default | meaning |\n|---|---|---|\n")
        lines.append(f"| `{name}` | {_default(field)} | {_markdown(field.description or '')} |\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(reference())
