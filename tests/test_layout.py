"""The folders' order: a module imports from its own folder and from those below it, and there is no circle."""
from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bnn_fast

PACKAGE = Path(bnn_fast.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
# What each folder or top-level module may import beside itself.
MAY_IMPORT = {
    "_version": (),
    "_build": ("_version",),
    "checks": (),
    "priors": ("checks",),
    "operators": ("_build", "checks", "priors"),
    "layers": ("checks", "operators", "priors"),
    "metrics": ("checks",),
    "inference": ("checks", "layers", "metrics", "operators", "priors"),
    "conversion": ("checks", "inference", "layers", "priors"),
    "plotting": ("checks", "inference", "layers", "metrics", "priors"),
    "__init__": None,  # the public names, from everywhere
    "demos": None,
}


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imports(name: str, path: Path) -> set[str]:
    """The package's modules that a module imports, as dotted names from the package."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = name.split(".")[:-node.level]
        base += node.module.split(".") if node.module else []
        for alias in node.names:
            if alias.name in ("_C", "_autograd"):  # the compiled extensions
                continue
            for target in (".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"])):
                if target in known:
                    found.add(target)
                    break
    return found


def test_folders_import_from_below_alone():
    for name, path in modules().items():
        folder = name.split(".")[0]
        assert folder in MAY_IMPORT, f"{name}: tell what it may import"
        allowed = MAY_IMPORT[folder]
        for target in imports(name, path):
            below = target.split(".")[0]
            assert allowed is None or below in (folder, *allowed), f"{name} imports {target}"


def test_there_is_no_circle():
    graph = {name: imports(name, path) for name, path in modules().items() if not name.endswith("__init__")}
    order = list(TopologicalSorter(graph).static_order())
    assert set(graph) <= set(order) and len(graph) > 20
    assert any(imports(name, path) for name, path in modules().items() if name.startswith("inference"))


def test_each_folder_says_what_belongs_there():
    for init in PACKAGE.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text())), init


def test_files_fit_in_the_head():
    folders, kinds = ("benchmarks", "bnn_fast", "csrc", "tests"), {".py", ".h", ".cpp", ".cu", ".cuh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    long = {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 300}
    assert not long and (len(files) > 150 or not (ROOT / "csrc").exists())


@pytest.mark.skipif(not (ROOT / "tests" / "layers").exists(), reason="installed without its tests")
def test_the_tests_mirror_the_package():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"priors"}
    assert folders <= {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
