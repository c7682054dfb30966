"""The shape of the project: which way imports run, what is packaged, and that names mean what they say."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import offload

ROOT = Path(__file__).parents[2]
PACKAGES = ("pagemem", "scheduler", "optim", "offload")
#: Files in one folder.
MAX_FILES = 14


def sources() -> list[Path]:
    """Every module of the four packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    """A module's path as test ids show it."""
    return path.relative_to(ROOT).as_posix()


def settings() -> configparser.ConfigParser:
    """setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_imports_run_one_way() -> None:
    # In a process of its own: it leaves a thread of its progress display behind for a while.
    call = (
        "import sys; from importlinter.cli import lint_imports; "
        f"sys.exit(lint_imports(config_filename={str(ROOT / 'setup.cfg')!r}, cache_dir=None))"
    )
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_contract_is_the_chain() -> None:
    assert settings()["importlinter:contract:chain"]["layers"].split() == list(reversed(PACKAGES))


def rooms() -> list[Path]:
    """The four packages and the rooms in them."""
    return sorted(path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))


def test_the_four_packages_and_their_rooms_are_packaged() -> None:
    assert sorted(settings()["options"]["packages"].split()) == [
        ".".join(room.relative_to(ROOT).parts) for room in rooms()
    ]
    assert settings()["mypy"]["files"].split(", ") == list(PACKAGES)
    assert {path.parent for path in sources()} == set(rooms())


def test_a_room_is_one_level_below_its_package_and_has_few_files() -> None:
    assert [relative(room) for room in rooms() if len(room.relative_to(ROOT).parts) > 2] == []
    assert {relative(room): n for room in rooms() if (n := len(list(room.glob("*.py")))) > MAX_FILES} == {}


def test_every_room_has_its_place_in_the_order() -> None:
    contracts = settings()
    for package in PACKAGES:
        contract = contracts[f"importlinter:contract:{package}"]
        assert (contract["containers"], contract["exhaustive"]) == (package, "True")


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


def test_everything_public_is_there_and_described() -> None:
    assert offload.__all__ == sorted(offload.__all__)
    assert [name for name in offload.__all__ if not (getattr(offload, name).__doc__ or "").strip()] == []


def _public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of those classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


def _is_setter(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(isinstance(decorator, ast.Attribute) for decorator in node.decorator_list)


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    bare = [node.name for node in _public_definitions(tree) if not ast.get_docstring(node) and not _is_setter(node)]
    if tree.body and not ast.get_docstring(tree):  # An empty __init__ has nothing to say.
        bare.insert(0, "the module itself")
    assert bare == []


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_no_variable_shadows_a_package(path: Path) -> None:
    tree = ast.parse(path.read_text())
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert stored.isdisjoint(PACKAGES)


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
    assert list((ROOT / "tests").rglob("__init__.py")) == []
