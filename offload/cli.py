"""The ``offload`` command. The configuration file is the interface; the command says what to do with it."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import offload
from offload.config import ConfigError, load_config, read_config_file
from offload.launch import INTERRUPTED, launch
from pagemem.errors import OffloadError


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="offload", description="Train models larger than memory out of RAM and SSD.")
    parser.add_argument("--version", action="version", version=f"offload {offload.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("launch", help="train the model of a configuration file")
    run.add_argument("file", metavar="FILE", help="configuration: .toml, .json, .yaml or .yml")
    run.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="changes",
        help="change one value of the file, e.g. --set memory.ram=64MiB; may be given several times",
    )  # fmt: skip
    return parser


def apply_changes(raw: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """``raw`` with each ``section.key=value`` put in; a value is JSON where it is valid JSON, text otherwise.

    Raises:
        ConfigError: a change has no ``=``, or goes through a value that is not a section.
    """
    changed: dict[str, Any] = copy.deepcopy(raw)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: write section.key=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        *sections, key = name.split(".")
        target: Any = changed
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {change}: {section!r} is not a section")
        target[key] = value
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (2, by argparse, for a wrong command line).

    What a caller can put right is one line on stderr; any other exception is a defect and keeps its traceback.
    """
    arguments = build_parser().parse_args(argv)
    try:
        raw = read_config_file(Path(arguments.file))
        return launch(load_config(apply_changes(raw, arguments.changes)))
    except (OffloadError, ValueError, OSError, MemoryError) as error:
        if arguments.debug:
            raise
        where = "" if isinstance(error, (OffloadError, ConfigError)) else " (--debug shows where)"
        for line in (str(error) or type(error).__name__).splitlines():
            print(f"offload: error: {line}{where}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("offload: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
