"""Manifests: what is written is what is read, and a file that was cut or changed anywhere is refused whole."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from pagemem.durable.manifest import FORMAT, Manifest, StoredTensor
from pagemem.errors import CommitError
from pagemem.frames.page import Extent, FrameId, FrameRun, TensorId
from pagemem.tier import Tier

NUMBERS = st.integers(1, 2**40 - 1)
IN_PAGE = st.integers(0, 1 << 26)
LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
STATES = st.dictionaries(
    st.text(max_size=12),
    st.recursive(
        PLAIN,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=8,
    ),
    max_size=5,
)
TENSORS = st.builds(
    StoredTensor,
    name=LINES,
    tag=st.sampled_from(["parameter", "moment", "master"]),
    n_bytes=NUMBERS,
    runs=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4).map(tuple),
    tail=st.none() | st.tuples(NUMBERS, IN_PAGE, IN_PAGE),
    sums=st.lists(st.integers(0, 2**64 - 1), max_size=5).map(tuple),
)
MANIFESTS = st.builds(
    Manifest,
    number=NUMBERS,
    name=st.none() | LINES,
    created=LINES,
    step=NUMBERS,
    page_bytes=st.sampled_from([1 << shift for shift in range(16, 27)]),
    run_ids=st.lists(LINES, min_size=1, max_size=3, unique=True).map(tuple),
    checksums=st.booleans(),
    tensors=st.lists(TENSORS, max_size=3, unique_by=lambda tensor: tensor.key).map(tuple),
    state=STATES,
)


def small(**changed: Any) -> Manifest:
    """A manifest short enough to damage at every byte."""
    tensor = StoredTensor("blocks.0", "parameter", 70_000, ((3, 1),), (9, 4096, 8192), (2**64 - 1, 7))
    made = Manifest(
        12, "best", "2026-01-01T00:00:00+00:00", 40, 65536, ("a", "b"), True, (tensor,), {"lr": 0.1, "é": [1, None]}
    )
    return replace(made, **changed)


@given(MANIFESTS)
def test_what_was_encoded_is_decoded(manifest: Manifest) -> None:
    found = Manifest.decode(manifest.encode())
    assert found == manifest
    assert json.dumps(found.state) == json.dumps(manifest.state), "also -0.0, which equals 0.0"


def test_a_file_that_was_cut_anywhere_is_refused() -> None:
    content = small().encode()
    for length in range(len(content)):
        with pytest.raises(CommitError):
            Manifest.decode(content[:length])


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_a_file_of_which_any_byte_was_changed_is_refused(flip: int) -> None:
    content = small().encode()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= flip
        with pytest.raises(CommitError):
            Manifest.decode(bytes(changed))


@pytest.mark.parametrize("more", [b"\0", b"\n", b"x" * 4096])
def test_a_file_with_more_at_its_end_is_refused(more: bytes) -> None:
    with pytest.raises(CommitError, match="bytes after its header"):
        Manifest.decode(small().encode() + more)


@given(st.binary(max_size=200))
def test_what_was_never_a_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(CommitError, match="not a commit of this version"):
        Manifest.decode(content)


@pytest.mark.parametrize(
    "body", [b"{}", b"[]", b"3", b'{"tensors": 3}', b'{"tensors": [{}], "run_ids": []}', b"{", b"\xff"]
)
def test_content_that_is_whole_and_no_manifest_is_refused(body: bytes) -> None:
    """Made by a program that knows the format of the header and no more."""
    header = f"{FORMAT} {len(body)} {xxh3_128_hexdigest(body)}\n".encode()
    with pytest.raises(CommitError, match="cannot be read"):
        Manifest.decode(header + body)


@pytest.mark.parametrize("state", [{"lr": float("nan")}, {"lr": float("inf")}, {"at": object()}, {"x": {1, 2}}])
def test_what_json_cannot_say_is_refused_when_it_is_written(state: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        small(state=state).encode()


def test_a_stored_tensor_says_where_its_extents_lie() -> None:
    [tensor] = small().tensors
    placed = tensor.placement()
    assert (placed.tier, placed.tensor, placed.n_bytes) == (Tier.SSD, TensorId(-1), 70_000)
    assert placed.runs == (FrameRun(FrameId(3), 1),) and placed.tail == Extent(FrameId(9), 4096, 8192)
    assert tensor.key == "parameter: blocks.0"
    assert replace(tensor, tail=None).placement().tail is None
