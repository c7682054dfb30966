"""`offload doctor`: judges what `offload.machine.facts` found. Every check is a pure function of facts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console

from offload.budget.verdict import Available, Verdict, decide, verdict_of
from offload.config import Config
from offload.console.tables import print_line
from offload.factories import model_factory
from offload.machine.bench_ssd import IN_RAM
from offload.machine.facts import (
    ConfigFact,
    CpuFact,
    CudaFact,
    Facts,
    FolderFact,
    MemoryFact,
    PackageFact,
    available_here,
    gather,
)
from pagemem.units import GiB, format_bytes

Level = Literal["ok", "warning", "problem"]

#: The oldest versions that work, as setup.cfg requires them.
LEAST_VERSIONS: Final = {"python": (3, 11), "torch": (2, 11), "numpy": (1, 26)}
_LEAST_AVAILABLE_BYTES: Final = GiB
_LEAST_OPEN_FILES: Final = 256
#: More of the RAM than this leaves too little for activations and the interpreter.
_BUDGET_SHARE: Final = 0.8
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "fuse.sshfs"})
_COLOURS: Final = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what there is, and what to do about it where something is wrong."""

    level: Level
    what: str
    said: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding as plain text."""
        return f"{self.level:<7}  {self.what}: {self.said}" + (f" -> {self.remedy}" if self.remedy else "")


def run_doctor(
    file: Path | None, console: Console, *, changes: Sequence[str] = (), bench: bool = True, as_json: bool = False
) -> int:
    """Look, print a line for each check, and with ``as_json`` a last one with all of it; returns 1 where there is a
    problem, else 0."""
    facts, verdict = _asked(gather(file, changes, bench=bench))
    findings = judge(facts, verdict)
    for finding in findings:
        style = _COLOURS[finding.level] if console.is_terminal else None
        print_line(console, finding.line, style)
    counts = Counter(finding.level for finding in findings)
    print_line(console, f"ok: {counts['ok']}, warnings: {counts['warning']}, problems: {counts['problem']}")
    if as_json:
        print_line(console, json.dumps(as_record(facts, findings)))
    return 1 if counts["problem"] else 0


def _asked(facts: Facts) -> tuple[Facts, Verdict | None]:
    """Facts, and what is decided about the run of their configuration; a model that there is not makes the
    configuration a wrong one."""
    fact = facts.config
    if fact is None or fact.config is None or fact.config.model is None or not fact.config.model.has_factory:
        return facts, None
    try:
        return facts, verdict_of(fact.config, model_factory(fact.config.model), available_here(fact.config))
    except ValueError as error:
        return replace(facts, config=ConfigFact(fact.file, None, tuple(str(error).splitlines()))), None


def as_record(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """Findings and the facts behind them, as JSON values."""
    known = asdict(facts)
    if facts.config is not None and facts.config.config is not None:
        known["config"]["config"] = facts.config.config.model_dump(mode="json")
    return {
        "command": "doctor",
        "ok": all(finding.level != "problem" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        "facts": known,
    }


def judge(facts: Facts, verdict: Verdict | None = None) -> list[Finding]:
    """Every check, in the order of the lines."""
    findings = [check_version(name, found) for name, found in facts.versions.items()]
    findings += [check_package(package) for package in facts.packages]
    findings += [check_cpu(facts.cpu, facts.config), *check_memory(facts.memory), check_copies(facts.copy_gb_per_s)]
    findings += check_cuda(facts.cuda, cuda_build=facts.cuda_build, nvidia_device=facts.nvidia_device)
    if facts.config is not None:
        findings += check_config(facts.config, facts.memory, verdict)
    for folder in facts.folders:
        findings += check_folder(folder, facts.config)
    return findings


def _judged(wrong: bool, what: str, said: str, remedy: str, level: Level = "warning") -> Finding:
    """A finding of ``level`` where something is ``wrong``, else one that is ok."""
    return Finding(level, what, said, remedy) if wrong else Finding("ok", what, said)


def check_version(name: str, found: str) -> Finding:
    """Whether a version is one that works."""
    least = LEAST_VERSIONS.get(name, ())
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < least:
        wanted = ".".join(map(str, least))
        return Finding("problem", name, f"{found} is older than {wanted}", f"install {name} {wanted} or newer")
    return Finding("ok", name, found)


def check_package(package: PackageFact) -> Finding:
    """Whether a package's name leads to ours, here and elsewhere."""
    what, here = f"package {package.name}", package.in_current_directory
    others = [place for place in package.found if place != package.home]
    if others and package.found[0] != package.home:
        said = f"importing it finds {package.found[0]}, not {package.home}"
        remedy = f"uninstall what put it there, or put {Path(package.home).parent} first on sys.path"
        return Finding("problem", what, said, remedy)
    if len(package.distributions) > 1:
        said = f"several installed distributions bring one: {', '.join(package.distributions)}"
        remedy = "uninstall the others, then install this one again: they may have overwritten its files"
        return Finding("problem", what, said, remedy)
    if others:
        remedy = "another order of sys.path would take that one: uninstall it"
        return Finding("warning", what, f"ours comes first, another is at {', '.join(others)}", remedy)
    if here is not None and here != package.home:
        remedy = "rename it, or start Python elsewhere: scripts and python -m put this directory first"
        return Finding("warning", what, f"the current directory holds another one, {here}", remedy)
    return Finding("ok", what, package.home)


def check_cpu(cpu: CpuFact, config: ConfigFact | None = None) -> Finding:
    """Compute threads, the configuration's or torch's own, against cores."""
    train = None if config is None or config.config is None else config.config.train
    threads = cpu.torch_threads if train is None or train.threads is None else train.threads
    physical = "" if cpu.physical is None else f", {cpu.physical} physical"
    said = (
        f"{cpu.usable} of {cpu.logical} cores usable{physical}; torch computes on {threads} "
        f"thread{'' if threads == 1 else 's'}"
    )
    remedy = f"they wait for each other: set train.threads or OMP_NUM_THREADS to {cpu.usable} or less"
    return _judged(threads > cpu.usable, "cpu", said, remedy)


def check_memory(memory: MemoryFact) -> Iterator[Finding]:
    """RAM and every limit on it."""
    said = f"{format_bytes(memory.total_bytes)}, {format_bytes(memory.available_bytes)} available"
    short = memory.available_bytes < _LEAST_AVAILABLE_BYTES
    yield _judged(short, "ram", said, "end other programs: torch alone takes some hundred MiB")
    for name, limit_bytes, option in (
        ("RLIMIT_DATA", memory.data_limit_bytes, "-d"),
        ("RLIMIT_AS", memory.address_limit_bytes, "-v"),
    ):
        low = limit_bytes is not None and limit_bytes < memory.total_bytes
        remedy = (
            f"memory.ram counts against it as a whole, touched or not: keep below it, or raise it (ulimit {option})"
        )
        yield _judged(low, name, _limit(limit_bytes) + (", less than the RAM" if low else ""), remedy)
    locked = _limit(memory.locked_limit_bytes)
    yield Finding("ok", "RLIMIT_MEMLOCK", f"{locked} (not used: a device's driver locks the host tier)")
    files = memory.open_files_limit
    said = "no limit" if files is None else f"{files} open files"
    few = files is not None and files < _LEAST_OPEN_FILES
    yield _judged(few, "RLIMIT_NOFILE", said, f"raise it to {_LEAST_OPEN_FILES} or more (ulimit -n)")
    if memory.cgroup_limit_bytes is None or memory.cgroup_free_bytes is None:
        yield Finding("ok", "cgroup memory.max", "no limit (cgroup v2)")
        return
    said = f"{format_bytes(memory.cgroup_limit_bytes)}, {format_bytes(memory.cgroup_free_bytes)} left"
    short = memory.cgroup_free_bytes < min(memory.available_bytes, _LEAST_AVAILABLE_BYTES)
    yield _judged(short, "cgroup memory.max", said, "give the container more memory: a process beyond it is killed")


def _limit(n_bytes: int | None) -> str:
    return "no limit" if n_bytes is None else format_bytes(n_bytes)


def check_copies(gb_per_s: float | None) -> Finding:
    """The host tier, and how fast it copies."""
    said = "copies not measured" if gb_per_s is None else f"copies {gb_per_s:.1f} GB/s, best of 5"
    return Finding("ok", "host tier", said)


def check_cuda(devices: tuple[CudaFact, ...], *, cuda_build: bool, nvidia_device: bool) -> Iterator[Finding]:
    """The devices, and whether host memory can be pinned for them."""
    if not devices and nvidia_device:
        why, remedy = (
            ("its driver cannot be used", "see what nvidia-smi says, and whether the driver is too old")
            if cuda_build
            else ("this torch is a build without CUDA", "install a CUDA build of torch to use it")
        )
        yield Finding("warning", "cuda", f"there is a device, but {why}", remedy)
    elif not devices:
        yield Finding("ok", "cuda", "no device; compute runs out of host memory")
    for number, device in enumerate(devices):
        pinning = "works" if device.pinning is None else f"fails: {device.pinning}"
        yield _judged(
            device.pinning is not None,
            f"cuda:{number}",
            f"{device.name}, {format_bytes(device.total_bytes)}, {format_bytes(device.free_bytes)} free, "
            f"pinning {pinning}",
            "transfers would go through pageable memory, slower: look at the driver, and at what the container or "
            "virtual machine allows",
        )


def check_config(fact: ConfigFact, memory: MemoryFact, verdict: Verdict | None = None) -> Iterator[Finding]:
    """The file, and whether its run can begin here.

    Args:
        verdict: as of `plan` and `launch`; None: judged by the file alone.
    """
    if fact.config is None:
        yield from (
            Finding("problem", "config", error, "correct the file; its folders were not looked at")
            for error in fact.errors
        )
        return
    yield Finding("ok", "config", f"{fact.file} can be used")
    verdict = verdict or decide(fact.config, None, "", Available(memory.usable_bytes, 0, limits=memory.limits))
    ram_bytes, kept_bytes, need = fact.config.memory.ram, fact.config.memory.activations or 0, verdict.need
    pages_bytes = ram_bytes if need is None else min(ram_bytes, need.content_bytes)
    used = "" if pages_bytes == ram_bytes else f", of which the model's states take {format_bytes(pages_bytes)}"
    kept = f" and memory.activations {format_bytes(kept_bytes)}" if kept_bytes else ""
    had = f"{format_bytes(memory.usable_bytes)} of RAM can be had"
    said = f"memory.ram {format_bytes(ram_bytes)}{used}{kept}; {had}"
    if verdict.shortages:
        yield from (Finding("problem", "budget", shortage.said, shortage.remedy) for shortage in verdict.shortages)
    elif pages_bytes + kept_bytes > _BUDGET_SHARE * memory.usable_bytes:
        yield Finding("warning", "budget", said, "other activations and the interpreter come on top: leave a fifth")
    elif need is not None:
        smallest = f"{format_bytes(need.smallest_bytes)} is the smallest that works"
        yield Finding("ok", "budget", f"{said}, and {smallest}")
    elif fact.config.model is not None and fact.config.model.has_factory:
        unknown = f"the model's need is not known: {verdict.unknown}"
        yield Finding("warning", "budget", f"{said}; {unknown}", "try it: launch checks while it builds")
    else:
        yield Finding("ok", "budget", said)


def check_folder(folder: FolderFact, config: ConfigFact | None) -> Iterator[Finding]:
    """A folder for page files: whose it is, room, O_DIRECT, and bandwidth."""
    what, known = f"ssd {folder.path}", None if config is None else config.config
    yield _check_use(folder, what)
    yield _check_room(folder, what, known)
    if folder.backend == "aiofiles":
        said = f"O_DIRECT is refused on {folder.file_system}"
        if known is not None and known.ssd.direct is True:
            yield Finding("problem", what, said, 'set ssd.direct to "auto", or take another disk')
        else:
            remedy = "buffered I/O is used, slower and by way of the page cache: take a local disk"
            yield Finding("warning", what, said, remedy)
    else:
        yield Finding("ok", what, "O_DIRECT not tried" if folder.backend is None else "O_DIRECT is accepted")
    if folder.point is not None:
        rates = f"write {folder.point.write_gb_per_s:.2f} GB/s, read {folder.point.read_gb_per_s:.2f} GB/s, briefly"
        yield Finding("ok", what, f"{rates}; offload bench-ssd says more")
    elif folder.failure:
        said = f"measuring it failed: {folder.failure}"
        yield Finding(_level_of(folder), what, said, "look into it before training there")
    else:
        yield Finding("ok", what, f"bandwidth not measured: {folder.not_measured}")


def _level_of(folder: FolderFact) -> Level:
    """How bad it is where a folder cannot be used."""
    return "problem" if folder.wanted else "warning"


def _check_use(folder: FolderFact, what: str) -> Finding:
    use = folder.use
    if use is not None and use.kind == "foreign" and folder.wanted:
        return Finding("problem", what, use.detail)  # says what to do as well
    if use is None or not folder.writable:
        said = "it cannot be read" if use is None else f"this user cannot write in {folder.existing}"
        return Finding(_level_of(folder), what, said, "change its owner or mode, or name another folder")
    if use.holder is not None:
        remedy = "a second run there is refused until that one ends"
        return Finding("warning", what, f"in use by process {use.holder}", remedy)
    said = {
        "run": f"holds a stopped run, {use.detail}",
        "foreign": "holds other things: name a new folder in it in ssd.paths",
        "empty": "empty",
    }.get(use.kind, f"new, would be made below {folder.existing}")
    return Finding("ok", what, said)


def _check_room(folder: FolderFact, what: str, config: Config | None) -> Finding:
    said = f"{folder.file_system}, {format_bytes(folder.free_bytes)} free"
    if folder.file_system in IN_RAM:
        return Finding("warning", what, said, "this is RAM itself: take a folder on a disk")
    if folder.file_system in _REMOTE:
        return Finding("warning", what, said, "this is another machine's disk: take a local one")
    # A run's page files have their room already.
    if config is None or (folder.use is not None and folder.use.kind == "run"):
        return Finding("ok", what, said)
    share_bytes = config.memory.ram // len(config.ssd.paths)
    short = folder.free_bytes < share_bytes
    said += f", less than its share of memory.ram ({format_bytes(share_bytes)})" if short else ""
    remedy = "page files hold what RAM does not, with commits up to twice: free some, or name one more path"
    return _judged(short, what, said, remedy)
