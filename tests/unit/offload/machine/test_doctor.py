"""The checks of `offload doctor`: what they say of facts made up by hand."""

from __future__ import annotations

import configparser
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from offload.config_loading import load_config
from offload.machine import doctor
from offload.machine.bench_ssd import Point, Setting
from offload.machine.doctor import (
    LEAST_VERSIONS,
    Finding,
    as_record,
    check_config,
    check_copies,
    check_cpu,
    check_cuda,
    check_folder,
    check_memory,
    check_package,
    check_version,
    judge,
    run_doctor,
)
from offload.machine.facts import ConfigFact, CpuFact, CudaFact, Facts, FolderFact, MemoryFact, PackageFact
from pagemem.folders.run_directory import FolderUse
from pagemem.units import GiB, MiB

MEMORY = MemoryFact(
    total_bytes=16 * GiB,
    available_bytes=12 * GiB,
    data_limit_bytes=None,
    address_limit_bytes=None,
    locked_limit_bytes=8 * MiB,
    open_files_limit=1024,
    cgroup_limit_bytes=None,
    cgroup_free_bytes=None,
)
OURS = PackageFact("optim", "/ours/optim", ("/ours/optim",), None, ("offload",))
POINT = Point(Setting(4 * MiB, 4), 2.0, 3.0)
FOLDER = FolderFact(
    path="/disk/pages",
    wanted=True,
    existing="/disk",
    writable=True,
    file_system="ext4",
    free_bytes=100 * GiB,
    use=FolderUse("absent"),
    backend="direct",
    point=POINT,
)
CPU = CpuFact(usable=2, logical=4, physical=2, torch_threads=2)


def config(ram: str = "1GiB", **sections: Any) -> ConfigFact:
    """A configuration with this budget."""
    raw = {"memory": {"ram": ram}, "ssd": {"paths": ["/disk/pages"]}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return ConfigFact("run.toml", load_config(raw))


FACTS = Facts(
    versions={"python": "3.11.7", "torch": "2.13.0+cpu", "numpy": "2.4.6", "offload": "0.1.0"},
    packages=(OURS,),
    cpu=CPU,
    memory=MEMORY,
    copy_gb_per_s=10.0,
    cuda_build=False,
    nvidia_device=False,
    cuda=(),
    folders=(FOLDER,),
    config=config(),
)


def levels(findings: list[Finding]) -> dict[str, str]:
    """The worst level by what was looked at."""
    order = ("ok", "warning", "problem")
    found: dict[str, str] = {}
    for finding in findings:
        found[finding.what] = max(found.get(finding.what, "ok"), finding.level, key=order.index)
    return found


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    """Level and text of what is not ok; each has to say what to do."""
    found = [finding for finding in findings if finding.level != "ok"]
    assert all(finding.remedy or "name" in finding.said for finding in found)
    return [(finding.level, finding.said) for finding in found]


def test_a_good_machine_has_only_ok_lines() -> None:
    findings = judge(FACTS)
    assert bad(findings) == []
    assert list(levels(findings)) == [
        "python",
        "torch",
        "numpy",
        "offload",
        "package optim",
        "cpu",
        "ram",
        "RLIMIT_DATA",
        "RLIMIT_AS",
        "RLIMIT_MEMLOCK",
        "RLIMIT_NOFILE",
        "cgroup memory.max",
        "host tier",
        "cuda",
        "config",
        "budget",
        "ssd /disk/pages",
    ]


def test_least_versions_are_those_of_the_package() -> None:
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[4] / "setup.cfg")
    required = [
        line.split(">=")
        for line in settings["options"]["install_requires"].split("\n")
        if line.startswith(("torch", "numpy"))
    ]
    required.append(["python", settings["options"]["python_requires"].removeprefix(">=")])
    assert {name: tuple(map(int, least.split(",")[0].split("."))) for name, least in required} == LEAST_VERSIONS


@pytest.mark.parametrize(
    ("name", "found", "level"),
    [
        ("torch", "2.10.1", "problem"),
        ("torch", "2.11.0a0+git12", "ok"),
        ("torch", "3.0", "ok"),
        ("numpy", "1.25.2", "problem"),
        ("python", "3.9.18", "problem"),
        ("offload", "0.1.0", "ok"),
    ],
)
def test_versions(name: str, found: str, level: str) -> None:
    finding = check_version(name, found)
    assert finding.level == level and found in finding.said and (level == "ok" or "install" in finding.remedy)


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({}, "ok", "/ours/optim"),
        ({"found": ("/theirs/optim.py", "/ours/optim")}, "problem", "finds /theirs/optim.py, not /ours/optim"),
        ({"found": ("/theirs/optim",)}, "problem", "finds /theirs/optim"),
        ({"found": ()}, "ok", "/ours/optim"),  # through the finder of an editable installation
        (
            {"distributions": ("offload", "optim")},
            "problem",
            "several installed distributions bring one: offload, optim",
        ),
        ({"found": ("/ours/optim", "/theirs/optim")}, "warning", "another is at /theirs/optim"),
        ({"in_current_directory": "/here/optim"}, "warning", "the current directory holds another one, /here/optim"),
        ({"in_current_directory": "/ours/optim"}, "ok", "/ours/optim"),
    ],
)
def test_a_colliding_package(change: dict[str, Any], level: str, said: str) -> None:
    finding = check_package(dataclasses.replace(OURS, **change))
    assert finding.level == level and said in finding.said and bool(finding.remedy) == (level != "ok")


def test_more_threads_than_cores() -> None:
    assert check_cpu(CPU).level == "ok"
    many = check_cpu(dataclasses.replace(CPU, torch_threads=4))
    assert many.level == "warning" and "4 threads" in many.said and "2 or less" in many.remedy
    train = {"steps": 1, "batch": 1, "seq": 1, "threads": 3}
    assert check_cpu(CPU, config(train=train)).level == "warning"
    assert check_cpu(dataclasses.replace(CPU, torch_threads=4), config(train={**train, "threads": 1})).level == "ok"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"available_bytes": GiB // 2}, "ram"),
        ({"data_limit_bytes": 4 * GiB}, "RLIMIT_DATA"),
        ({"address_limit_bytes": 4 * GiB}, "RLIMIT_AS"),
        ({"open_files_limit": 64}, "RLIMIT_NOFILE"),
        ({"cgroup_limit_bytes": 2 * GiB, "cgroup_free_bytes": GiB // 4}, "cgroup memory.max"),
    ],
)
def test_limits_that_could_hurt(change: dict[str, int], what: str) -> None:
    findings = list(check_memory(dataclasses.replace(MEMORY, **change)))
    assert {name for name, level in levels(findings).items() if level != "ok"} == {what}
    assert bad(findings)[0][0] == "warning"


def test_limits_that_do_not() -> None:
    roomy = dataclasses.replace(
        MEMORY, data_limit_bytes=16 * GiB, address_limit_bytes=16 * GiB, locked_limit_bytes=None, open_files_limit=None,
        cgroup_limit_bytes=8 * GiB, cgroup_free_bytes=6 * GiB,
    )  # fmt: skip
    assert bad(list(check_memory(roomy))) == []
    assert roomy.usable_bytes == 6 * GiB and MEMORY.usable_bytes == 12 * GiB


def test_copies() -> None:
    assert check_copies(12.34).said == "copies 12.3 GB/s, best of 5"
    assert check_copies(None).said == "copies not measured"


def test_devices() -> None:
    assert [f.level for f in check_cuda((), cuda_build=True, nvidia_device=False)] == ["ok"]
    for build, said in ((False, "without CUDA"), (True, "driver")):
        (finding,) = check_cuda((), cuda_build=build, nvidia_device=True)
        assert finding.level == "warning" and said in finding.said and finding.remedy
    works, fails = CudaFact("Card", 80 * GiB, 70 * GiB, None), CudaFact("Card", 80 * GiB, 70 * GiB, "no memory")
    first, second = check_cuda((works, fails), cuda_build=True, nvidia_device=True)
    assert first == Finding("ok", "cuda:0", "Card, 80.0 GiB, 70.0 GiB free, pinning works")
    assert (
        second.level == "warning"
        and second.what == "cuda:1"
        and second.said.endswith("pinning fails: no memory")
        and second.remedy
    )


@pytest.mark.parametrize(
    ("ram", "activations", "change", "level"),
    [
        ("9GiB", None, {}, "ok"),
        ("10GiB", None, {}, "warning"),
        ("13GiB", None, {}, "problem"),
        ("9GiB", "4GiB", {}, "warning"),
        ("9GiB", None, {"cgroup_limit_bytes": 8 * GiB, "cgroup_free_bytes": 8 * GiB}, "problem"),
        ("3GiB", None, {"data_limit_bytes": 3 * GiB}, "problem"),
        ("3GiB", None, {"address_limit_bytes": 2 * GiB}, "problem"),
        ("3GiB", None, {"data_limit_bytes": 4 * GiB}, "ok"),
    ],
)
def test_the_budget_against_what_there_is(
    ram: str, activations: str | None, change: dict[str, int], level: str
) -> None:
    section = {} if activations is None else {"activations": activations}
    findings = list(check_config(config(ram, memory={"ram": ram, **section}), dataclasses.replace(MEMORY, **change)))
    assert levels(findings) == {"config": "ok", "budget": level}
    assert ("memory.activations 4.0 GiB" in findings[1].said) == (activations is not None)


def test_a_bad_config_is_a_problem_a_line() -> None:
    findings = list(check_config(ConfigFact("run.toml", None, ("run.toml: one", "run.toml: two")), MEMORY))
    assert [(f.level, f.what, f.said) for f in findings] == [
        ("problem", "config", "run.toml: one"),
        ("problem", "config", "run.toml: two"),
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"use": FolderUse("empty")}, []),
        ({"use": FolderUse("run", "an-id")}, []),
        ({"use": FolderUse("run", "an-id", "77")}, [("warning", "in use by process 77")]),
        (
            {"use": FolderUse("foreign", "holds a thesis; name another folder")},
            [("problem", "holds a thesis; name another folder")],
        ),
        ({"use": FolderUse("foreign", "holds a thesis"), "wanted": False}, []),
        ({"use": None}, [("problem", "it cannot be read")]),
        ({"writable": False}, [("problem", "this user cannot write in /disk")]),
        ({"writable": False, "wanted": False}, [("warning", "this user cannot write in /disk")]),
        ({"file_system": "tmpfs"}, [("warning", "tmpfs, 100.0 GiB free")]),
        ({"file_system": "nfs4"}, [("warning", "nfs4, 100.0 GiB free")]),
        ({"free_bytes": GiB // 2}, [("warning", "ext4, 512.0 MiB free, less than its share of memory.ram (1.0 GiB)")]),
        ({"free_bytes": GiB // 2, "use": FolderUse("run", "an-id")}, []),
        ({"backend": "aiofiles"}, [("warning", "O_DIRECT is refused on ext4")]),
        ({"backend": None, "point": None, "not_measured": "not asked for"}, []),
        (
            {"backend": None, "point": None, "failure": "Input/output error"},
            [("problem", "measuring it failed: Input/output error")],
        ),
        (
            {"backend": None, "point": None, "failure": "no room", "wanted": False},
            [("warning", "measuring it failed: no room")],
        ),
    ],
)
def test_folders(change: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert bad(list(check_folder(dataclasses.replace(FOLDER, **change), config()))) == expected


def test_o_direct_that_is_insisted_on_and_refused_is_a_problem() -> None:
    refused = dataclasses.replace(FOLDER, backend="aiofiles")
    assert bad(list(check_folder(refused, config(ssd={"direct": True})))) == [
        ("problem", "O_DIRECT is refused on ext4")
    ]


def test_what_the_lines_of_a_folder_say() -> None:
    assert [finding.said for finding in check_folder(FOLDER, None)] == [
        "new, would be made below /disk",
        "ext4, 100.0 GiB free",
        "O_DIRECT is accepted",
        "write 2.00 GB/s, read 3.00 GB/s, briefly; offload bench-ssd says more",
    ]
    unmeasured = dataclasses.replace(FOLDER, backend=None, point=None, not_measured="not asked for")
    assert [finding.said for finding in check_folder(unmeasured, None)][2:] == [
        "O_DIRECT not tried",
        "bandwidth not measured: not asked for",
    ]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"memory": dataclasses.replace(MEMORY, open_files_limit=64)}, 0),
        ({"packages": (dataclasses.replace(OURS, found=("/theirs/optim.py",)),)}, 1),
        ({"config": ConfigFact("run.toml", None, ("run.toml: memory.ram is missing",)), "folders": ()}, 1),
    ],
)
def test_lines_json_and_exit_code_agree(
    change: dict[str, Any], code: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dataclasses.replace(FACTS, **change)
    monkeypatch.setattr(doctor, "gather", lambda file, changes, *, bench: facts)
    out = io.StringIO()
    assert (
        run_doctor(None, Console(file=out, force_terminal=terminal, color_system=None, width=60), as_json=True) == code
    )
    *lines, summary, last = out.getvalue().splitlines()
    findings = judge(facts)
    assert lines == [finding.line for finding in findings]
    assert summary == ", ".join(
        f"{what}: {sum(finding.level == level for finding in findings)}"
        for level, what in (("ok", "ok"), ("warning", "warnings"), ("problem", "problems"))
    )
    record = json.loads(last)
    assert record == json.loads(json.dumps(as_record(facts, findings)))
    assert record["ok"] == (code == 0) and [Finding(**finding) for finding in record["findings"]] == findings
    assert record["facts"]["memory"]["total_bytes"] == 16 * GiB


def test_a_line_by_hand() -> None:
    assert Finding("warning", "cpu", "busy", "wait").line == "warning  cpu: busy -> wait"
    assert Finding("ok", "cpu", "idle").line == "ok       cpu: idle"
