"""What wrong input is tried with: a small run, files that are no configuration, and a caller that expects one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tally
import torch

from offload import cli


def run_config(folder: Path) -> dict[str, Any]:
    """A small run, whole."""
    return {
        "memory": {"ram": "768KiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 1},
        "model": {
            "factory": "examples.byte_gpt:byte_gpt",
            "arguments": {"d_model": 64, "n_layer": 1, "n_head": 4, "seq": 16},
        },
        "data": {"factory": "launch_data:ending_text", "arguments": {"at": 1}},
        "train": {"steps": 3, "batch": 2, "seq": 16, "threads": 1, "evaluate_batches": 1},
        "output": {"run": str(folder / "run")},
    }


FILES: dict[str, bytes] = {
    "syntax.toml": b"[memory\n",
    "syntax.json": b'{"memory": ',
    "syntax.yaml": b"memory: [1\n  x: {",
    "encoding.toml": b"seed = '\xff'",
    "encoding.json": b"\xff\xfe{}",
    "zeros.toml": b"\0" * 100,
    "empty.json": b"",
    "empty.yaml": b"",
    "list.json": b"[1, 2]",
    "text.yaml": b"hello",
    "number.json": b"3",
    "null.json": b"null",
    "deep.json": b"[" * 100_000,
    "deep.toml": b"a = " + b"[" * 50_000,
    "deep.yaml": b"[" * 20_000,
    "digits.json": b'{"seed": ' + b"9" * 5000 + b"}",
    "digits.toml": b"seed = " + b"9" * 5000,
    "twice.toml": b"seed = 1\nseed = 2\n",
    "tag.yaml": b"!!python/object/apply:os.getcwd []",
    "date.yaml": b"seed: 2024-99-99",
    "key.yaml": b"{1: 2, [3]: 4}",
    "endless.yaml": b"&a [*a]",
    "repeated.yaml": b"a: &a [x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(ord("a"), ord("k"))),
    "large.json": b'{"seed": "' + b"x" * (5 << 20) + b'"}',
    "kind.ini": b"",
    "kind": b"",
}


@pytest.fixture
def threads_kept() -> Iterator[None]:
    """Runs set torch's compute threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused(
    tmp_path: Path,
    threads_kept: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Callable[..., str]:
    """Call the command in an empty folder; it must say one line, fail, and leave everything as it was, but for a cache
    that the data's own factory has made. Returns the line."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    noted = request.node.user_properties
    noted.append((tally.PROPERTY, ("wrong input: one line, exit code 1 or 2, nothing made", 0, 0, "")))
    at = len(noted) - 1

    def call(*arguments: str, codes: tuple[int, ...] = (1, 2)) -> str:
        what, trials, *_ = noted[at][1]
        noted[at] = (tally.PROPERTY, (what, trials + 1, 1, str(arguments)))  # a failure, until it is known to be none
        line = tried(*arguments, codes=codes)
        noted[at] = (tally.PROPERTY, (what, trials + 1, 0, ""))
        return line

    def tried(*arguments: str, codes: tuple[int, ...]) -> str:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        try:
            code: Any = cli.main(list(arguments))
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        where = f"{arguments}: {code}, {said.err!r}"
        assert (
            code in codes and said.err.count("\n") == 1 and ": error: " in said.err and "Traceback" not in said.err
        ), where
        made = {path.name for path in tmp_path.rglob("*") if path not in before}
        assert made in (set(), {"run", "offload-run.json", "data", "train.bin", "validation.bin"}), where
        if made:
            shutil.rmtree(tmp_path / "run")
        return said.err

    return call
