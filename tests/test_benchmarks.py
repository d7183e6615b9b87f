"""What the benchmarks write down, and that their yardsticks do what the package does."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

from vadd_pyro import (
    MaskedDiffusionELBO,
    MaskingProcess,
    experiments,
    guides,
    log_likelihood_bound,
    models,
)
from vadd_pyro.nn import MLPDecoder, MLPEncoder

ROOT = Path(__file__).parents[1]
PAGE = "# Title\n\nBefore.\n\n<!-- bench:a -->\nold\n<!-- /bench:a -->\n\nBetween a and b.\n"
PAGE += "<!-- bench:b -->\n<!-- /bench:b -->\nBehind."
CONDITIONS = {
    "date": "2026-01-02",
    "processor": "a processor",
    "cores": 2,
    "torch": "2.0",
    "pyro": "1.9",
    "python": "3.11",
    "load": 0.25,
}


@pytest.fixture
def bench(monkeypatch):
    """Imports a file of benchmarks/ as it finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


# ------------------------------------------------------------------------------------- the page


def test_tables_are_replaced_and_prose_is_kept(bench):
    pages = bench("pages")
    table = pages.table(["x", "y"], [[1, 2]])
    written = pages.replaced(PAGE, "a", table)
    assert "old" not in written
    assert table in written
    outside = PAGE.split("\nold\n")
    assert written.startswith(outside[0])
    assert written.endswith(outside[1])
    assert pages.replaced(written, "a", table) == written
    assert pages.replaced(written, "a", "old").replace("\n\nold\n\n", "\nold\n") == PAGE


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Prose alone.", "must hold <!-- bench:a --> once, it is there 0 times"),
        (PAGE + "<!-- /bench:a -->", "<!-- /bench:a --> once, it is there 2 times"),
        ("<!-- /bench:a --> <!-- bench:a -->", "before"),
    ],
)
def test_a_page_without_its_markers_is_refused(bench, text, told):
    pages = bench("pages")
    with pytest.raises(ValueError, match=told):
        pages.replaced(text, "a", "table")
    with pytest.raises(ValueError, match="no markers"):
        pages.replaced(PAGE, "a", "<!-- bench:b -->")
    with pytest.raises(ValueError, match="must have 2 cells"):
        pages.table(["x", "y"], [[1, 2], [3]])


def test_the_page_of_the_docs_has_a_place_for_every_part(bench):
    suite, rendering = bench("suite"), bench("rendering")
    page = ROOT / "docs" / "performance.md"
    bench("pages").check_markers(page.read_text(), list(suite.PARTS), page)
    assert set(suite.PARTS) == set(rendering.RENDER)
    for part in suite.PARTS.values():
        assert (ROOT / "benchmarks" / part.script).exists()


# ------------------------------------------------------------------------------------ the suite


def script(path: Path, body: str) -> str:
    path.write_text(f"import json, sys\nout = sys.argv[sys.argv.index('--json') + 1]\n{body}\n")
    return str(path)


@pytest.fixture
def trial(bench, tmp_path, monkeypatch):
    """A suite of two parts on a page of its own: the scripts' text, and how it is called."""
    suite = bench("suite")
    page = tmp_path / "page.md"
    page.write_text(PAGE)

    def run(a: str, b: str, *arguments: str) -> int:
        parts = {
            name: suite.Part(script(tmp_path / f"{name}.py", body), (), (), 3, 1)
            for name, body in (("a", a), ("b", b))
        }
        monkeypatch.setattr(suite, "PARTS", parts)
        render = {name: lambda record: f"found {record['found']}" for name in parts}
        monkeypatch.setattr(suite, "RENDER", render)
        folder = tmp_path / "results"
        return suite.main(["--results", str(folder), "--page", str(page), *arguments])

    return run, page, tmp_path / "results"


GOOD = "json.dump({'found': sys.argv[sys.argv.index('--rounds') + 1]}, open(out, 'w'))"


def test_finished_parts_stay_when_another_fails(trial, capsys):
    run, page, results = trial
    assert run(GOOD, "sys.exit(3)") == 1
    assert "b ended with 3" in capsys.readouterr().err
    assert "found 3" in page.read_text()
    record = json.loads((results / "a.json").read_text())
    assert set(CONDITIONS) == set(record["conditions"])
    assert [file.name for file in results.iterdir()] == ["a.json"]
    # What stands outside of the markers, and b's empty place, are as they were.
    assert page.read_text().replace("\n\nfound 3\n\n", "\nold\n") == PAGE


def test_one_part_alone_with_other_rounds_and_tables_without_a_run(trial, capsys):
    run, page, _ = trial
    assert run("sys.exit(3)", GOOD, "--only", "b", "--rounds", "7") == 0
    assert "about 2 minutes" in capsys.readouterr().out  # seven rounds of three
    assert "found 7" in page.read_text()
    assert "old" in page.read_text()
    page.write_text(PAGE)
    assert run("sys.exit(3)", "sys.exit(3)", "--render") == 0
    assert "found 7" in page.read_text()


def test_the_suite_refuses_before_it_runs_anything(trial, capsys):
    run, page, results = trial
    with pytest.raises(SystemExit):
        run(GOOD, GOOD, "--only", "c")
    assert "there is no part 'c': expected some of a, b" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(GOOD, GOOD, "--quick")  # where the figure is the one of the docs
    assert "--quick measures nothing worth keeping" in capsys.readouterr().err
    page.write_text(PAGE.replace("<!-- /bench:b -->", ""))
    with pytest.raises(SystemExit):
        run(GOOD, GOOD)
    assert "page.md must hold <!-- /bench:b --> once" in capsys.readouterr().err
    assert not results.exists()


# ----------------------------------------------------------------------------------- the tables


def training(numpyro: float | None = None) -> dict:
    seconds = {
        "yardstick": 0.002,
        "yardstick compiled": 0.001,
        "user": 0.003,
        "package": 0.0022,
        "compiled": 0.0005,
        "products": 0.0003,
        "compiled bfloat16": 0.0004,
    }
    seconds |= {} if numpyro is None else {"numpyro": numpyro}
    return {"conditions": CONDITIONS, "rounds": 9, "training": {"tiny": seconds}}


def test_ratios_are_told_with_their_targets_and_conditions(bench):
    text = bench("rendering").speed(training(0.001))
    assert "2026-01-02: a processor, 2 cores; torch 2.0" in text
    assert "medians of 9 alternated rounds; load average 0.25" in text
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[3:-1]]
    assert cells[:5] == ["2.00", "0.50", "1.50 (1.70)", "1.10", "0.25 (0.25)"]
    assert cells[5:] == ["0.15", "0.50", "0.50", "0.20"]


def test_steps_without_empty_rows_have_a_row_of_their_own(bench):
    record = training(0.001)
    seconds = record["training"]["tiny"]
    for name in ("user", "package", "compiled", "products", "compiled bfloat16"):
        seconds[f"{name} dropping"] = seconds[name] / 2
    *_, before, last = bench("rendering").speed(record).splitlines()
    assert before.startswith("| tiny | D 2")
    assert last.startswith("| tiny, `drop_empty_rows` |")
    cells = [cell.strip() for cell in last.split("|")[3:-1]]
    assert cells == ["", "", "0.75 (1.70)", "0.55", "0.12 (0.25)", "0.075", "", "0.25", "0.10"]


def test_columns_of_numpyro_are_kept_from_the_last_time_it_was_there(bench):
    rendering = bench("rendering")
    first, second, third = training(0.001), training(), training()
    rendering.keep_numpyro(first, None, "training", "yardstick")
    assert "NumPyro was" not in rendering.speed(first)
    for new, old in ((second, first), (third, second)):
        rendering.keep_numpyro(new, old, "training", "yardstick")
        assert new["numpyro_from"] == {"date": "2026-01-02", "ratios": {"tiny": 0.5}}
        assert "NumPyro was not installed: its column is that of 2026-01-02" in (
            rendering.speed(new)
        )
        assert "| 0.50 | 0.50 |" in rendering.speed(new)
    fresh = training(0.002)
    rendering.keep_numpyro(fresh, third, "training", "yardstick")
    assert "numpyro_from" not in fresh
    assert "so that its column is empty" in rendering.speed(training())


def test_samplers_are_told_by_steps_and_by_variant(bench):
    seconds = {"naive": 0.5, "package": 0.1, "naive compiled": 0.4, "compiled": 0.05}
    record = {
        "conditions": CONDITIONS,
        "rounds": 2,
        "rows": {"toy, codes": 1000},
        "seconds": {
            "toy, codes/10": seconds,
            "toy, codes/1": seconds | {"package": 0.2, "numpyro": 0.25},
        },
    }
    lines = bench("rendering").sampling(record).splitlines()
    assert "| size | rows | 1 step | 10 steps |" in lines
    assert "| toy, codes | 1,000 | 5,000 | 10,000 |" in lines
    assert "| toy, codes | 1,000 | 0.40 | 0.20 |" in lines
    assert "| toy, codes | 1 | 500 | 0.80 | 0.40 | 0.10 | 0.50 |" in lines
    assert "| toy, codes | 10 | 500 | 0.80 | 0.20 | 0.10 | - |" in lines


def test_growth_is_told_and_drawn_with_its_slopes(bench, tmp_path):
    growth = bench("growth")
    times = {"hand": [0.001, 0.004], "package": [0.002, 0.004], "compiled": [0.001, 0.002]}
    chain = {"naive": [0.01, 0.04], "sample": [0.01, 0.02], "bound": [0.01, 0.01]}
    factors = {
        "rows": {"values": [16, 64], "seconds": times},
        "steps": {"values": [1, 4], "seconds": chain},
    }
    record = {"conditions": CONDITIONS, "rounds": 2, "factors": factors}
    lines = bench("rendering").growth(record).splitlines()
    assert "| rows, B | 16 | 1.00 | 2.00 | 1.00 |  |" in lines
    assert "|  | 64 | 4.00 | 1.00 | 0.50 | 1.00, 0.50, 0.50 |" in lines
    assert "| 4 | 40.0 | 0.50 | 10.0 | 0.50, 0.00 |" in lines
    growth.draw(factors, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_slopes_are_exponents(bench):
    slope = bench("growth").slope
    values = [1, 10, 40]
    assert slope(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)
    assert math.isnan(slope([1], [1]))


# -------------------------------------------------------------------------------- the yardsticks


@pytest.mark.parametrize("kind", ["normal", "particles", "codes"])
def test_the_loop_by_hand_has_the_loss_of_the_package(bench, kind):
    hand = bench("hand")
    torch.manual_seed(0)
    process = MaskingProcess(5, 3)
    decoder = MLPDecoder(process, 2, hidden_dim=8, num_layers=2, embedding_dim=4)
    torch.nn.init.normal_(decoder.head.weight)
    particles = 3 if kind == "particles" else 1
    elbo = MaskedDiffusionELBO(process, num_particles=particles)
    if kind == "codes":
        prior = models.Categorical(4, 2)
        loss_of = hand.code_loss(hand.plain(decoder), torch.zeros(4), prior.embedding, 5)
        guide = guides.NoLatent()
    else:
        prior = models.StandardNormal(2)
        encoder = MLPEncoder(process, 2, hidden_dim=8, num_layers=2, embedding_dim=4)
        guide = guides.AmortizedNormal(encoder)
        loss_of = hand.normal_loss(hand.plain(decoder), hand.plain(encoder), 5, particles)
    x_0 = torch.randint(5, (64, 3)).repeat(100, 1)
    with pyro.settings.context(module_local_params=True), torch.no_grad():
        loss = elbo(models.VADD(decoder, prior), guide)
        by_hand = torch.stack([loss_of(x_0) for _ in range(10)])
        package = torch.stack([loss(x_0) / len(x_0) for _ in range(10)])
    stderr = ((by_hand.var() + package.var()) / 10).sqrt()
    assert stderr < 0.02 * package.mean()
    assert (by_hand.mean() - package.mean()).abs() < 4 * stderr


def test_flops_of_a_step_are_six_for_each_weight_and_row(bench):
    gpu = bench("gpu")
    size = gpu.SIZES["toy"]
    process = MaskingProcess(size.vocab_size, size.length)
    pair = [kind(process, 16, **size.sizes) for kind in (MLPDecoder, MLPEncoder)]
    linear = [m for net in pair for m in net.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in linear)
    flops = gpu.step_flops(size, *pair, "cpu")
    assert flops == pytest.approx(6 * weights * size.batch_size, rel=0.02)
    assert gpu.peak_of("NVIDIA H100 PCIe") < gpu.peak_of("NVIDIA H100 80GB HBM3")
    assert gpu.peak_of("a toaster") is None


def test_two_runs_are_compared_row_by_row(bench, tmp_path, capsys):
    rows = torch.randint(2, (60, 4), generator=torch.Generator().manual_seed(0))
    rows[:, 1] = rows[:, 0]
    path = tmp_path / "bits.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in rows.tolist()))
    made = []
    for model, iterations in (("vadd", 60), ("mdm", 20)):
        settings = experiments.preset(
            "table",
            str(path),
            model=model,
            num_iterations=iterations,
            sizes=dict(hidden_dim=16, num_blocks=1, latent_hidden_dim=8),
            num_codes=4,
            batch_size=32,
        )
        experiments.train(settings, tmp_path / model, progress=False)
        made.append(str(tmp_path / model))
    out = tmp_path / "paired.json"
    found = bench("paired").main([*made, "--steps", "1", "3", "--json", str(out)])
    assert json.loads(out.read_text())["bounds"] == found
    runs = [experiments.load(name) for name in made]
    first, second = (
        log_likelihood_bound(
            run.model, run.guide, run.process, run.data.rows("test"), 3, num_draws=1, seed=0
        ).value
        for run in runs
    )
    for name, values in (("first", first), ("second", second), ("difference", first - second)):
        error = float(values.std()) / len(values) ** 0.5
        assert found[1][name] == pytest.approx([float(values.mean()), error])
    assert capsys.readouterr().out.count("±") == 6


def test_the_table_for_gpus_runs_on_a_processor_and_is_refused_without_a_gpu(bench, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    out = tmp_path / "gpu.json"
    tiny = ["--device", "cpu", "--tiny", "--no-compile", "--rounds", "1", "--peak-tflops", "2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*command, *tiny, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(out.read_text())
    transformer = found["sizes"]["text12"]
    share = transformer["flops"] / transformer["seconds"]["hand"] / 2e12
    assert transformer["utilisation"]["hand"] == pytest.approx(share)
    text = bench("rendering").gpu({**found, "conditions": CONDITIONS})
    assert "relative to 2 TFLOP/s" in text
    assert text.count("bfloat16 |") == 1
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert refused.returncode == 2
    assert "no CUDA device is there" in refused.stderr


# ---------------------------------------------------------------------------------- the results


def test_every_model_of_the_results_can_be_made(bench, monkeypatch):
    quality = bench("quality")

    def made(density, x_0, recipes, *further, **options):
        process = density.process()
        for make in recipes.values():
            pair = make(process)
            assert math.isfinite(MaskedDiffusionELBO(process).loss(*pair[:2], x_0[:4]))
        return list(recipes)

    monkeypatch.setattr(quality, "measured", made)
    names = [name for run in quality.EXPERIMENTS.values() for name in run(0)]
    assert names.count("MDM") == 1
    assert names.count("VADD, codes") == len(quality.EXPERIMENTS)


def test_the_normal_prior_of_the_results_is_measured_before_and_after_it_is_refitted(
    bench, monkeypatch
):
    quality = bench("quality")
    monkeypatch.setattr(quality, "train", lambda *_, **__: 1.0)
    density = quality.data.toy("circles", vocab_size=8)
    seen = []

    def scores(model, process):
        seen.append(model.prior)
        return {"js_1": 0.0}

    rows = quality.measured(
        density, density.sample(400, seed=0), {quality.NORMAL: quality.normal}, 0, scores
    )
    assert [row["model"] for row in rows] == ["VADD, N(0, I)", "VADD, N(0, I) refitted"]
    assert seen[1].later is seen[0]
