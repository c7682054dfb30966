"""The byte corpus: what is in it, which side a file falls on, and that batches are what they say."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.byte_corpus import ByteCorpus


def source_files(root: Path, count: int = 40) -> list[Path]:
    """Files of different, recognisable content."""
    root.mkdir()
    for number in range(count):
        (root / f"part_{number}.py").write_bytes(bytes([number]) * (10 + number))
    return sorted(root.iterdir())


def corpus_of(folder: Path, files: list[Path], *, share: float = 0.3, seed: int = 1) -> ByteCorpus:
    """The corpus of files that lie in one folder."""
    return ByteCorpus.of_files(folder, files[0].parent, files, seed=seed, validation_share=share)


def written(folder: Path, training: bytes, validation: bytes, seed: int = 1) -> ByteCorpus:
    """A corpus of exactly these bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "train.bin").write_bytes(training)
    (folder / "validation.bin").write_bytes(validation)
    return ByteCorpus(folder, seed=seed)


def test_every_file_is_whole_on_one_side(tmp_path: Path) -> None:
    files = source_files(tmp_path / "source")
    corpus = corpus_of(tmp_path / "cache", files)
    sides = [bytes(corpus.train), bytes(corpus.validation)]
    assert all(sides)
    for file in files:
        content = file.read_bytes()
        assert [content in side for side in sides].count(True) == 1


def test_a_new_file_moves_no_other(tmp_path: Path) -> None:
    files = source_files(tmp_path / "source")
    before = set(bytes(corpus_of(tmp_path / "a", files[:-1]).validation))
    after = set(bytes(corpus_of(tmp_path / "b", files).validation))
    assert before - after == set() and len(after - before) <= 1


def test_the_cache_is_used_again_while_the_files_are_the_same(tmp_path: Path) -> None:
    files = source_files(tmp_path / "source")
    corpus_of(tmp_path / "cache", files)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert set(before) == {"train.bin", "validation.bin", "corpus.json"}
    corpus_of(tmp_path / "cache", files)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == before


@pytest.mark.parametrize("description", [b"", b"[]", b'{"digest": 3}', b"\xff", None])
def test_an_unfinished_cache_is_written_anew(description: bytes | None, tmp_path: Path) -> None:
    files = source_files(tmp_path / "source")
    whole = bytes(corpus_of(tmp_path / "cache", files).train)
    (tmp_path / "cache" / "train.bin").write_bytes(b"half")
    if description is None:
        (tmp_path / "cache" / "corpus.json").unlink()
    else:
        (tmp_path / "cache" / "corpus.json").write_bytes(description)
    assert bytes(corpus_of(tmp_path / "cache", files).train) == whole


def test_other_files_make_another_corpus(tmp_path: Path) -> None:
    files = source_files(tmp_path / "source")
    before = bytes(corpus_of(tmp_path / "cache", files).train)
    trained_on = next(file for file in files if file.read_bytes() in before)
    trained_on.write_bytes(b"quite different")
    assert b"quite different" in bytes(corpus_of(tmp_path / "cache", files).train)


def test_an_empty_side_is_refused(tmp_path: Path) -> None:
    files = source_files(tmp_path / "source")
    with pytest.raises(ValueError, match=r"no text for validation\.bin"):
        corpus_of(tmp_path / "cache", files, share=0.0)


@given(step=st.integers(0, 10**6), rows=st.integers(1, 5), seq=st.integers(1, 200))
def test_targets_are_the_bytes_after_the_inputs(
    tmp_path_factory: pytest.TempPathFactory, step: int, rows: int, seq: int
) -> None:
    text = bytes(range(201))
    corpus = written(tmp_path_factory.getbasetemp() / "counting", text, text)
    for x, y in [corpus.batch(step, rows, seq), *corpus.validation_batches(2, rows, seq)]:
        assert x.shape == y.shape == (rows, seq) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1)  # The text counts up.
        assert y.max() <= 200


def test_the_whole_text_can_be_drawn(tmp_path: Path) -> None:
    corpus = written(tmp_path / "c", b"abcd", b"wxyz")
    assert {int(corpus.batch(step, 1, 1)[1]) for step in range(64)} == set(b"bcd")
    assert [int(y) for _, y in corpus.validation_batches(3, 1, 1)] == list(b"xyz")


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    text = bytes(range(256)) * 40
    corpus, same, other = (written(tmp_path / str(k), text, text, seed) for k, seed in enumerate((1, 1, 2)))
    corpus.batch(0, 4, 16)  # What was drawn before does not matter.
    assert torch.equal(corpus.batch(7, 4, 16)[0], same.batch(7, 4, 16)[0])
    assert not torch.equal(corpus.batch(7, 4, 16)[0], corpus.batch(8, 4, 16)[0])
    assert not torch.equal(corpus.batch(7, 4, 16)[0], other.batch(7, 4, 16)[0])


@pytest.mark.parametrize(
    ("text", "bits"), [(b"aaaa", 0.0), (b"abababab", 1.0), (b"abcd" * 5, 2.0), (b"aab" * 2 + b"ac", 1.299)]
)
def test_unigram_entropy_of_known_texts(text: bytes, bits: float, tmp_path: Path) -> None:
    assert written(tmp_path / "c", b"ab", text).unigram_entropy_bits() == pytest.approx(bits, abs=1e-3)


def test_a_row_longer_than_the_text_is_refused(tmp_path: Path) -> None:
    corpus = written(tmp_path / "c", b"abcd", b"abcd")
    corpus.batch(0, 1, 3)
    with pytest.raises(ValueError, match="the training text has 4 bytes, a row needs 5"):
        corpus.batch(0, 1, 4)
    with pytest.raises(ValueError, match="the validation text has 4 bytes, a row needs 5"):
        next(corpus.validation_batches(1, 1, 4))


def test_the_standard_library_without_installed_packages(tmp_path: Path) -> None:
    corpus = ByteCorpus.of_standard_library(tmp_path / "c", seed=1, validation_share=0.05)
    n_bytes = len(corpus.train) + len(corpus.validation)
    assert n_bytes > 5_000_000 and 0.02 < len(corpus.validation) / n_bytes < 0.1
    text = bytes(corpus.train) + bytes(corpus.validation)
    assert (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes() in text
    assert Path(torch.__file__).read_bytes() not in text
