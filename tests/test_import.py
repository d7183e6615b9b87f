"""Imports: light until a name is used, complete when one is, and no library before its time."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import vadd_pyro
from vadd_pyro import data, experiments, names, zoo
from vadd_pyro.nn import NETWORKS, MLPNetworks
from vadd_pyro.process import MaskingProcess

ROOT = Path(__file__).parents[1]
PARTS = {"data", "guides", "inspection", "metrics", "models", "nn", "plotting"}
HEAVY = {"arviz", "matplotlib", "numpy", "pandas", "pyro", "scipy", "sklearn", "torch", "zuko"}


def fresh(code: str) -> list:
    """What code that prints JSON says in an interpreter of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


# ------------------------------------------------------------- what is loaded, and when

LIGHT = """
import contextlib, io, json, sys
import vadd_pyro
vadd_pyro.__version__, dir(vadd_pyro)
from vadd_pyro import cli
statuses, said = [], []
for arguments in {arguments}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = cli.main(arguments)
        except SystemExit as error:
            status = error.code
    statuses.append(status)
    said.append(out.getvalue())
print(json.dumps([statuses, said, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""
COMMANDS = ["demo", "compare", "inspect", "train", "evaluate", "sample", "infill"]


def test_help_lists_and_bad_arguments_need_no_torch():
    good = [["--help"], *([command, "--help"] for command in COMMANDS), ["compare", "--list"]]
    bad = {
        "invalid choice: 'digitz'": ["train", "digitz"],
        "unknown priors: 'nrmal'": ["train", "digits", "--prior", "nrmal"],
        "unknown guides: 'nrmal'": ["train", "digits", "--guide", "nrmal"],
        "unknown times: 'never'": ["train", "digits", "--times", "never"],
        "invalid choice: 'cnn'": ["train", "digits", "--backbone", "cnn"],
        "has the presets laptop, got 'huge'": ["train", "digits", "--preset", "huge"],
        "needs --evaluate": ["train", "digits", "--num-rows", "9"],
        "--set seed cannot be given": ["train", "digits", "--set", "seed=1"],
        "data must be among checkerboard": ["compare", "--data", "moons,board"],
        "unknown priors: 'ply'": ["compare", "--priors", "flow,ply"],
        "unknown guides: 'ply'": ["compare", "--guides", "ply"],
        "unknown objectives: 'elbow'": ["compare", "--objectives", "elbow"],
        "--times: unknown times": ["compare", "--times", "never"],
        "unknown priors: 'normal'": ["demo", "--priors", "normal"],
        "invalid choice: 'board'": ["demo", "--data", "board"],
        "invalid choice: 'dmo'": ["dmo"],
    }
    statuses, said, loaded = fresh(LIGHT.format(arguments=[*good, *bad.values()]))
    assert statuses == [0] * len(good) + [2] * len(bad)
    for text, command in zip(said[1:], COMMANDS, strict=False):
        assert text.startswith(f"usage: vadd-pyro {command}")
    for message, text in zip(bad, said[len(good) :], strict=True):
        assert message in text
    assert not HEAVY & set(loaded)


WHOLE = """
import json, sys
import torch, pyro
import torch.distributed.nn.functional  # has modules of its own making
before = set(sys.modules)
import vadd_pyro

# A distribution alone brings what is registered for it.
d = vadd_pyro.DiagonalNormal(torch.zeros(2), torch.ones(2))
independent = pyro.distributions.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
divergences = [
    float(torch.distributions.kl_divergence(*pair))
    for pair in ((d, d), (d, independent), (independent, d))
]
modules = [vadd_pyro.elbo.__name__, vadd_pyro.experiments.presets.__name__]
public = {}
exec("from vadd_pyro import *", public)
for name in %s:
    __import__(name)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([divergences, modules, sorted(public), sorted(new)]))
"""


def test_no_library_beside_torch_and_pyro_is_imported_before_it_is_needed():
    modules = [
        ".".join(Path(folder, name).relative_to(ROOT).with_suffix("").parts)
        for folder, _, files in os.walk(ROOT / "vadd_pyro", followlinks=True)
        for name in files
        if name.endswith(".py") and name != "__main__.py"
    ]
    assert len(modules) > 100
    divergences, reached, public, new = fresh(WHOLE % modules)
    assert divergences == [0, 0, 0]
    assert reached == ["vadd_pyro.elbo", "vadd_pyro.experiments.presets"]
    assert set(vadd_pyro.__all__) == set(public) - {"__builtins__"}
    # Whatever torch and Pyro load themselves is in place before, and allowed.
    assert set(new) - sys.stdlib_module_names == {"vadd_pyro"}


# ------------------------------------------------------------------- the names of the package


def test_names_are_told_alike_to_type_checkers_and_to_python():
    tree = ast.parse((ROOT / "vadd_pyro" / "__init__.py").read_text())
    # ``if TYPE_CHECKING:``, not the ``if not TYPE_CHECKING:`` below it
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    homes = {name: f"vadd_pyro.{module}" for name, module in vadd_pyro._MODULES.items()}
    assert seen == homes | dict.fromkeys(PARTS, "vadd_pyro")
    assert set(seen) | {"__version__"} == set(vadd_pyro.__all__)
    assert len(vadd_pyro.__all__) == len(set(vadd_pyro.__all__))


@pytest.mark.parametrize("name", vadd_pyro.__all__)
def test_public_names_are_those_of_their_modules(name):
    found = getattr(vadd_pyro, name)
    assert found is getattr(vadd_pyro, name)
    assert name in dir(vadd_pyro)
    if name in PARTS:
        assert found is importlib.import_module(f"vadd_pyro.{name}")
    elif name != "__version__":
        assert found is getattr(
            importlib.import_module(f"vadd_pyro.{vadd_pyro._MODULES[name]}"), name
        )
        assert pickle.loads(pickle.dumps(found)) is found
        # A module of that name would take its place once it is imported.
        assert importlib.util.find_spec(f"vadd_pyro.{name}") is None


def test_modules_are_reached_as_attributes_and_listed():
    assert vadd_pyro.schedules is sys.modules["vadd_pyro.schedules"]
    assert {"elbo", "schedules", "zoo", "cli"} <= set(dir(vadd_pyro))
    for name in dir(vadd_pyro):
        assert hasattr(vadd_pyro, name), name


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="module 'vadd_pyro' has no attribute 'smaple'"):
        _ = vadd_pyro.smaple
    with pytest.raises(ImportError, match="cannot import name 'smaple'"):
        exec("from vadd_pyro import smaple")
    assert not hasattr(vadd_pyro, "_repr_html_")


def test_a_module_that_lacks_a_library_says_which(monkeypatch):
    monkeypatch.delitem(sys.modules, "vadd_pyro.zoo")
    monkeypatch.delattr(vadd_pyro, "zoo")
    monkeypatch.setitem(sys.modules, "vadd_pyro.elbo", None)
    with pytest.raises(ModuleNotFoundError, match=r"vadd_pyro\.elbo"):
        _ = vadd_pyro.zoo


# ------------------------------------------------------------------- lists for the command line


def test_names_without_torch_are_those_of_the_things_they_name():
    assert set(names.TOYS) == set(data.TOYS)
    assert {data.named(name, 10).length for name in names.KNOWN_LAWS} == {2, 4, 6}
    assert set(names.BACKBONES) == set(NETWORKS)
    assert {name: tuple(own) for name, own in experiments.PRESETS.items()} == names.PRESETS


def test_every_name_is_built_and_every_guide_fits_some_prior():
    process = MaskingProcess(5, 2)
    networks = MLPNetworks(process, hidden_dim=8)
    fitting = {"auto", "none"}
    for prior in names.PRIORS:
        assert zoo.build(prior, "auto", process, num_codes=4, networks=networks).model
        for guide in set(names.GUIDES) - fitting:
            with contextlib.suppress(ValueError):  # the prior's latent is of another kind
                zoo.build(prior, guide, process, num_codes=4, networks=networks)
                fitting.add(guide)
    assert fitting == set(names.GUIDES)
    for name in names.TIMES:
        assert zoo.times_named(name)
    for name in names.OBJECTIVES:
        assert zoo.objective(name, "balanced", process, 9)


# ---------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_tells_waiting_from_working():
    script = ROOT / "benchmarks" / "start.py"
    spec = importlib.util.spec_from_file_location("start_benchmark", script)
    assert spec
    assert spec.loader
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    waiting = ("-c", "import time; time.sleep(0.5)")
    costs = start.measure({"nothing": ("-c", "pass"), "sleep": waiting}, rounds=2)
    assert len(costs["sleep"]) == len(costs["nothing"]) == 2
    assert all(cost.wall > 0.5 > cost.processor for cost in costs["sleep"])
    with pytest.raises(RuntimeError, match="ended with 3"):
        start.measure({"fails": ("-c", "raise SystemExit(3)")}, rounds=1)
    rounds = [start.Cost(2.0, 1.0), start.Cost(4.0, 2.0), start.Cost(30.0, 3.0)]
    assert start.medians(rounds) == (4.0, 2.0)
    assert start.medians(rounds, [start.Cost(1.0, 1.0)] * 2 + [start.Cost(10.0, 1.0)]) == (
        3.0,
        2.0,
    )
    assert set(start.TARGETS) <= set(start.VARIANTS)
