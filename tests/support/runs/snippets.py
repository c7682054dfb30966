"""Code and commands in Markdown pages, and how a test runs them as written.

A block that cannot run has ``<!-- not run: REASON -->`` before it; what readers need not see stands in a comment
``<!-- before: CODE -->`` and runs, too. A block whose first line is ``# NAME.toml`` or ``# NAME.py`` is written to that
file.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from offload.cli import main

#: Languages of blocks that are run or parsed, and of those that are only shown.
RUN: Final = frozenset({"python", "console", "bash", "toml"})
SHOWN: Final = frozenset({"text"})

_BLOCK: Final = re.compile(
    r"^<!-- before:\n(?P<before>.*?)^-->$"
    r"|(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, the line it begins at, and why it is not run, if so."""

    language: str
    code: str
    line: int
    not_run: str | None = None


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in order, those in comments included."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["before"] is not None:
            found.append(Block("python", match["before"], line))
        else:
            found.append(Block(match["language"].strip(), match["code"], line, match["reason"]))
    return found


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a console block (lines after ``$``) or of a bash block (all lines), as words."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words:
            yield words


def run_command(words: list[str]) -> None:
    """Run ``offload ...`` or ``python FILE ...`` in this process, which saves the imports; ``> FILE`` takes its output.

    Raises:
        AssertionError: the command failed, or is none of the two.
    """
    if words[-2:-1] == [">"]:
        with Path(words[-1]).open("w") as file, redirect_stdout(file):
            run_command(words[:-2])
    elif words[0] == "offload":
        assert main(words[1:]) == 0, words
    elif words[0] == "python":
        run_script(words[1:])
    else:
        raise AssertionError(f"not a command that a test can run: {words}; say why with <!-- not run: ... -->")


def run_script(words: list[str]) -> None:
    """``python FILE ARGUMENTS``; an exit code other than 0 raises."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv, sys.path[:] = argv, path


def _write_named(block: Block) -> bool:
    """Write a block whose first line is ``# NAME.toml`` or ``# NAME.py`` to that file of the current directory."""
    named = re.match(r"# ([\w/]+\.(?:toml|py))\n", block.code)
    if named is None:
        return False
    Path(named[1]).write_text(block.code)
    return True


def run_page(page: Path) -> None:
    """Run all blocks of a page in order in the current directory, its Python code in one namespace.

    Raises:
        Whatever a block raises, with a note that says where it stands.
    """
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks_of(page):
        if block.not_run is not None or _write_named(block):
            continue
        try:
            if block.language == "python":
                exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
            elif block.language in ("console", "bash"):
                for words in commands_of(block):
                    run_command(words)
            elif block.language == "toml":
                tomllib.loads(block.code)
        except BaseException as error:
            error.add_note(f"in the block at {page}:{block.line}")
            raise
