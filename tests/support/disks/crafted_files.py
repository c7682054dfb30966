"""A small launched run, and its files damaged or crafted in hundreds of ways: by field, by byte, by kind of file.

A crafted manifest has a right header and checksum: whoever can write to the folder can compute one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from damages import Damage, body_of, manifest_of, newest, write_manifest
from field_damages import field_damages
from launch_data import sentence_text
from place_damages import place_damages
from torch import Tensor, nn
from xxhash import xxh3_128_hexdigest

from examples.byte_corpus import ByteCorpus
from offload.config_loading import load_config
from offload.console.output import Output
from offload.launch.train import launch


class Small(nn.Module):
    """Embedding, a normalisation with buffers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(256, 64), nn.BatchNorm1d(64), nn.Linear(64, 256)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.head(self.norm(self.embed(x).flatten(0, 1))), y.flatten())


def small_model() -> nn.Module:
    """The factory of the model."""
    return Small()


def small_data(folder: Path, seed: int) -> ByteCorpus:
    """The factory of the data."""
    return sentence_text(folder, seed)


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """A configuration of a run in ``folder``, with a commit after every step."""
    return {
        "memory": {"ram": "1MiB", "page": "64KiB"},
        "ssd": {"paths": [str(folder / "pages")], "threads": 1},
        "commit": {"every_steps": 1, "keep": 2},
        "model": {"factory": "crafted_files:small_model"},
        "data": {"factory": "crafted_files:small_data"},
        "train": {"steps": steps, "batch": 2, "seq": 16, "evaluate_batches": 0, "log_every": 1000},
        "output": {"run": str(folder / "log")},
    }


def small_run(folder: Path, steps: int = 3) -> None:
    """Train it; the page file is cut to what commits name, so that it can be copied often."""
    launch(load_config(settings(folder, steps)), Output(quiet=True))
    reached = max(
        [first + n for t in manifest_of(folder)[1]["tensors"] for first, n in t["runs"]]
        + [t["tail"][0] + 1 for t in manifest_of(folder)[1]["tensors"] if t["tail"]]
    )
    others = [first + n for number in (1, 2, 3) for t in _tensors(folder, number) for first, n in t["runs"]]
    tails = [t["tail"][0] + 1 for number in (1, 2, 3) for t in _tensors(folder, number) if t["tail"]]
    os.truncate(folder / "pages" / "pages.bin", max([reached, *others, *tails]) << 16)


def _toml(raw: dict[str, Any]) -> str:
    lines = []
    for section, keys in raw.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def _tensors(folder: Path, number: int) -> list[Any]:
    path = folder / "pages" / "commits" / f"commit-{number:08d}.json"
    return body_of(path)["tensors"] if path.exists() else []


# ---- by field -------------------------------------------------------------------------------------------------------


# ---- by byte and by kind --------------------------------------------------------------------------------------------


def byte_damages(file: str, find: Callable[[Path], Path], n_bytes: int, draw: random.Random) -> Iterator[Damage]:
    """Flipped bits, cuts at many lengths, zeroed blocks, and more at the end."""

    def edit(change: Callable[[bytearray], bytes]) -> Callable[[Path], None]:
        return lambda folder: (path := find(folder)).write_bytes(change(bytearray(path.read_bytes()))) and None

    def flip(content: bytearray, place: int, bit: int) -> bytes:
        content[place % len(content)] ^= 1 << bit
        return bytes(content)

    def zero(content: bytearray, place: int) -> bytes:
        content[place : place + 512] = bytes(len(content[place : place + 512]))
        return bytes(content)

    for _ in range(6):
        place, bit = draw.randrange(n_bytes), draw.randrange(8)
        yield Damage(
            file, f"bit {bit} of byte {place} flipped", edit(lambda c, place=place, bit=bit: flip(c, place, bit))
        )
    for length in sorted({0, 1, 7, 8, 9, n_bytes // 2, n_bytes - 1, *(draw.randrange(n_bytes) for _ in range(3))}):
        yield Damage(file, f"cut to {length} bytes", edit(lambda c, length=length: bytes(c[:length])))
    for place in (0, n_bytes // 3 // 512 * 512):
        yield Damage(file, f"zeros from byte {place}", edit(lambda c, place=place: zero(c, place)))
    yield Damage(file, "a line more", edit(lambda c: bytes(c) + b"more\n"))


def kind_damages(file: str, find: Callable[[Path], Path]) -> Iterator[Damage]:
    """Something else than a file in its place."""

    def instead(make: Callable[[Path, Path], object]) -> Callable[[Path], None]:
        def do(folder: Path) -> None:
            path = find(folder)
            path.unlink(missing_ok=True)
            make(path, folder)

        return do

    def huge(path: Path, folder: Path) -> None:
        with open(path, "wb") as made:
            made.truncate(8 << 30)

    def bind(path: Path, folder: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(path.parent, os.O_RDONLY)
            try:
                made.bind(f"/proc/self/fd/{here}/{path.name}")
            finally:
                os.close(here)

    yield Damage(file, "a FIFO", instead(lambda path, folder: os.mkfifo(path)))
    yield Damage(file, "a folder", instead(lambda path, folder: path.mkdir()))
    yield Damage(file, "a socket", instead(bind))
    yield Damage(file, "a link to nothing", instead(lambda path, folder: path.symlink_to("nothing")))
    yield Damage(
        file,
        "a link to a file outside",
        instead(lambda path, folder: path.symlink_to(folder.parent / "outside" / "file")),
    )
    yield Damage(file, "a link to /dev/zero", instead(lambda path, folder: path.symlink_to("/dev/zero")))
    yield Damage(file, "8 GiB of zeros", instead(huge))
    yield Damage(file, "missing", instead(lambda path, folder: None))


# ---- all of them ----------------------------------------------------------------------------------------------------


def _side(folder: Path) -> Path:
    return newest(folder).with_suffix(".safetensors")


def _with_side(folder: Path, content: bytes) -> None:
    """Side file of the newest commit, and what its manifest says of it."""
    path, body = manifest_of(folder)
    body["state"]["sidecar"] = {"n_bytes": len(content), "xxh3": xxh3_128_hexdigest(content)}
    write_manifest(path, json.dumps(body).encode())
    _side(folder).write_bytes(content)


def _side_damages(folder: Path) -> Iterator[Damage]:
    content = _side(folder).read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + n_header]), content[8 + n_header :]

    def write(folder: Path, body: bytes) -> None:
        _with_side(folder, len(body).to_bytes(8, "little") + body + data)

    yield from field_damages(header, write, "side")
    name = next(name for name in header if name != "__metadata__")
    begin, end = header[name]["data_offsets"]
    for what, entry in {
        "an offset beyond the end": {"data_offsets": [begin, 2**50]},
        "an overlap": {"data_offsets": [begin, end + 4]},
        "turned": {"data_offsets": [end, begin]},
        "a huge shape": {"shape": [2**50, 2**50]},
        "another shape": {"shape": [1, 1, 1]},
        "an unknown dtype": {"dtype": "F1"},
        "an attribute for a dtype": {"dtype": "__class__"},
        "another dtype": {"dtype": "I32"},
        "a dtype that is never written": {"dtype": "F8_E8M0", "shape": [end - begin]},
        "half a byte": {"dtype": "F4", "shape": [2 * (end - begin)]},
        "no elements of 2^63 rows": {"shape": [2**63, 0], "data_offsets": [begin, begin]},
        "no elements of 2^53 rows": {"shape": [2**53, 2**53, 0], "data_offsets": [begin, begin]},
    }.items():
        body = json.dumps({**header, name: {**header[name], **entry}}).encode()
        yield Damage("side", what, lambda folder, body=body: write(folder, body))
    renamed = json.dumps({f"\x1b[2J{key}\n" if key == name else key: entry for key, entry in header.items()}).encode()
    yield Damage("side", "a name that clears the screen", lambda folder: write(folder, renamed))
    for what, n_bytes in (
        ("a header longer than the file", 2**40),
        ("a header of no bytes", 0),
        ("a header of 2^64 bytes", 2**64 - 1),
    ):
        made = n_bytes.to_bytes(8, "little") + content[8:]
        yield Damage("side", what, lambda folder, made=made: _with_side(folder, made))
    yield Damage("side", "more at its end", lambda folder: _with_side(folder, content + bytes(64)))
    yield Damage("side", "7 bytes", lambda folder: _with_side(folder, content[:7]))


CONFIGS: dict[str, str] = {
    "laughs.yaml": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself.yaml": "memory: &m {ram: *m}\n",
    "itself2.yaml": "memory: &m\n  ram: 1MiB\n  page: *m\n",
    "merge.yaml": "a: &a {b: 1}\nmemory: {<<: [*a, *a]}\n",
    "deep.yaml": "[" * 30_000,
    "deepblock.yaml": "- " * 30_000,
    "deep.json": "[" * 60_000,
    "deep.toml": "a = " + "[" * 60_000,
    "deepkeys.toml": "a" + ".a" * 30_000 + " = 1",
    "object.yaml": "!!python/object/apply:os.system ['true']",
    "tag.yaml": "memory: !!binary '%%'",
    "twice.yaml": "memory: {ram: 1MiB}\nmemory: {ram: 2MiB}",
    "twice.json": '{"memory": {"ram": 1}, "memory": {"ram": 2}}',
    "twice.toml": "[memory]\nram = 1\n[memory]\nram = 2",
    "nan.json": '{"memory": {"ram": NaN}}',
    "inf.toml": "[memory]\nram = inf",
    "huge.toml": "[memory]\nram = " + "9" * 5000,
    "huge.json": '{"memory": {"ram": ' + "9" * 5000 + "}}",
    "huge.yaml": "memory: {ram: " + "9" * 5000 + "}",
    "exp.yaml": "memory: {ram: 1.0e+999}",
    "empty.toml": "",
    "empty.yaml": "",
    "empty.json": "",
    "list.json": "[]",
    "text.yaml": "just text",
    "number.json": "3",
    "null.json": "null",
    "binary.toml": "\x00\x01\x02",
    "bom.json": "\ufeff{}",
    "large.toml": "# " + "x" * (1 << 20),
    "large.yaml": "a: [" + "1, " * 60_000 + "1]",
    "date.toml": "[memory]\nram = 1979-05-27",
    "date.yaml": "memory: {ram: 2026-99-99}",
    "none.ini": "[memory]",
    "control.json": '{"mem\\u0007ory\\n": 1}',
    "section.toml": "memory = 3",
    "tabs.yaml": "memory:\n\tram: 1",
    "many.toml": "\n".join(f"k{n} = 1" for n in range(5000)),
    "surplus.toml": "[memory]\nram = '1MiB'\n[ssd]\npaths = ['x']\n[other]\na = 1",
}


def all_damages(folder: Path) -> list[Damage]:
    """Everything that is done to the run in ``folder``."""
    draw = random.Random(5)
    path, body = manifest_of(folder)
    made = list(place_damages(folder))
    made += field_damages(body, lambda folder, content: write_manifest(newest(folder), content), "manifest")
    made += byte_damages("manifest", newest, path.stat().st_size, draw)
    made += kind_damages("manifest", lambda folder: folder / "pages" / "commits" / path.name)
    made += _side_damages(folder)
    made += byte_damages("side", _side, _side(folder).stat().st_size, draw)
    made += kind_damages("side", lambda folder: folder / "pages" / "commits" / f"{path.stem}.safetensors")
    for file, name in (
        ("identity", "pages/pagemem.json"),
        ("run identity", "log/offload-run.json"),
    ):
        content = (folder / name).read_bytes()
        made += field_damages(
            json.loads(content), lambda folder, body, name=name: (folder / name).write_bytes(body) and None, file
        )
        made += byte_damages(file, lambda folder, name=name: folder / name, len(content), draw)
        made += kind_damages(file, lambda folder, name=name: folder / name)
    made += byte_damages(
        "metrics",
        lambda folder: folder / "log" / "metrics.jsonl",
        (folder / "log" / "metrics.jsonl").stat().st_size,
        draw,
    )
    made += kind_damages("metrics", lambda folder: folder / "log" / "metrics.jsonl")
    made += kind_damages("pages", lambda folder: folder / "pages" / "pages.bin")
    made += kind_damages("lock", lambda folder: folder / "pages" / "pagemem.lock")
    for content in (b"", b"\xff" * 100, b"1\n2\n", b"\x1b[2J\n", bytes(1 << 20)):
        made.append(
            Damage(
                "lock",
                f"holds {content[:8]!r}",
                lambda folder, content=content: (folder / "pages" / "pagemem.lock").write_bytes(content) and None,
            )
        )
    for name, text in CONFIGS.items():
        made.append(
            Damage("config", name, lambda folder, name=name, text=text: (folder / name).write_text(text) and None)
        )
    made += kind_damages("config", lambda folder: folder / "config.toml")
    made += byte_damages("config", lambda folder: folder / "config.toml", len(_toml(settings(folder, 4))), draw)
    return made


def copied(base: Path, to: Path) -> Path:
    """A copy of a run, with a configuration that makes one step more."""
    shutil.copytree(base, to, symlinks=True)
    (to / "config.toml").write_text(_toml(settings(to, 4)))
    return to


torch.manual_seed(0)
