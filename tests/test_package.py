"""The house: imports run one way, the wheel holds the tree, the README says what is so."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vadd_pyro

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vadd_pyro"

# Each module may import those before it, and nothing else of the package.
LAYERS = [
    {"_version", "history", "names", "rates", "schedules"},
    {"process"},
    {"times", "distributions", "recorder", "programs", "checkpoints", "metrics", "nn", "plotting"},
    {"allocation", "finite", "interruption", "locks"},
    {"sites", "chains", "data", "models", "guides", "weights", "batches", "distributed"},
    {"annealing", "batching", "compiling", "densities", "divergences", "emptiness", "estimators"},
    {"exchange", "quality", "resuming", "shared_sums"},
    {"elbo", "orders", "sampling", "stepping", "tempering"},
    {"compiled", "integration", "scoring"},
    {"chain", "exact", "grids", "infilling", "information", "likelihood", "monitor", "trainer"},
    {"inspection", "refitting", "training", "one_token"},
    {"demo", "cells", "compare", "panels", "report", "runs", "zoo"},
    {"experiments"},
    {"cli_experiments"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def unit(path: Path) -> str:
    """Module or subpackage of the engine that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    """All modules of the package, those behind the links to models/ and guides/ too."""
    return sorted(
        Path(folder) / name
        for folder, _, names in os.walk(PACKAGE, followlinks=True)
        for name in names
        if name.endswith(".py")
    )


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == "vadd_pyro":
                modules = [f"vadd_pyro.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        names |= {m.split(".")[1] for m in modules if m.startswith("vadd_pyro.")}
    return names


def test_imports_run_one_way():
    seen = set()
    for path in files():
        name = unit(path)
        if name == "__init__":
            continue
        seen.add(name)
        for other in imported(path) - {name}:
            if other in LEVEL:
                assert LEVEL[other] <= LEVEL[name], f"{path} imports {other}"
            if other in ("models", "guides"):
                above = ("models", "guides", "demo", "refitting", "zoo", "experiments")
                assert name in above, f"{path} imports {other}"
        assert not {"models", "guides"} & imported_bare(path), f"{path} imports models bare"
    assert seen == set(LEVEL)


def imported_bare(path: Path) -> set[str]:
    return {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    }


def test_modules_within_a_level_do_not_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for path in files():
        graph.setdefault(unit(path), set()).update(imported(path) - {unit(path)})

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path, name))}"
        for other in graph.get(name, ()):
            reach(other, (*path, name))

    for name in graph:
        if name != "__init__":
            reach(name, ())


def test_modules_are_short_and_say_what_they_export():
    for path in files():
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        if path.name not in ("__main__.py",):
            assert "__all__" in text, f"{path} has no __all__"
        assert text.count("\n") <= 400, f"{path} is long"


def test_public_names_exist_and_are_documented():
    for name in vadd_pyro.__all__:
        assert hasattr(vadd_pyro, name)
        assert name == "__version__" or getattr(vadd_pyro, name).__doc__, name
    for name in ("sample", "unroll", "fit", "log_likelihood_bound", "exact_distribution"):
        assert "Args:" in getattr(vadd_pyro, name).__doc__


@pytest.mark.parametrize(
    "module", ["schedules", "process", "distributions", "chain", "likelihood"]
)
def test_docstring_examples(module):
    tested = importlib.import_module(f"vadd_pyro.{module}")
    assert doctest.testmod(tested, extraglobs={"torch": __import__("torch")}).failed == 0


def test_the_wheel_holds_the_tree(tmp_path):
    source = tmp_path / "source"  # setuptools leaves a build folder where it works
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "docs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"),
            *("-w", str(tmp_path), str(source)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("vadd_pyro/")}
    expected = {str(path.relative_to(ROOT)) for path in files()} | {"vadd_pyro/py.typed"}
    assert held == expected
    others = [n for n in zipfile.ZipFile(wheel).namelist() if not n.startswith("vadd_pyro")]
    assert others == []


def test_readme_is_short_and_its_links_and_commands_exist():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 120
    for link in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^\s*make ([a-z-]+)", text, re.M):
        assert f"\n{target}:" in makefile
    for script in re.findall(r"python ((?:examples|benchmarks)/\w+\.py)", text):
        assert (ROOT / script).exists(), script


def test_the_readme_example_runs():
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code
    source = re.sub(r"num_iterations=\d+", "num_iterations=2, progress=False", code.group(1))
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
