"""What moving bytes costs on this machine: measured once, in about a second, and kept in the user's cache folder.

Plans and forecasts need two things that differ from machine to machine: how fast the disks are, and how much processor
time a byte takes that I/O threads move. `calibrated` takes both from its own file, ``offload/calibration.json`` in
``$XDG_CACHE_HOME`` or ``~/.cache``; what is not there it measures, and keeps. `offload bench-ssd` keeps what it finds
there, too. A file that cannot be read or written, or is another machine's, is no error: the line says so.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Literal

import torch
from pydantic import Field, TypeAdapter

from offload.machine.bench_ssd import (
    DEFAULT_THREADS,
    USUAL_REQUEST_BYTES,
    BenchPlan,
    Measured,
    Point,
    Setting,
    check_target,
    file_system,
    measure,
)
from pagemem.errors import OffloadError, StorageError
from pagemem.folders.own_file import make_folder, replace_file
from pagemem.folders.small_file import Line, Record, checked, parse_json, read_small
from pagemem.units import MiB
from scheduler import knobs

#: "off": built-in constants; nothing is read, measured or kept. "anew": what is kept is not read.
SWITCH: Final = "OFFLOAD_CALIBRATION"
FORMAT: Final = "offload calibration 1"
AT_START: Final = "start"
BENCH_SSD: Final = "offload bench-ssd"
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_DISKS: Final = 64
#: Twice the same setting: of the second, processor time is counted, which without the test file's making is that of
#: moving.
_USUAL: Final = Setting(USUAL_REQUEST_BYTES, DEFAULT_THREADS)
_BRIEF: Final = BenchPlan(32 * MiB, 0.12, (_USUAL, _USUAL))
#: Once so much time has gone, no further disk is measured: it is taken to be as fast as the slowest.
_ENOUGH_S: Final = 1.2

#: Of a processor, a byte.
_LEAST_MOVE_S: Final = 1e-13
_MOST_MOVE_S: Final = 1e-7
_Rate = Annotated[float, Field(ge=1e4, le=1e13)]


class DiskRates(Record):
    """Bytes a second of a disk, and who measured that when."""

    read_bytes_per_s: _Rate
    write_bytes_per_s: _Rate
    source: Line
    date: Line


class MachineRecord(Record):
    """The file.

    Attributes:
        move_s_per_byte: processor seconds of a byte moved; None: not measured yet.
        disks: by what tells file systems apart.
    """

    format: Literal["offload calibration 1"]
    machine: Line
    move_s_per_byte: Annotated[float, Field(ge=_LEAST_MOVE_S, le=_MOST_MOVE_S)] | None
    disks: Annotated[dict[Line, DiskRates], Field(max_length=_MAX_DISKS)]


_RECORD: Final[TypeAdapter[MachineRecord]] = TypeAdapter(MachineRecord)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants of this machine.

    Attributes:
        ssd_read, ssd_write: bytes a second of all folders together; None: not known.
        line: what was taken from where, for people.
    """

    move_s_per_byte: float = field(default_factory=lambda: knobs.MOVE_S_PER_BYTE)
    ssd_read: float | None = None
    ssd_write: float | None = None
    line: str = f"built-in constants ({SWITCH}=off)"

    def apply(self) -> None:
        """Have this process's plans charge moves by it."""
        knobs.MOVE_S_PER_BYTE = self.move_s_per_byte


def is_off() -> bool:
    """Whether the environment asks for built-in constants."""
    return os.environ.get(SWITCH) == "off"


def calibrated(folders: Sequence[str], file: Path | None = None) -> Calibration:
    """The constants for page files in these folders, there or not yet; measures what is not known, in about a second.

    Args:
        file: of the record; None: the user's.
    """
    if is_off():
        return Calibration()
    file = file or cache_file()
    record, why = _known(file)
    places = {_disk_of(place): place for place in (_existing(Path(folder)) for folder in folders)}
    missing = [disk for disk in places if disk not in record.disks]
    said: list[str] = []
    if missing or record.move_s_per_byte is None:
        record, failures = _measured(record, [(disk, places[disk]) for disk in missing or list(places)[:1]])
        kept = keep(record, file)
        said = [f"measured now{'' if not why else f' ({why})'}", *failures, kept or f"kept in {file}"]
    else:
        sources = {f"{record.disks[disk].source}, {record.disks[disk].date}" for disk in places}
        said = [f"from {file} ({'; '.join(sorted(sources))})"]
    return _calibration(record, list(places), said)


def _calibration(record: MachineRecord, disks: Sequence[str], said: Iterable[str]) -> Calibration:
    """Pages are striped over the folders in equal parts, so all disks together are as fast as the slowest allows."""
    known = [record.disks[disk] for disk in disks if disk in record.disks]
    move_s = knobs.MOVE_S_PER_BYTE if record.move_s_per_byte is None else record.move_s_per_byte
    if not known:
        text = f"disk unknown, {move_s * 1e9:.2f} ns of a processor a byte moved"
        return Calibration(move_s, line=f"{text}: {'; '.join(said)}")
    read = len(disks) * min(disk.read_bytes_per_s for disk in known)
    write = len(disks) * min(disk.write_bytes_per_s for disk in known)
    text = f"disk {read / 1e6:,.0f} and {write / 1e6:,.0f} MB/s, {move_s * 1e9:.2f} ns of a processor a byte moved"
    return Calibration(move_s, read, write, f"{text}: {'; '.join(said)}")


# ---- the file -------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where a user's record is, by the XDG base directory specification."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()
    return base / "offload" / "calibration.json"


def this_machine() -> str:
    """What a record is of: another processor, or another torch, costs something else."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")
    return f"{name}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, torch {torch.__version__}"


def _known(file: Path) -> tuple[MachineRecord, str]:
    """What is kept, and why it is not used, if not: then the record is empty."""
    empty = MachineRecord(format=FORMAT, machine=this_machine(), move_s_per_byte=None, disks={})
    if os.environ.get(SWITCH) == "anew":
        return empty, f"{SWITCH}=anew"
    try:
        record = checked(_RECORD, parse_json(read_small(file, _MAX_FILE_BYTES)))
    except FileNotFoundError:
        return empty, ""
    except OSError as error:
        return empty, f"{file} cannot be read: {error.strerror}"
    except ValueError as error:
        return empty, f"{file} is no record: {error}"
    return (record, "") if record.machine == empty.machine else (empty, f"{file} is of another machine")


def keep(record: MachineRecord, file: Path) -> str:
    """Write the record; returns why it could not be kept, or ""."""
    try:
        make_folder(file.parent)
        replace_file(file, (record.model_dump_json(indent=1) + "\n").encode())
    except (StorageError, OSError) as error:
        return f"not kept: {error}"
    return ""


def keep_bench(results: Sequence[Measured], file: Path | None = None) -> str:
    """Keep what `offload bench-ssd` found; returns a line that says where, or why not; "" if that is switched off."""
    if is_off():
        return ""
    file = file or cache_file()
    record, _ = _known(file)
    disks = dict(record.disks)
    for result in results:
        points = [point for point in result.points if point.setting == _USUAL]
        if points:
            disks[_disk_of(result.target.path)] = _rates(points[-1], BENCH_SSD)
    failure = keep(_with_disks(record, disks), file)
    return failure or f"kept for plans and forecasts in {file}"


def _with_disks(record: MachineRecord, disks: Mapping[str, DiskRates], move_s: float | None = None) -> MachineRecord:
    newest = dict(list(disks.items())[-_MAX_DISKS:])
    move_s = record.move_s_per_byte if move_s is None else move_s
    return MachineRecord(format=FORMAT, machine=record.machine, move_s_per_byte=move_s, disks=newest)


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measured(record: MachineRecord, places: Sequence[tuple[str, Path]]) -> tuple[MachineRecord, list[str]]:
    """The record with disks measured, and what went wrong with some."""
    disks, failures, move_s = dict(record.disks), list[str](), record.move_s_per_byte
    end_s = time.perf_counter() + _ENOUGH_S
    for disk, place in places:
        if time.perf_counter() > end_s:
            failures.append(f"{place} taken to be as fast as the others")
            continue
        ended: list[tuple[float, Point]] = []
        try:
            measure(check_target(place, _BRIEF.file_bytes), _BRIEF, partial(_note, ended))
        except (OffloadError, OSError) as error:
            failures.append(f"{place} not measured: {error}")
            continue
        (before_s, _), (after_s, point) = ended
        disks[disk] = _rates(point, AT_START)
        moved_bytes = _BRIEF.seconds * (point.read_gb_per_s + point.write_gb_per_s) * 1e9
        move_s = move_s or min(max((after_s - before_s) / moved_bytes, _LEAST_MOVE_S), _MOST_MOVE_S)
    return _with_disks(record, disks, move_s), failures


def _note(ended: list[tuple[float, Point]], point: Point) -> None:
    ended.append((time.process_time(), point))


def _rates(point: Point, source: str) -> DiskRates:
    read, write = (max(1e4, gb_per_s * 1e9) for gb_per_s in (point.read_gb_per_s, point.write_gb_per_s))
    today = datetime.date.today().isoformat()
    return DiskRates(read_bytes_per_s=read, write_bytes_per_s=write, source=source, date=today)


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def _disk_of(place: Path) -> str:
    """What tells file systems apart: a disk that is mounted anew has another number, and is measured anew."""
    found, size = os.stat(place), os.statvfs(place)
    return f"{file_system(place)} {os.major(found.st_dev)}:{os.minor(found.st_dev)} {size.f_blocks * size.f_frsize}"
