"""Sizes, names and docstrings of the code, one test a rule; a failure lists everything that breaks it."""

from __future__ import annotations

import ast
from collections import defaultdict

from sources import PACKAGES, ROOT, files_of, functions, parsed, public_classes, public_definitions, relative

#: Files in one folder.
MAX_FILES = 14
#: Lines of one file, and the files that may have more: one subject that cannot be cut.
MAX_FILE_LINES = 350
LONG_FILES = {"offload/config.py", "offload/cli.py"}
MAX_FUNCTION_LINES = 50


def test_a_folder_has_few_files() -> None:
    folders = {path.parent for path in files_of(*PACKAGES, "tests", "benchmarks", "examples")}
    assert {relative(f): n for f in sorted(folders) if (n := len(list(f.glob("*.py")))) > MAX_FILES} == {}


def test_a_file_is_short() -> None:
    lengths = {
        relative(path): len(path.read_text().splitlines()) for path in files_of(*PACKAGES, "tests", "benchmarks")
    }
    assert {path: n for path, n in lengths.items() if n > MAX_FILE_LINES and path not in LONG_FILES} == {}


def test_a_function_is_short() -> None:
    long = {}
    for path in files_of(*PACKAGES, "tests", "benchmarks"):
        for node in functions(ast.parse(path.read_text())):
            if (n := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES:
                long[f"{relative(path)}: {node.name}"] = n
    assert long == {}


def test_no_two_public_classes_have_one_name() -> None:
    named = defaultdict(list)
    for path, tree in parsed().items():
        for node in public_classes(tree):
            named[node.name].append(path)
    assert {name: paths for name, paths in named.items() if len(paths) > 1} == {}


def test_modules_rooms_and_public_names_have_docstrings() -> None:
    bare = [path for path, tree in parsed().items() if not ast.get_docstring(tree)]
    bare += [
        f"{path}: {node.name}"
        for path, tree in parsed().items()
        for node in public_definitions(tree)
        if not ast.get_docstring(node) and not _is_setter(node)
    ]
    assert bare == []


def test_no_variable_shadows_a_package() -> None:
    shadows = []
    for path, tree in parsed().items():
        stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        shadows += [f"{path}: {name}" for name in sorted(stored.intersection(PACKAGES))]
    assert shadows == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in files_of("tests") if path.name.startswith("test_")]
    assert [name for name in names if names.count(name) > 1] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def _is_setter(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(isinstance(decorator, ast.Attribute) for decorator in node.decorator_list)
