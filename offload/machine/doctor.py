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
    facts = gather(file, changes, bench=bench)
    facts, verdict = _asked(facts)
    findings = judge(facts, verdict)
    for finding in findings:
        style = _COLOURS[finding.level] if console.is_terminal else None
        print_line(console, finding.line, style)
    counts = Counter(finding.level for finding in findings)
    summary = f"ok: {counts['ok']}, warnings: {counts['warning']}, problems: {counts['problem']}"
    print_line(console, summary)
    if as_json:
        print_line(console, json.dumps(as_record(facts, findings)))
    return 1 if counts["problem"] else 0


def _asked(facts: Facts) -> tuple[Facts, Verdict | None]:
    """Facts, and what is decided about the run of their configuration; a model that there is not makes the
    configuration a wrong one."""
    fact = facts.config
    if fact is None or fact.config is None or fact.config.model is None:
        return facts, None
    try:
        return facts, verdict_of(fact.config, model_factory(fact.config.model), available_here(fact.config))
    except ValueError as error:
        return replace(facts, config=ConfigFact(fact.file, None, tuple(str(error).splitlines()))), None


def as_record(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """Findings and the facts behind them, as JSON values."""
    config = facts.config
    known = asdict(facts) | {"config": None}
    if config is not None:
        content = None if config.config is None else config.config.model_dump(mode="json")
        known["config"] = {"file": config.file, "config": content, "errors": config.errors}
    problems = any(finding.level == "problem" for finding in findings)
    return {
        "command": "doctor",
        "ok": not problems,
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
    what = f"package {package.name}"
    others = [place for place in package.found if place != package.home]
    if others and package.found[0] != package.home:
        remedy = f"uninstall what put it there, or put {Path(package.home).parent} first on sys.path"
        return Finding("problem", what, f"importing it finds {package.found[0]}, not {package.home}", remedy)
    if len(package.distributions) > 1:
        brought = ", ".join(package.distributions)
        remedy = "uninstall the others, then install this one again: they may have overwritten its files"
        return Finding("problem", what, f"several installed distributions bring one: {brought}", remedy)
    if others:
        remedy = "another order of sys.path would take that one: uninstall it"
        return Finding("warning", what, f"ours comes first, another is at {', '.join(others)}", remedy)
    here = package.in_current_directory
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
    if threads > cpu.usable:
        return Finding(
            "warning",
            "cpu",
            said,
            f"they wait for each other: set train.threads or OMP_NUM_THREADS to {cpu.usable} or less",
        )
    return Finding("ok", "cpu", said)


def check_memory(memory: MemoryFact) -> Iterator[Finding]:
    """RAM and every limit on it."""
    said = f"{format_bytes(memory.total_bytes)}, {format_bytes(memory.available_bytes)} available"
    if memory.available_bytes < _LEAST_AVAILABLE_BYTES:
        yield Finding("warning", "ram", said, "end other programs: torch alone takes some hundred MiB")
    else:
        yield Finding("ok", "ram", said)
    for name, limit_bytes, option in (
        ("RLIMIT_DATA", memory.data_limit_bytes, "-d"),
        ("RLIMIT_AS", memory.address_limit_bytes, "-v"),
    ):
        if limit_bytes is None:
            yield Finding("ok", name, "no limit")
        elif limit_bytes < memory.total_bytes:
            remedy = (
                f"memory.ram counts against it as a whole, touched or not: keep below it, or raise it (ulimit {option})"
            )
            yield Finding("warning", name, f"{format_bytes(limit_bytes)}, less than the RAM", remedy)
        else:
            yield Finding("ok", name, format_bytes(limit_bytes))
    locked = "no limit" if memory.locked_limit_bytes is None else format_bytes(memory.locked_limit_bytes)
    yield Finding("ok", "RLIMIT_MEMLOCK", f"{locked} (not used: a device's driver locks the host tier)")
    files = memory.open_files_limit
    if files is not None and files < _LEAST_OPEN_FILES:
        yield Finding(
            "warning", "RLIMIT_NOFILE", f"{files} open files", f"raise it to {_LEAST_OPEN_FILES} or more (ulimit -n)"
        )
    else:
        yield Finding("ok", "RLIMIT_NOFILE", "no limit" if files is None else f"{files} open files")
    if memory.cgroup_limit_bytes is None or memory.cgroup_free_bytes is None:
        yield Finding("ok", "cgroup memory.max", "no limit (cgroup v2)")
        return
    said = f"{format_bytes(memory.cgroup_limit_bytes)}, {format_bytes(memory.cgroup_free_bytes)} left"
    if memory.cgroup_free_bytes < min(memory.available_bytes, _LEAST_AVAILABLE_BYTES):
        yield Finding(
            "warning", "cgroup memory.max", said, "give the container more memory: a process beyond it is killed"
        )
    else:
        yield Finding("ok", "cgroup memory.max", said)


def check_copies(gb_per_s: float | None) -> Finding:
    """The host tier, and how fast it copies."""
    return Finding(
        "ok", "host tier", "copies not measured" if gb_per_s is None else f"copies {gb_per_s:.1f} GB/s, best of 5"
    )


def check_cuda(devices: tuple[CudaFact, ...], *, cuda_build: bool, nvidia_device: bool) -> Iterator[Finding]:
    """The devices, and whether host memory can be pinned for them."""
    if not devices and nvidia_device:
        why = "its driver cannot be used" if cuda_build else "this torch is a build without CUDA"
        remedy = (
            "see what nvidia-smi says, and whether the driver is too old"
            if cuda_build
            else "install a CUDA build of torch to use it"
        )
        yield Finding("warning", "cuda", f"there is a device, but {why}", remedy)
    elif not devices:
        yield Finding("ok", "cuda", "no device; compute runs out of host memory")
    for number, device in enumerate(devices):
        said = f"{device.name}, {format_bytes(device.total_bytes)}, {format_bytes(device.free_bytes)} free, pinning "
        if device.pinning is None:
            yield Finding("ok", f"cuda:{number}", said + "works")
        else:
            remedy = (
                "transfers would go through pageable memory, slower: look at the driver, and at what the container or "
                "virtual machine allows"
            )
            yield Finding("warning", f"cuda:{number}", f"{said}fails: {device.pinning}", remedy)


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
    limits = (("RLIMIT_DATA", memory.data_limit_bytes), ("RLIMIT_AS", memory.address_limit_bytes))
    known = tuple((name, n_bytes) for name, n_bytes in limits if n_bytes is not None)
    verdict = verdict or decide(fact.config, None, "", Available(memory.usable_bytes, 0, known))
    ram_bytes, kept_bytes = fact.config.memory.ram, fact.config.memory.activations or 0
    need = verdict.need
    pages_bytes = ram_bytes if need is None else min(ram_bytes, need.content_bytes)
    used = "" if pages_bytes == ram_bytes else f", of which the model's states take {format_bytes(pages_bytes)}"
    said = f"memory.ram {format_bytes(ram_bytes)}{used}" + (
        f" and memory.activations {format_bytes(kept_bytes)}" if kept_bytes else ""
    )
    against = f"{said}; {format_bytes(memory.usable_bytes)} of RAM can be had"
    if verdict.shortages:
        yield from (Finding("problem", "budget", shortage.said, shortage.remedy) for shortage in verdict.shortages)
    elif pages_bytes + kept_bytes > _BUDGET_SHARE * memory.usable_bytes:
        yield Finding("warning", "budget", against, "other activations and the interpreter come on top: leave a fifth")
    elif fact.config.model is not None and need is None:
        yield Finding(
            "warning",
            "budget",
            f"{against}; the model's need is not known: {verdict.unknown}",
            "try it: launch checks while it builds",
        )
    else:
        yield Finding(
            "ok",
            "budget",
            against + ("" if need is None else f", and {format_bytes(need.smallest_bytes)} is the smallest that works"),
        )


def check_folder(folder: FolderFact, config: ConfigFact | None) -> Iterator[Finding]:
    """A folder for page files: whose it is, room, O_DIRECT, and bandwidth."""
    what = f"ssd {folder.path}"
    yield _check_use(folder, what)
    yield _check_room(folder, what, config)
    if folder.backend == "aiofiles":
        forced = config is not None and config.config is not None and config.config.ssd.direct is True
        remedy = "buffered I/O is used, slower and by way of the page cache: take a local disk"
        remedy = 'set ssd.direct to "auto", or take another disk' if forced else remedy
        yield Finding("problem" if forced else "warning", what, f"O_DIRECT is refused on {folder.file_system}", remedy)
    elif folder.backend is not None:
        yield Finding("ok", what, "O_DIRECT is accepted")
    else:
        yield Finding("ok", what, "O_DIRECT not tried")
    if folder.point is not None:
        rates = f"write {folder.point.write_gb_per_s:.2f} GB/s, read {folder.point.read_gb_per_s:.2f} GB/s, briefly"
        yield Finding("ok", what, f"{rates}; offload bench-ssd says more")
    elif folder.failure:
        level: Level = "problem" if folder.wanted else "warning"
        yield Finding(level, what, f"measuring it failed: {folder.failure}", "look into it before training there")
    else:
        yield Finding("ok", what, f"bandwidth not measured: {folder.not_measured}")


def _check_use(folder: FolderFact, what: str) -> Finding:
    use = folder.use
    if use is not None and use.kind == "foreign" and folder.wanted:
        return Finding("problem", what, use.detail)  # says what to do as well
    if use is None or not folder.writable:
        said = "it cannot be read" if use is None else f"this user cannot write in {folder.existing}"
        return Finding(
            "problem" if folder.wanted else "warning", what, said, "change its owner or mode, or name another folder"
        )
    if use.holder is not None:
        return Finding(
            "warning", what, f"in use by process {use.holder}", "a second run there is refused until that one ends"
        )
    if use.kind == "run":
        return Finding("ok", what, f"holds a stopped run, {use.detail}")
    if use.kind == "foreign":
        return Finding("ok", what, "holds other things: name a new folder in it in ssd.paths")
    return Finding("ok", what, "empty" if use.kind == "empty" else f"new, would be made below {folder.existing}")


def _check_room(folder: FolderFact, what: str, config: ConfigFact | None) -> Finding:
    said = f"{folder.file_system}, {format_bytes(folder.free_bytes)} free"
    if folder.file_system in IN_RAM:
        return Finding("warning", what, said, "this is RAM itself: take a folder on a disk")
    if folder.file_system in _REMOTE:
        return Finding("warning", what, said, "this is another machine's disk: take a local one")
    known = None if config is None else config.config
    # A run's page files have their room already.
    if known is not None and (folder.use is None or folder.use.kind != "run"):
        share_bytes = known.memory.ram // len(known.ssd.paths)
        if folder.free_bytes < share_bytes:
            remedy = "page files hold what RAM does not, with commits up to twice: free some, or name one more path"
            return Finding(
                "warning", what, f"{said}, less than its share of memory.ram ({format_bytes(share_bytes)})", remedy
            )
    return Finding("ok", what, said)
