"""The project's own source files, read and parsed once for all architecture tests."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("pagemem", "scheduler", "optim", "offload")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    """A path as failures show it."""
    return path.relative_to(ROOT).as_posix()


def files_of(*folders: str) -> list[Path]:
    """Every Python file in these folders of the root and below them."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed() -> dict[str, ast.Module]:
    """The syntax tree of every module of the four packages, by relative path."""
    return {relative(path): ast.parse(path.read_text()) for path in files_of(*PACKAGES)}


@cache
def settings() -> configparser.ConfigParser:
    """setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def rooms() -> list[Path]:
    """Folders of the four packages and of the rooms in them."""
    return sorted(path.parent for path in files_of(*PACKAGES) if path.name == "__init__.py")


def functions(tree: ast.Module) -> Iterator[Function]:
    """Every function and method, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_classes(tree: ast.Module) -> Iterator[ast.ClassDef]:
    """Classes at the top of a module that are not private."""
    return (node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))


def public_definitions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Public functions and classes of a module, and public methods of those classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
    for found in public_classes(tree):
        yield found
        yield from (node for node in found.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))


def imports() -> dict[str, set[str]]:
    """Which modules of ours each module imports, wherever in it the statement stands: ``TYPE_CHECKING`` blocks and
    functions included."""
    modules = {_module(path): tree for path, tree in parsed().items()}
    found: dict[str, set[str]] = {}
    for name, tree in modules.items():
        named: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                named |= {
                    submodule if (submodule := f"{node.module}.{alias.name}") in modules else node.module
                    for alias in node.names
                }
        found[name] = (named & set(modules)) - {name}
    return found


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
