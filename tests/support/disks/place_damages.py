"""Manifests whose numbers and names do not fit together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from damages import Damage, manifest_of, newest, write_manifest
from field_damages import changed

#: What is wrong, where in a manifest, and the value that is put there.
WRONG_VALUES: tuple[tuple[str, tuple[str | int, ...], Any], ...] = (
    ("page_bytes that are no power of two", ("page_bytes",), 65537),
    ("other pages than those before", ("page_bytes",), 131072),
    ("another number", ("number",), 77),
    ("another run's id", ("run_ids", 0), "x"),
    ("two run ids", ("run_ids",), ["x", "y"]),
    ("no run id", ("run_ids",), []),
    ("no tensors", ("tensors",), []),
    ("an optimizer that is none", ("state", "optimizer"), "Lion"),
    ("a group of another kind", ("state", "groups", 0, "betas"), [0.9]),
    ("a rate below 0", ("state", "groups", 0, "lr"), -1.0),
    ("an unknown encoding", ("state", "encoding"), 3),
    ("random numbers for a generator", ("state", "random", "torch"), "AAAA"),
    ("a generator of another kind", ("state", "random", "numpy", 0), "PCG64"),
    ("a position beyond the end", ("state", "random", "numpy", 2), 625),
    ("no base64", ("state", "random", "torch"), "%%"),
    ("a slice that ends before it begins", ("state", "units", 0, "slices", 0, "end"), 0),
    ("a parameter beyond its tensor", ("state", "units", 0, "slots", 0, "offset"), 2**40),
    ("a dtype that is a module", ("state", "units", 0, "dtype"), "nn"),
    ("a parameter in a tensor that is not there", ("state", "units", 0, "parameters"), "parameter: none"),
    ("a shape of 10^30 elements", ("state", "units", 0, "slots", 0, "shape"), [10**15, 10**15]),
    ("65 dimensions", ("state", "units", 0, "slots", 0, "shape"), [1] * 65),
    ("a tag that is none", ("state", "tracked", "launch"), {"$type": "object", "v": 1}),
    (
        "an array of 10^12 numbers",
        ("state", "tracked", "launch"),
        {"$type": "ndarray", "dtype": "<f4", "shape": [10**12], "v": ""},
    ),
    ("a state of another kind", ("state", "tracked", "launch"), 7),
    ("paths with a zero byte", ("state", "config", "ssd", "paths"), ["a\0b"]),
)


def place_damages(folder: Path) -> Iterator[Damage]:
    """Frames out of range or used twice, sizes against pages, names that are none."""
    _, body = manifest_of(folder)
    one = next(place for place, tensor in enumerate(body["tensors"]) if tensor["runs"])
    other = next(place for place, tensor in enumerate(body["tensors"]) if tensor["runs"] and place != one)
    tensor, taken = body["tensors"][one], body["tensors"][other]["runs"][0][0]
    n_frames = tensor["runs"][0][1]
    for what, entry in {
        "a frame beyond the file": {"runs": [[10**6, n_frames], *tensor["runs"][1:]]},
        "10^9 frames": {"runs": [[0, 10**9]]},
        "10^12 frames and bytes": {"runs": [[0, 10**9]], "n_bytes": 10**9 << 16, "tail": None},
        "a frame twice": {"runs": [[taken, n_frames], *tensor["runs"][1:]]},
        "a run of no frames": {"runs": [[0, 0]]},
        "a tail beyond its page": {"tail": [0, 61440, 8192]},
        "a tail not in blocks": {"tail": [0, 100, 4096]},
        "a tail of two numbers": {"tail": [0, 4096]},
        "a sum less": {"sums": tensor["sums"][1:]},
        "a sum more": {"sums": [*tensor["sums"], 1]},
        "a sum beyond 64 bits": {"sums": [2**64, *tensor["sums"][1:]]},
        "a tag that is none": {"tag": "gradient"},
        "a size not in blocks": {"n_bytes": tensor["n_bytes"] + 1},
        "a size of another number of pages": {"n_bytes": tensor["n_bytes"] + (1 << 20)},
        "a name with a slash": {"name": "../../etc"},
        "a name with a bell": {"name": "a\a"},
        "the name of another": {"name": body["tensors"][other]["name"], "tag": body["tensors"][other]["tag"]},
    }.items():
        made = json.dumps(changed(body, ("tensors", one), {**tensor, **entry})).encode()
        yield Damage("manifest", what, lambda folder, made=made: write_manifest(newest(folder), made))
    for what, path, value in WRONG_VALUES:
        made = json.dumps(changed(body, path, value)).encode()
        yield Damage("manifest", what, lambda folder, made=made: write_manifest(newest(folder), made))
