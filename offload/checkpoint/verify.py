"""`offload verify`: whether a run's commits are whole: manifests, map of the pages, and every byte they name.

Every extent is read once, however many commits name it, a few at a time. Nothing is changed, and nothing stops at the
first thing that is wrong: all of it is listed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from rich.console import Console

from offload.commits.sidecar import Sidecar
from offload.commits.stopped_ranks import StoppedRanks
from offload.commits.stopped_run import StoppedRun
from offload.console.byte_progress import byte_progress
from offload.console.tables import print_line, print_rows
from pagemem.durable.commit_folder import CommitFolder
from pagemem.durable.manifest import Manifest
from pagemem.durable.page_map import StoredPlace, all_places, map_faults
from pagemem.durable.page_reader import Chunk, PageReader
from pagemem.durable.references import ReferencedFile
from pagemem.durable.root_folder import FOLDER_NAME, RootFolder
from pagemem.errors import CommitError, StorageError
from pagemem.files.page_file import PAGE_FILE_NAME
from pagemem.units import format_bytes

_READERS: Final = 4
#: Chunks that are handed to the readers at a time.
_BATCH: Final = 8 * _READERS


@dataclass(slots=True)
class Report:
    """What was found.

    Attributes:
        commits: those looked at.
        faults: what is wrong with each, by number; a page that several name is wrong in each of them.
        notes: what is worth knowing and not wrong.
        n_extents, n_bytes: read.
    """

    commits: list[Manifest]
    faults: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    n_extents: int = 0
    n_bytes: int = 0

    def add(self, numbers: Sequence[int], what: str) -> None:
        """Something is wrong with these commits."""
        for number in numbers:
            self.faults.setdefault(number, []).append(what)


def verify_run(run: Path, *, paths: Sequence[Path], commit: str | None, console: Console) -> Report:
    """Verify all commits of a stopped run, or one of them, and print the findings. See `offload verify --help`.

    Raises:
        RunDirectoryError: the run cannot be used. CommitError: there is no such commit.
        StorageError: a page file cannot be opened.
    """
    if RootFolder(run).numbers():
        return _verify_ranks(run, paths, commit, console)
    with StoppedRun(run, paths) as stopped:
        chosen = list(stopped.whole.values()) if commit is None else [stopped.choose(commit)]
        report = Report(sorted(chosen, key=lambda manifest: manifest.number))
        if commit is None:
            for number, error in sorted(stopped.damaged.items()):
                report.add([number], str(error))
        for manifest in report.commits:
            try:
                Sidecar(stopped.commits, manifest.number, manifest.state).close()
            except CommitError as error:
                report.add([manifest.number], str(error))
        _check_files(report)
        _note_leftovers(stopped, report)
        if report.commits:
            page_bytes = report.commits[-1].page_bytes
            for manifest in report.commits:
                if manifest.page_bytes != page_bytes:
                    report.add(
                        [manifest.number],
                        f"its pages have {manifest.page_bytes} bytes, those of the newest commit {page_bytes}",
                    )
            with PageReader(stopped.page_files, page_bytes) as reader:
                _check_pages(reader, [m for m in report.commits if m.page_bytes == page_bytes], report, console)
    print_report(report, console)
    return report


def _verify_ranks(run: Path, paths: Sequence[Path], commit: str | None, console: Console) -> Report:
    """Verify each rank's part of the commits of all shapes that the run has had."""
    with StoppedRanks(run, paths) as stopped:
        chosen = list(stopped.whole.values()) if commit is None else [stopped.choose(commit)]
        report = Report(sorted(chosen, key=lambda manifest: manifest.number))
        if commit is None:
            for number, error in sorted(stopped.damaged.items()):
                report.add([number], str(error))
        folders: dict[tuple[Path, ...], list[Manifest]] = {}
        for manifest in report.commits:
            for part in stopped.parts(manifest):
                folders.setdefault(part.folders, []).append(part.manifest)
        for of_rank, manifests in folders.items():
            own = Report(manifests)
            _check_part(of_rank, own, console)
            for number, faults in own.faults.items():
                for fault in faults:
                    report.add([number], f"{of_rank[0].parent.name}/{of_rank[0].name}: {fault}")
            report.n_extents, report.n_bytes = report.n_extents + own.n_extents, report.n_bytes + own.n_bytes
        report.notes.append(f"{len(folders)} folders of ranks in {stopped.path / FOLDER_NAME}")
    print_report(report, console)
    return report


def _check_part(folders: Sequence[Path], report: Report, console: Console) -> None:
    """Look at the pages, and what lies beside, of one rank's parts."""
    for manifest in report.commits:
        try:
            Sidecar(CommitFolder(folders[0]), manifest.number, manifest.state).close()
        except CommitError as error:
            report.add([manifest.number], str(error))
    _check_files(report)
    with PageReader([folder / PAGE_FILE_NAME for folder in folders], report.commits[-1].page_bytes) as reader:
        _check_pages(reader, report.commits, report, console)


def _check_files(report: Report) -> None:
    """Read the files of others in which commits have left parameters: whether they are there, and as they were."""
    numbers: dict[ReferencedFile, list[int]] = {}
    for manifest in report.commits:
        for file in manifest.files:
            numbers.setdefault(file, []).append(manifest.number)
    for file, commits in numbers.items():
        try:
            file.find(reads=True)
        except (CommitError, StorageError) as error:
            report.add(commits, str(error))
    if numbers:
        report.notes.append(
            f"parameters lie in {len(numbers)} {'file' if len(numbers) == 1 else 'files'} of others, known by every "
            f"byte: {', '.join(sorted({str(Path(file.path).parent) for file in numbers}))}"
        )


def _note_leftovers(stopped: StoppedRun, report: Report) -> None:
    """Say which files a crash has left, which no commit needs."""
    needed = {f"commit-{number:08d}{end}" for number in stopped.commits.numbers() for end in (".json", ".safetensors")}
    left = sorted(path.name for path in stopped.commits.path.iterdir() if path.name not in needed)
    if left:
        report.notes.append(f"left in {stopped.commits.path}, needed by no commit: {', '.join(left)}")


def _check_pages(reader: PageReader, manifests: Sequence[Manifest], report: Report, console: Console) -> None:
    places = all_places(manifests)
    sound: list[StoredPlace] = []
    for place in places:
        fault = place.stored.fault(reader.page_bytes)
        if fault is None:
            sound.append(place)
        else:
            report.add(place.commits, fault)
    for commits, fault in map_faults(sound, reader.page_bytes):
        report.add(commits, fault)
    _note_room(reader, sound, report)
    unverified = [str(manifest.number) for manifest in manifests if not manifest.checksums]
    if unverified:
        report.notes.append(
            f"commit {', '.join(unverified)}: the run kept no checksums (ssd.checksums = false): pages were read, "
            "their content not verified"
        )
    total_bytes = sum(place.stored.n_bytes for place in sound)
    with byte_progress(console, "verifying", total_bytes) as advance:
        for place, chunk, wrong in _read_all(reader, sound):
            for what in wrong:
                report.add(place.commits, f"{place.stored.key}: {what}")
            report.n_extents += len(chunk.extents)
            report.n_bytes += chunk.n_bytes
            advance(chunk.n_bytes)


def _note_room(reader: PageReader, places: Sequence[StoredPlace], report: Report) -> None:
    """Say how full the page files are."""
    named = {extent.frame for place in places for extent in place.stored.placement().extents(reader.page_bytes)}
    page_bytes = reader.page_bytes
    inside = sum(frame < reader.n_frames for frame in named)
    free = max(0, reader.n_frames - inside)
    report.notes.append(
        f"{len(reader.paths)} page {'file' if len(reader.paths) == 1 else 'files'} of "
        f"{format_bytes(sum(reader.file_bytes))}: {reader.n_frames} frames of {format_bytes(page_bytes)}, {inside} "
        f"named by commits, {free} free ({format_bytes(free * page_bytes)})"
    )
    how = (
        "past the page cache (O_DIRECT)"
        if reader.backend_name == "direct"
        else "through the page cache, as the file system refuses O_DIRECT"
    )
    report.notes.append(f"read {how}")


def _read_all(reader: PageReader, places: Sequence[StoredPlace]) -> Iterator[tuple[StoredPlace, Chunk, list[str]]]:
    """Read every chunk on a few threads; gives each, in order, with what is wrong with it."""
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(_READERS):
        buffers.put(memoryview(reader.buffer()))

    def read(placed: tuple[StoredPlace, Chunk]) -> tuple[StoredPlace, Chunk, list[str]]:
        place, chunk = placed
        buffer = buffers.get()
        try:
            wrong = reader.read(chunk, buffer, checksums=place.checksums)
            return place, chunk, [str(one) for one in wrong]
        except StorageError as error:
            return place, chunk, [str(error)]
        finally:
            buffers.put(buffer)

    work = ((place, chunk) for place in places for chunk in reader.chunks(place.stored))
    with ThreadPoolExecutor(_READERS, thread_name_prefix="offload-verify") as pool:
        while batch := list(islice(work, _BATCH)):
            yield from pool.map(read, batch)


def print_report(report: Report, console: Console) -> None:
    """Faults, notes and a table of the commits."""
    for number, faults in sorted(report.faults.items()):
        for fault in faults:
            print_line(console, f"commit {number}: {fault}")
    for note in report.notes:
        print_line(console, note)
    headings, *rows = commit_rows(report)
    print_rows("Commits", rows, console, headings)
    n_faults = sum(map(len, report.faults.values()))
    verdict = "whole" if not report.faults else "1 thing is wrong" if n_faults == 1 else f"{n_faults} things are wrong"
    print_line(console, f"{verdict}; {report.n_extents} extents, {format_bytes(report.n_bytes)} read")


def commit_rows(report: Report) -> list[tuple[str, ...]]:
    """The table's rows, headings first."""
    rows: list[tuple[str, ...]] = [("commit", "name", "step", "created", "tensors", "bytes", "state")]
    known = {manifest.number: manifest for manifest in report.commits}
    for number in sorted({*known, *report.faults}):
        manifest, n_faults = known.get(number), len(report.faults.get(number, ()))
        state = "whole" if not n_faults else "1 fault" if n_faults == 1 else f"{n_faults} faults"
        if manifest is None:
            rows.append((str(number), "-", "-", "-", "-", "-", "unreadable"))
            continue
        n_bytes = sum(stored.n_bytes for stored in manifest.tensors)
        rows.append(
            (
                str(number),
                manifest.name or "-",
                str(manifest.step),
                manifest.created,
                str(len(manifest.tensors)),
                format_bytes(n_bytes),
                state,
            )
        )
    return rows
