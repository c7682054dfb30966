"""Which way imports run, which folders are packaged, and what importing `offload` gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from sources import PACKAGES, ROOT, imports, parsed, relative, rooms, settings

import offload

#: All that `import offload` gives, and nothing else but modules.
PUBLIC = [
    "BudgetError", "BudgetNeed", "Callback", "Change", "ChecksumError", "CommitError", "Config", "ConfigError",
    "DeviceError", "DiskFullError", "Engine", "ExportError", "FactoryError", "MemoryReport", "NonFiniteError",
    "OffloadError", "PagedParameter", "Resumed", "RunDirectoryError", "StaleGradientError", "Stats", "StorageError",
    "TierUse", "announce", "deferred_init", "from_pretrained", "gathered", "initialize", "load_config", "load_weights",
    "prepare", "smallest_budget",
]  # fmt: skip


def test_imports_run_one_way() -> None:
    # In a process of its own: it leaves a thread of its progress display behind for a while.
    call = (
        "import sys; from importlinter.cli import lint_imports; "
        f"sys.exit(lint_imports(config_filename={str(ROOT / 'setup.cfg')!r}, cache_dir=None))"
    )
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_contract_is_the_chain_and_makes_no_exceptions() -> None:
    contracts = {name: section for name, section in settings().items() if name.startswith("importlinter")}
    assert contracts["importlinter:contract:chain"]["layers"].split() == list(reversed(PACKAGES))
    for section in contracts.values():  # Imports for type checking alone count as well.
        assert section.keys().isdisjoint({"ignore_imports", "exclude_type_checking_imports"})


def test_every_room_has_its_place_in_the_order() -> None:
    for package in PACKAGES:
        contract = settings()[f"importlinter:contract:{package}"]
        assert (contract["containers"], contract["exhaustive"]) == (package, "True")


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Takes away what imports nothing that is left, or what nothing that is left imports, until only circles remain."""
    remaining = imports()
    while True:
        named = set().union(*remaining.values())
        kept = {module: found & remaining.keys() for module, found in remaining.items() if module in named and found}
        if kept == remaining:
            break
        remaining = kept
    assert remaining == {}


def test_the_four_packages_and_their_rooms_are_packaged() -> None:
    assert sorted(settings()["options"]["packages"].split()) == [
        ".".join(room.relative_to(ROOT).parts) for room in rooms()
    ]
    assert settings()["mypy"]["files"].split(", ") == [*PACKAGES, "benchmarks"]
    assert {(ROOT / path).parent for path in parsed()} == set(rooms())


def test_a_room_is_one_level_below_its_package() -> None:
    assert [relative(room) for room in rooms() if len(room.relative_to(ROOT).parts) > 2] == []


def test_pyproject_names_the_build_backend_and_nothing_else() -> None:
    assert len((ROOT / "pyproject.toml").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["scheduler", "optim", "pagemem"])
def test_a_foreign_package_of_the_same_name_is_refused(name: str, tmp_path: Path) -> None:
    foreign = tmp_path / name
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", "import offload"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and repr(name) in last and str(foreign) in last and "uninstall" in last


def test_everything_public_is_listed_and_described() -> None:
    assert offload.__all__ == sorted(PUBLIC)
    others = {name for name in dir(offload) if not name.startswith("_")} - set(PUBLIC)
    assert {name for name in others if not isinstance(getattr(offload, name), ModuleType)} == set()
    assert {name for name in others if getattr(offload, name).__name__ != f"offload.{name}"} == set()
    assert [name for name in PUBLIC if not (getattr(offload, name).__doc__ or "").strip()] == []
