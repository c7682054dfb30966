"""`offload export`: the weights of a commit as safetensors files, streamed, so that a model of any size needs little
RAM.

The folder appears whole or not at all: everything is written under another name beside it, synced, and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from offload.checkpoint.commit_weights import DTYPES, CommitWeights, ExportError
from offload.checkpoint.safetensors_writer import ShardWriter, index_of, plan_shards, write_failure
from offload.commits.sidecar import Sidecar
from offload.commits.stopped_ranks import StoppedRanks
from offload.commits.stopped_run import StoppedRun
from offload.commits.stored_values import CommitPart, StoredValues
from offload.console.byte_progress import byte_progress
from offload.console.tables import print_line
from offload.sources.checkpoint_index import INDEX_NAME
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.root_folder import RootFolder
from pagemem.errors import DiskFullError, OffloadError
from pagemem.folders.own_file import make_folder, naming, remove_folders, sync_files, sync_folder
from pagemem.process import interrupts
from pagemem.units import format_bytes


def export_run(
    run: Path,
    to: Path,
    *,
    paths: Sequence[Path],
    commit: str | None,
    dtype: str,
    max_shard_bytes: int,
    console: Console,
) -> None:
    """Export a commit of a stopped run. See `offload export --help`.

    Raises:
        RunDirectoryError: the run cannot be used. CommitError: the commit cannot. ExportError: not like this.
        DiskFullError, StorageError: reading or writing failed. Nothing is left of the export in any case.
    """
    with StoppedRanks(run, paths) if RootFolder(run).numbers() else StoppedRun(run, paths) as stopped:
        manifest = stopped.choose(commit)
        for number, error in sorted(stopped.damaged.items()):
            if number > manifest.number:
                print_line(console, f"a newer commit is damaged: {error}")
        parts = stopped.parts(manifest)
        named = f" ({manifest.name})" if manifest.name else ""
        of_ranks = f", {len(parts)} ranks" if len(parts) > 1 else ""
        unverified = "" if manifest.checksums else "; the run kept no checksums, so what is read cannot be verified"
        print_line(
            console,
            f"commit {manifest.number}{named}, step {manifest.step}, of {manifest.created}{of_ranks}{unverified}",
        )
        export_commit(parts, to, dtype=dtype, max_shard_bytes=max_shard_bytes, console=console)


def export_commit(
    parts: Sequence[CommitPart],
    to: Path,
    *,
    dtype: str,
    max_shard_bytes: int,
    console: Console,
    beside: Callable[[Path], None] = lambda _: None,
) -> None:
    """Export a commit whose frames are not reused meanwhile.

    Args:
        parts: of the commit, in rank order.
        to: a new or empty folder.
        beside: writes small files that belong beside the weights into the folder that it is given.

    Raises:
        As `check_request` and `export_run`.
    """
    folders = [folder for part in parts for folder in part.folders]
    to = check_request(folders, to, dtype=dtype, max_shard_bytes=max_shard_bytes)
    manifest = parts[0].manifest
    check_exportable(manifest.state.get("unlike"))
    beside_it = CommitFolder(folders[0])
    with Sidecar(beside_it, manifest.number, manifest.state) as sidecar, StoredValues(parts) as values:
        weights = CommitWeights(values, manifest, sidecar, DTYPES[dtype])
        listed = weights.listed()
        shards = plan_shards(listed, max_shard_bytes, weights.tied)
        index = index_of(shards, {"step": manifest.step, "commit": manifest.number, "tied": weights.tied})
        total_bytes = len(index) + sum(shard.n_bytes for shard in shards)
        with (
            _new_folder(to, total_bytes) as draft,
            byte_progress(console, "exporting", sum(weight.n_bytes for weight in listed)) as advance,
            ShardWriter(draft, shards) as writer,
        ):
            for name, offset_bytes, data in weights.pieces():
                interrupts.check()  # it may take long, and leaves nothing
                writer.write(name, offset_bytes, data)
                advance(data.nbytes)
            writer.write_file(INDEX_NAME, index)
            writer.finish()
            beside(draft)
            sync_files(draft)
    print_line(console, f"{to}: {len(shards)} file{'s' if len(shards) > 1 else ''}, {format_bytes(total_bytes)}")


# ---- the place -----------------------------------------------------------------------------------------------------


def check_request(folders: Sequence[Path], to: Path, *, dtype: str, max_shard_bytes: int) -> Path:
    """Check the arguments of an export; returns the folder with links resolved.

    Raises:
        ValueError: ``dtype`` is unknown or ``max_shard_bytes`` below 1.
        ExportError: ``to`` is neither new nor empty, or inside the run.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; known are {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    with naming("looking at", to):
        to = to.resolve()
        for folder in folders:
            if to.is_relative_to(folder.resolve()):
                raise ExportError(f"{to} is inside the run directory {folder}; name a folder elsewhere")
        if to.exists() and not to.is_dir():
            raise ExportError(f"{to} is a file; name a new or empty folder")
        if to.is_dir() and os.listdir(to):
            raise ExportError(f"{to} is not empty; nothing is overwritten: name a new or empty folder")
    return to


def check_exportable(unlike: str | None) -> None:
    """Raise ExportError where ``model.state_dict()`` has something else than the parameters and buffers of a commit."""
    if unlike is not None:
        raise ExportError(
            "the model's state_dict() is not made of its parameters and buffers alone, so an export would not equal "
            f"it: {unlike}; save model.state_dict() yourself, in the process that trains"
        )


@contextmanager
def _new_folder(to: Path, n_bytes: int) -> Iterator[Path]:
    """A folder that becomes ``to`` at the end of the block, and vanishes with everything in it after an error.

    Raises:
        DiskFullError: there is no room for ``n_bytes``.
    """
    made = make_folder(to.parent)
    draft: Path | None = None
    try:
        free_bytes = shutil.disk_usage(to.parent).free
        if free_bytes < n_bytes:
            raise DiskFullError(
                f"the export takes {n_bytes} bytes ({format_bytes(n_bytes)}), free in {to.parent} are {free_bytes} "
                f"({format_bytes(free_bytes)}); free some, or name another folder"
            )
        draft = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".unfinished", dir=to.parent))
        yield draft
        draft.chmod(0o777 & ~_umask())
        sync_folder(draft)
        os.rename(draft, to)  # takes the place of an empty folder, refuses any other
        draft = to
        sync_folder(to.parent)
    except BaseException as error:
        failure = write_failure(error, "making", to) if isinstance(error, OSError) else error
        if draft is not None:
            _remove(draft, failure)
        remove_folders(made)
        raise failure from (error if failure is not error else error.__cause__)


def _remove(folder: Path, failure: BaseException) -> None:
    """Remove an unfinished export; where that fails too, add it to the error."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if not isinstance(failure, OffloadError):
            return
        failure.args = (f"{failure}; what is left in {folder} could not be removed: {error.strerror}",)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
