"""Runs on real data: trained, resumed, loaded, measured, drawn from, reported."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vadd_pyro import (
    data,
    exact_distribution,
    experiments,
    log_likelihood_bound,
    models,
    sample,
)
from vadd_pyro.checkpoints import read_json, write_json
from vadd_pyro.cli import main
from vadd_pyro.experiments import commands, drawing, report, training
from vadd_pyro.experiments.evaluation import time_grids_of
from vadd_pyro.experiments.presets import PRESETS, measures, preset
from vadd_pyro.experiments.settings import Settings
from vadd_pyro.experiments.store import build, load_data
from vadd_pyro.process import make_time_grid

SIZES = {"hidden_dim": 16, "num_blocks": 1, "latent_hidden_dim": 8}
QUICK = {
    "num_codes": 4,
    "num_iterations": 30,
    "num_guide_iterations": 5,
    "batch_size": 16,
    "steps": (1, 2),
    "learning_rate": 1e-2,
}
FEW = {
    "bound_steps": [1, 2],
    "sample_steps": [1, 2],
    "num_rows": None,
    "num_particles": 4,
    "num_samples": 40,
    "seed": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tables of three tied bits with some noise, and a text."""
    place = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split, count in (("train", 300), ("valid", 40), ("test", 60)):
        rows = draw.integers(2, size=(count, 1)) ^ (draw.random((count, 3)) < 0.05)
        text = "\n".join(",".join(map(str, row)) for row in rows.astype(int))
        (place / f"bits.{split}.csv").write_text(text + "\n")
    words = draw.choice(["ab ", "cab ", "abba ", "c "], size=900)
    (place / "words.txt").write_text("".join(words))
    return place


def table(folder, **settings) -> Settings:
    path = folder / "bits"
    return preset("table", path, sizes={**SIZES, "dropout": 0.0}, **{**QUICK, **settings})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bits"
    settings = table(folder, num_iterations=300)
    return experiments.train(settings, out, progress=False), out


# ---------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", [(d, p) for d in PRESETS for p in PRESETS[d]])
def test_every_preset_makes_settings_that_survive_being_written(name, tmp_path):
    path = tmp_path if name[0] in ("table", "hub") else None
    settings = preset(name[0], path, name[1])
    write_json(tmp_path / "s.json", settings.to_dict())
    again = Settings.from_dict(json.loads((tmp_path / "s.json").read_text()))
    assert again.differing(settings.to_dict()) == []
    assert replace(again, seed=1).differing(settings.to_dict()) == ["seed"]
    assert set(measures(name[0])) <= set(experiments.evaluate.__kwdefaults__)


def test_options_replace_single_values_of_a_preset():
    plain = preset("digits")
    found = preset("digits", sizes={"num_blocks": 1}, data_options={"levels": 4}, batch_size=7)
    assert found.sizes == {**plain.sizes, "num_blocks": 1}
    assert (found.data_options, found.batch_size) == ({"levels": 4}, 7)
    other = preset("digits", backbone="unet", sizes={"hidden_dim": 8})
    assert other.sizes == {"hidden_dim": 8}
    assert preset("digits", prior="categorical").guide == "auto"


def test_the_baseline_is_trained_as_it_does_best_for_as_many_updates():
    vadd, mdm = preset("digits"), preset("digits", model="mdm")
    assert (vadd.times, mdm.times) == ("part_targets", "uniform")
    assert mdm.num_iterations == vadd.num_iterations + vadd.num_chain_iterations
    assert mdm.num_chain_iterations == 0
    assert preset("digits", model="mdm", num_iterations=7).num_iterations == 7
    assert preset("text", model="mdm").num_iterations == preset("text").num_iterations
    assert preset("digits", model="mdm", times="few_step").times == "few_step"
    assert preset("table", "t", model="mdm").times == preset("table", "t").times


def test_hub_sets_are_named_where_others_have_a_path(monkeypatch):
    asked = {}
    monkeypatch.setattr(data, "hub", lambda **options: asked.update(options))
    load_data(preset("hub", name="lm1b"))
    assert asked == {"dataset": "lm1b", "tokenizer": "bert-base-uncased", "length": 128}
    load_data(preset("hub", "mine", data_options={"length": 16}))
    assert asked == {"dataset": "mine", "tokenizer": "gpt2", "length": 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "huge"}, "digits has the presets laptop, got 'huge'"),
        ({"bach_size": 3}, "there is no setting bach_size"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"prior": "nothing"}, "unknown priors: 'nothing'"),
        ({"times": "never"}, "unknown times: 'never'"),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, got 'half'"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \(0, 1\), got 1.0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"steps": ()}, "steps must hold at least one"),
        ({"annealing": 2.0}, "annealing must be a share"),
        ({"free_bits": -1.0}, "free_bits must not be negative"),
        ({"least_time": 2.0}, r"least_time must be a time in \[0, 1\], got 2.0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset("digits", **arguments)


def test_settings_that_do_not_fit_the_data_are_refused_before_training(folder, tmp_path):
    with pytest.raises(ValueError, match="backbone 'unet' needs pictures, and bits has none"):
        experiments.train(table(folder, backbone="unet"), tmp_path / "a", progress=False)
    wrong = replace(table(folder), data_options={"rows": 3})
    with pytest.raises(ValueError, match="data_options do not fit table"):
        experiments.train(wrong, tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="path must say which table to read"):
        experiments.train(replace(table(folder), path=None), tmp_path / "c", progress=False)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- training


def test_a_run_is_read_as_it_was_written(trained):
    run, out = trained
    again = experiments.load(out)
    assert again.settings == run.settings
    for mine, theirs in ((run.model, again.model), (run.guide, again.guide)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert set(again.seconds) == {"model"}  # all codes are summed out: no guide to refit


def test_weights_are_a_function_of_the_settings(folder):
    loaded = load_data(table(folder))
    torch.manual_seed(5)
    first = build(table(folder), loaded).model.state_dict()
    state = torch.random.get_rng_state()
    second = build(table(folder), loaded).model.state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[n], second[n]) for n in first)
    other = build(table(folder, seed=1), loaded).model.state_dict()
    assert any(not torch.equal(first[n], other[n]) for n in first)


def test_a_run_whose_latent_is_that_of_the_first_step_alone(folder, tmp_path):
    options: dict = dict(prior="standard_normal", latent_dim=2, least_time=1.0, times="few_step")
    with pytest.raises(ValueError, match=r"least_time = 1\.0 needs guide 'relative'"):
        build(table(folder, guide="mean_field", **options), load_data(table(folder)))
    settings = table(folder, guide="relative", num_iterations=6, num_chain_iterations=4, **options)
    run = experiments.train(settings, tmp_path / "run", progress=False)
    again = experiments.load(tmp_path / "run")
    for found in (run, again):
        assert found.model.least_time == found.guide.least_time == 1.0
    # Codes that are summed out ask nothing of a guide, and a model without latent ignores it.
    options = dict(options, prior="conditional_categorical", num_codes=3)
    assert build(table(folder, **options), load_data(settings)).model.least_time == 1.0
    mdm = experiments.train(
        table(folder, model="mdm", **options), tmp_path / "mdm", progress=False
    )
    assert not hasattr(mdm.model, "least_time")


def refitted(folder, **options) -> Settings:
    return table(
        folder,
        prior="standard_normal",
        guide="relative",
        latent_dim=2,
        least_time=1.0,
        times="few_step",
        refit_prior=True,
        **options,
    )


def test_a_run_whose_prior_is_refitted(folder, tmp_path):
    settings = refitted(folder, num_iterations=200)
    run = experiments.train(settings, tmp_path / "run", progress=False)
    plain = experiments.train(
        replace(settings, refit_prior=False), tmp_path / "plain", progress=False
    )
    # What was trained before is not changed by it.
    for name, value in plain.model.decoder.state_dict().items():
        assert torch.equal(value, run.model.decoder.state_dict()[name]), name
    again = experiments.load(tmp_path / "run")
    for mine, theirs in ((run.model, again.model), (run.guide, again.guide)):
        assert isinstance(theirs.prior, models.MixtureOfNormals)
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    assert list(again.seconds) == ["prior", "model", "guide"]
    for name, value in run.model.prior.state_dict().items():  # the guide's is not trained further
        assert torch.equal(value, run.guide.prior.state_dict()[name]), name
    assert again.title == "bits, VADD, N(0, I) refitted"
    found = read_json(tmp_path / "run" / "history.json")["prior"]
    assert max(found["held_out"].values()) > found["before"]
    told = report.latents(tmp_path / "run")
    assert "its prior is a mixture of" in told
    assert f"({found['before']:.2f} before)" in told
    bounds = [
        float(
            log_likelihood_bound(r.model, r.guide, r.process, r.data.rows("test"), 1, seed=0)[
                0
            ].mean()
        )
        for r in (run, plain)
    ]
    assert bounds[0] > bounds[1] - 0.05


def test_a_refitted_prior_asks_for_the_first_step_alone_and_its_guide(folder, tmp_path):
    with pytest.raises(ValueError, match=r"refit_prior needs least_time = 1.*got least_time = 0"):
        replace(refitted(folder), least_time=0.5)
    with pytest.raises(ValueError, match=r"refit_prior needs.*and guide 'auto'"):
        replace(refitted(folder), guide="auto")
    with pytest.raises(ValueError, match="refit_prior must be true or false, got 1"):
        replace(refitted(folder), refit_prior=1)
    small = replace(load_data(refitted(folder)), valid=load_data(refitted(folder)).valid[:5])
    with pytest.raises(ValueError, match=r"held_out must have at least 20 rows.* got 5"):
        build(refitted(folder), small)
    # A model without latent has no prior, and another prior than the preset's is left as it is.
    mdm = replace(refitted(folder, num_iterations=2), model="mdm", guide="auto")
    assert experiments.train(mdm, tmp_path / "mdm", progress=False).title == "bits, MDM"
    assert preset("digits").refit_prior
    for changed in (
        {"prior": "conditional_categorical"},
        {"prior": "conditional_categorical", "guide": "auto"},
        {"prior": "conditional_normal", "guide": "relative"},
        {"least_time": 0.0},
        {"least_time": 0.0, "guide": "mean_field"},
        {"model": "mdm"},
    ):
        assert not preset("digits", **changed).refit_prior
    assert preset("digits", prior="conditional_normal", refit_prior=True).guide == "relative"
    stored = refitted(folder, num_iterations=2).to_dict()
    del stored["refit_prior"]  # as runs of before have it
    assert replace(refitted(folder, num_iterations=2), refit_prior=False).differing(stored) == []


def test_a_refitted_prior_of_a_users_own_and_torchs_state(folder, tmp_path, monkeypatch):
    (tmp_path / "five.py").write_text(
        "import torch\n"
        "from vadd_pyro import DiagonalNormal\n"
        "def five(batch):\n"
        "    return DiagonalNormal(torch.zeros(5), torch.ones(5))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = replace(refitted(folder, num_iterations=4), prior="five:five")
    run = experiments.train(settings, tmp_path / "run", progress=False)
    state = torch.random.get_rng_state()
    again = experiments.load(tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.model.prior.z_loc.shape[1] == 5
    assert torch.equal(run.model.prior.z_loc, again.model.prior.z_loc)


@pytest.mark.parametrize("fails_in", ["fit_prior", "fit_guide"])
def test_a_killed_run_keeps_the_prior_that_it_had_fitted(folder, tmp_path, monkeypatch, fails_in):
    settings = refitted(folder)
    whole = experiments.train(settings, tmp_path / "whole", progress=False)

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, fails_in, killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.train(settings, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    if fails_in == "fit_guide":
        monkeypatch.setattr(training, "fit_prior", killed)  # it is not fitted again
    resumed = experiments.train(settings, tmp_path / "killed", progress=False)
    for mine, theirs in ((whole.model, resumed.model), (whole.guide, resumed.guide)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("fails_in", ["fit", "fit_guide"])
def test_a_killed_run_goes_on_to_the_same_end(folder, tmp_path, monkeypatch, fails_in):
    settings = table(
        folder, prior="conditional_normal", guide="relative", latent_dim=2, num_chain_iterations=8
    )
    whole = experiments.train(settings, tmp_path / "whole", progress=False)
    right, calls = getattr(training, fails_in), []

    def killed(*args, **options):
        calls.append(1)
        if fails_in == "fit" and len(calls) == 1:
            return right(*args, **options)  # the second stage is killed
        right(*args, **{**options, "checkpoint_every": 3})
        raise KeyboardInterrupt

    monkeypatch.setattr(training, fails_in, killed)
    with pytest.raises(KeyboardInterrupt):
        experiments.train(settings, tmp_path / "killed", progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "run.pt").exists()
    resumed = experiments.train(settings, tmp_path / "killed", progress=False)
    for mine, theirs in ((whole.model, resumed.model), (whole.guide, resumed.guide)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    history = json.loads((tmp_path / "killed" / "history.json").read_text())
    assert list(history) == ["model", "chain", "guide"]


def test_another_run_does_not_enter_a_folder_in_use(folder, trained):
    _, out = trained
    with pytest.raises(ValueError, match=r"other settings: num_codes, seed; name another folder"):
        experiments.train(
            table(folder, num_iterations=300, seed=3, num_codes=5), out, progress=False
        )


def test_data_that_moved_are_found_and_others_refused(trained, folder, tmp_path):
    _, out = trained
    for file in folder.glob("bits*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert experiments.load(out, str(tmp_path / "bits")).data.name == "bits"
    test = tmp_path / "bits.test.csv"
    test.write_text(test.read_text().replace("1,1,1", "0,1,1", 1))
    with pytest.raises(ValueError, match="bits is not the data of the checkpoint: fingerprint"):
        experiments.load(out, str(tmp_path / "bits"))


def test_weight_decay_spares_what_has_one_dimension(folder, tmp_path):
    run = experiments.train(
        table(folder, weight_decay=0.5, model="mdm"), tmp_path / "run", progress=False
    )
    make = training._optimizer(run.settings, 1e-3)
    groups = make(list(run.model.parameters())).param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() <= 1 for p in groups[1]["params"])


# ---------------------------------------------------------------------------------- measures


def test_bounds_stay_below_the_exact_law_and_reach_it_where_they_should(trained):
    run, _ = trained
    result = experiments.evaluate(run, progress=False, **FEW)
    rows = tuple(run.data.rows("test").T)
    for row in result["bounds"]:
        steps = 60 if row["num_steps"] == "one token" else row["num_steps"]
        law = exact_distribution(run.model, run.process, num_steps=steps)
        exact = float(law[rows].log().mean())
        assert row["value"] < exact + 0.03
        assert row["value"] > exact - 0.2
        if steps == 1:  # codes are summed out: no gap
            assert row["value"] == pytest.approx(exact, abs=1e-4)
    assert {row["metric"] for row in result["quality"]} == {"two_sample"}
    assert [row["num_steps"] for row in result["quality"]] == [1, 2]
    assert math.isfinite(result["floor"][0]["value"])
    again = experiments.evaluate(run, progress=False, **FEW)
    assert again["bounds"] == result["bounds"]


def test_vadd_beats_the_baseline_at_one_step_on_tied_bits(folder, trained, tmp_path):
    run, _ = trained
    options = {**FEW, "bound_steps": [1], "sample_steps": [], "one_token": False}
    mdm = experiments.train(
        table(folder, model="mdm", num_iterations=300), tmp_path / "mdm", progress=False
    )
    with_latent = experiments.evaluate(run, progress=False, **options)["bounds"][0]["value"]
    without = experiments.evaluate(mdm, progress=False, **options)["bounds"][0]["value"]
    assert without == pytest.approx(-3 * math.log(2), abs=0.05)
    assert with_latent > without + 0.3


def test_time_grids_are_those_with_the_best_bounds_on_validation_rows(trained):
    run, _ = trained
    equal = experiments.evaluate(run, progress=False, **FEW)
    best = experiments.evaluate(run, progress=False, time_grids="best", **FEW)
    assert best["time_grids"] == "best"
    assert best["bounds"][0] == equal["bounds"][0]  # one step has but one grid
    assert best["grids"]["1"] == [0, 1]
    assert len(best["grids"]["2"]) == 3
    grids = time_grids_of(run, [16, 3, 2])  # each by itself
    assert grids[2].tolist() == best["grids"]["2"]
    assert grids[16].tolist() == [i / 16 for i in range(17)]
    x = run.data.rows("valid")

    def bound(grid):
        # codes are summed out, so all noise is that of the reveal paths
        pair = run.model, run.guide, run.process
        found = log_likelihood_bound(*pair, x, time_grid=grid, num_draws=200, seed=1)
        return float(found.value.mean()), float(found.stderr.norm()) / len(x)

    for count in (2, 3):
        (chosen, own), (plain, others) = map(bound, (grids[count], make_time_grid(count)))
        assert chosen > plain - 3 * (own + others) - 0.01
    drawn = drawing.draw(run, 50, (2,), time_grids="best")[2]
    expected = sample(run.model, run.process, 50, time_grid=grids[2], seed=0)
    assert (drawn == expected).all()
    with pytest.raises(ValueError, match="time_grids must be one of equal, best, got 'good'"):
        experiments.evaluate(run, progress=False, time_grids="good", **FEW)
    with pytest.raises(ValueError, match="are chosen on validation rows"):
        experiments.evaluate(run, progress=False, time_grids="best", split="valid", **FEW)
    with pytest.raises(
        ValueError, match="time_grids must be 'equal' with order='entropy_bounded'"
    ):
        drawing.draw(run, 5, (2,), order="entropy_bounded", time_grids="best")


def result(title, seed, value, stderr=0.1):
    return {
        "title": title,
        "data": "bits",
        "length": 3,
        "settings": {"seed": seed, "data": "table"},
        "train_seconds": 60.0,
        "fingerprint": "crc32 1",
        "bounds": [
            {
                "num_steps": t,
                "value": value - t,
                "stderr": stderr,
                "values": [value - t, value - t + 0.5],
                "split": "test",
                "rows": 2,
                "num_particles": 4,
                "num_paths": 1,
            }
            for t in (1, 2)
        ],
        "quality": [
            {"num_steps": t, "metric": "two_sample", "value": 0.6, "stderr": 0.01} for t in (1, 2)
        ],
        "floor": [{"metric": "two_sample", "value": 0.5, "stderr": 0.01}],
    }


def test_a_report_puts_seeds_together_and_models_side_by_side(tmp_path):
    found = [result("VADD, codes", s, v) for s, v in enumerate((-3.0, -4.0, -5.0))]
    found.append(result("MDM", 0, -9.0))
    text = report.write_report(tmp_path, found)
    lines = text.splitlines()
    (vadd,) = [line for line in lines if line.startswith("| VADD, codes | -")]
    assert vadd == "| VADD, codes | -5.000 ± 0.577 (0.100) | -6.000 ± 0.577 (0.100) |"
    (mdm,) = [line for line in lines if line.startswith("| MDM | -")]
    assert mdm == "| MDM | -10.000 ± 0.100 | -11.000 ± 0.100 |"
    assert lines.index(mdm) < lines.index(vadd)
    other = [{**found[0], "settings": {**found[0]["settings"], "num_codes": 9}}, found[3]]
    best = [{**r, "time_grids": "best"} for r in other]
    told = report.summary([*found, *other[:1], *best])
    assert "MDM, MDM, best time grids, VADD, codes (3 seeds), VADD, codes (2), " in told
    assert ", VADD, codes (2), best time grids." in told
    assert "VADD, codes (3 seeds)" in text
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "test rows, 2 of them, 4 particles, 1 path" in text
    write_json(tmp_path / "a" / report.FILES["equal"], found[0])
    write_json(tmp_path / "a" / "same" / report.FILES["equal"], found[0])
    assert len(report.collect([tmp_path, tmp_path / "a"])) == 1  # a run counts once
    other = {**result("MDM", 0, -9.0), "fingerprint": "crc32 2"}
    write_json(tmp_path / "b" / report.FILES["equal"], other)
    with pytest.raises(ValueError, match=r"different data, bits \(3 positions, crc32 1\), bits"):
        report.collect([tmp_path])
    with pytest.raises(FileNotFoundError, match=r"no evaluation\.json"):
        report.collect([tmp_path / "nothing"])


# ---------------------------------------------------------------------------- samples, infilling


def test_areas_are_open_where_they_say():
    digits = data.digits()
    rows = digits.rows("test", 2)
    for area, share in (("lower", 0.5), ("upper", 0.5), ("left", 0.5), ("middle", 0.25)):
        given = drawing.partly_given(digits, rows, area)
        open_ = given == digits.vocab_size
        assert open_.float().mean() == share
        assert (given[~open_] == rows[~open_]).all()
    lower = drawing.partly_given(digits, rows, "lower").view(2, 8, 8)
    assert (lower[:, 4:] == 17).all()
    assert (lower[:, :4] < 17).all()
    with pytest.raises(ValueError, match="area must be one of lower, upper"):
        drawing.partly_given(digits, rows, "edge")


def test_rows_that_are_written_out_are_read(folder):
    bits = data.table(folder / "bits")
    assert drawing.parse_row(bits, "0, ?,1").tolist() == [[0, 2, 1]]
    for text, message in (
        ("0,1", "row has 2 values: expected 3"),
        ("0,5,?", r"value 2 of row is '5': expected 0\.\.1 or '\?'"),
        ("a,1,1", "value 1 of row is 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            drawing.parse_row(bits, text)
    words = data.characters(folder / "words.txt", length=6)
    (row,) = drawing.parse_row(words, "c_b")
    assert words.decode(row.unsqueeze(0)) == ["c_b___"]
    with pytest.raises(ValueError, match="row has 7 characters: expected at most 6"):
        drawing.parse_row(words, "abbaabb")


@pytest.mark.parametrize("weighted", [False, True])
def test_completions_have_the_law_they_are_to_have(trained, weighted):
    run, _ = trained
    given = torch.tensor([[1, 2, 2]])
    x, size = drawing.complete(run, given, 4000, 2, weighted=weighted, num_particles=8000)
    assert x.shape == (1, 4000, 3)
    assert (x[..., 0] == 1).all()
    assert (size is None) != weighted
    if weighted:
        law = exact_distribution(run.model, run.process, num_steps=2)[1]
        law = law / law.sum()
    else:
        law = exact_distribution(run.model, run.process, num_steps=2, x_start=given[0])[1]
    drawn = torch.bincount(x[0, :, 1] * 2 + x[0, :, 2], minlength=4) / 4000
    error = (law.flatten() * (1 - law.flatten()) / 2000).sqrt()
    assert ((drawn - law.flatten()).abs() < 5 * error + 1e-3).all()


# ------------------------------------------------------------------------------- command line

SMALL = [
    *("--set", "num_guide_iterations=4", "--num-iterations", "20", "--batch-size", "16"),
    *("--set", "num_chain_iterations=3"),
    *("--no-progress",),
]
NARROW = ["--size", "hidden_dim=16", "--size", "num_blocks=1", "--size", "latent_hidden_dim=8"]


def test_tables_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "bits"
    command = ["train", "table", str(folder / "bits.train.csv"), "--model", "mdm,vadd"]
    command += ["--seeds", "2", "--evaluate", "--num-samples", "30", "--bound-steps", "1,2"]
    command += ["--sample-steps", "1,2", "--num-codes", "4", "--out", str(out), *SMALL, *NARROW]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "VADD, codes given x_t (2 seeds)" in printed.out
    assert (out / "mdm" / "seed1" / "run.pt").exists()
    assert (out / "quality.png").exists()
    before = (out / "vadd" / "seed0" / "evaluation.json").stat().st_mtime_ns
    assert main(command) == 0  # nothing is done twice
    assert (out / "vadd" / "seed0" / "evaluation.json").stat().st_mtime_ns == before
    capsys.readouterr()
    options = ["--bound-steps", "1,2", "--sample-steps", "2", "--num-samples", "30"]
    assert main(["evaluate", str(out), "--time-grids", "equal,best", *options, SMALL[-1]]) == 0
    printed = capsys.readouterr().out
    assert "MDM (2 seeds), MDM, best time grids (2 seeds), VADD, codes" in printed
    best = read_json(out / "vadd" / "seed0" / "evaluation_best.json")
    known = read_json(out / "vadd" / "seed0" / "evaluation.json")
    assert {str(row["num_steps"]) for row in best["bounds"]} == {"1", "2", "one token"}
    own = {row["num_steps"]: row for row in best["bounds"]}
    assert own["one token"] == known["bounds"][-1]  # as it was
    assert own[2]["time_grid"] in (best["grids"]["2"], None)
    with pytest.raises(
        ValueError, match=r"time_grids must be some of equal, best, got \['good'\]"
    ):
        commands.run_evaluate([out], None, {**FEW, "time_grids": ["good"]})
    assert (out / "vadd" / "seed0" / "evaluation.json").stat().st_mtime_ns == before
    assert len(report.collect([out])) == 8
    with pytest.raises(SystemExit):
        main(["evaluate", str(out), "--time-grids", "good"])
    assert "expected equal or best, or both, got 'good'" in capsys.readouterr().err
    assert main(["sample", str(out / "vadd" / "seed0"), "--num-steps", "1,2"]) == 0
    rows = (out / "vadd" / "seed0" / "samples_2.csv").read_text().splitlines()
    assert len(rows) == 16
    assert all(set(row.split(",")) <= {"0", "1"} for row in rows)
    assert main(["sample", str(out / "vadd")]) == 1
    assert "holds 2 runs: name one of" in capsys.readouterr().err
    run = str(out / "vadd" / "seed0")
    assert main(["infill", run, "--row", "1,?,?", "--weighted", "--num-steps", "2"]) == 0
    assert "effective sample size" in capsys.readouterr().out
    assert (out / "vadd" / "seed0" / "infill.csv").read_text().startswith("1,")


def test_a_run_on_real_data_is_inspected_on_its_test_rows(tmp_path, capsys):
    draw = np.random.default_rng(1)
    for split, count in (("train", 200), ("valid", 20), ("test", 150)):
        rows = draw.integers(2, size=(count, 1)).repeat(3, 1)
        text = "\n".join(",".join(map(str, row)) for row in rows)
        (tmp_path / f"tied.{split}.csv").write_text(text + "\n")
    out = tmp_path / "run"
    command = ["train", "table", str(tmp_path / "tied"), "--num-codes", "3", *SMALL, *NARROW]
    assert main([*command, "--out", str(out)]) == 0
    options = ["--num-draws", "50", "--num-reference-rows", "3", "--no-progress"]
    assert main(["inspect", str(out), *options]) == 0
    assert "tied, VADD, codes given x_t:" in capsys.readouterr().out
    (tmp_path / "moved").mkdir()
    for file in tmp_path.glob("tied.*.csv"):
        file.rename(tmp_path / "moved" / file.name)
    assert main(["inspect", str(out), *options]) == 1
    assert "no table" in capsys.readouterr().err
    assert main(["inspect", str(out), *options, "--path", str(tmp_path / "moved/tied")]) == 0
    assert (out / "inspection" / "report.html").exists()


def test_digits_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "digits"
    command = ["train", "digits", "--prior", "standard_normal", "--latent-dim", "2", *SMALL]
    command += ["--out", str(out / "below"), "--set", "steps=(1, 2)", *NARROW[:4]]
    assert main(command) == 0
    assert main(["sample", str(out), "--num-samples", "3", "--num-steps", "1,2"]) == 0
    assert main(["infill", str(out), "--num-rows", "2", "--num-completions", "3"]) == 0
    assert (out / "below" / "samples.png").stat().st_size > 5_000
    assert (out / "below" / "infill.png").stat().st_size > 5_000
    measure = ["--bound-steps", "1", "--sample-steps", "1", "--num-rows", "20"]
    measure += ["--num-particles", "2", "--num-samples", "50", "--no-progress"]
    assert main(["evaluate", str(out), *measure]) == 0
    assert "Fréchet distance" in (out / "summary.md").read_text()
    capsys.readouterr()
    assert main(["train", "digits", "elsewhere", "--out", str(tmp_path / "b"), *SMALL]) == 1
    assert "digits come with scikit-learn" in capsys.readouterr().err


def test_text_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "words"
    command = ["train", "text", str(folder / "words.txt"), "--data-option", "length=8", *SMALL]
    command += ["--size", "hidden_dim=16", "--size", "num_layers=1", "--size", "num_heads=2"]
    command += ["--latent-dim", "2", "--set", "steps=(1, 2)", "--out", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    assert main(["sample", str(out), "--num-samples", "3", "--num-steps", "2"]) == 0
    assert "2 steps:" in capsys.readouterr().out
    assert main(["infill", str(out), "--row", "ab _ab_c", "--num-completions", "3"]) == 0
    printed = capsys.readouterr().out
    assert "given 'ab _ab_c'" in printed
    measure = ["--bound-steps", "1,2", "--sample-steps", "1,2", "--num-rows", "10"]
    measure += ["--num-particles", "2", "--num-samples", "50", "--no-progress"]
    assert main(["evaluate", str(out), *measure]) == 0
    text = (out / "summary.md").read_text()
    assert "2-gram JS distance" in text
    assert "bits per token under an n-gram model" in text


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["train", "table"], 1, "path must say which table"),
        (["train", "digits", "--preset", "big"], 2, "digits has the presets laptop"),
        (["train", "digits", "--model", "gan"], 2, "expected vadd or mdm"),
        (["train", "digits", "--size", "wide"], 2, "expected NAME=VALUE, got 'wide'"),
        (["train", "digits", "--size", "wide=3"], 1, "have no wide"),
        (["train", "digits", "--set", "colour=3"], 2, "there is no setting colour"),
        (["train", "digits", "--set", "seed=3"], 2, "--set seed cannot be given: there is --seed"),
        (["train", "digits", "--bound-steps", "none"], 2, "--bound-steps needs --evaluate"),
        (["train", "digits", "--no-one-token"], 2, "--no-one-token needs --evaluate"),
        (["sample", "nothing"], 1, "nothing"),
        (["evaluate", "nothing"], 1, "nothing"),
    ],
)
def test_bad_commands_say_what_is_wrong(command, status, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        found = main(command)
    except SystemExit as stop:
        found = stop.code
    assert found == status
    assert message in capsys.readouterr().err


def test_a_run_that_is_none_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no run\.pt"):
        commands.run_evaluate([tmp_path], None, dict(FEW))


# ----------------------------------------------------------------------------------- latents


def test_a_run_says_what_its_latents_carry(folder, tmp_path, capsys):
    where = ["table", str(folder / "bits"), "--num-iterations", "520", "--no-progress"]
    sizes = ["--size", "hidden_dim=16", "--size", "num_blocks=1", "--set", "num_codes=4"]
    few = ["--set", "num_guide_iterations=0", "--set", "batch_size=16", "--set", "steps=1,2"]
    assert main(["train", *where, *sizes, *few, "--out", str(tmp_path / "vadd")]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    told = read_json(tmp_path / "vadd" / "history.json")["model"]["mutual_information"][-1]
    assert line == report.latents(tmp_path / "vadd")
    assert f"{told:.2f} nats of a row where all is masked" in line
    assert main(["train", *where, *sizes[:4], "--model", "mdm", "--out", str(tmp_path / "m")]) == 0
    assert "latents" not in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("information", "parts", "said"),
    [
        (
            0.7,
            [0.4, 0.5],
            "its latents tell at least 0.70 nats of a row where all is masked, 2 in",
        ),
        (0.01, [0.0, 0.02], "its latents have collapsed: they tell 0.01 nats"),
        (None, [0.4, 0.4], "its latents tell at least 0.80 nats"),
        (None, [0.01, 0.01], "its latents have collapsed"),
        (0.0, [], None),
    ],
)
def test_collapsed_latents_are_called_so(tmp_path, information, parts, said):
    before = {"monitor_iteration": [500], "kl_per_dimension": [[9.0]], "active_units": [9]}
    last = {"monitor_iteration": [5, 9], "kl_per_dimension": [[9.0], parts]}
    stages = {
        "model": {**before, "mutual_information": [9.0]},
        "chain": {**last, "active_units": [9, 2], "mutual_information": [9.0, information]},
        "guide": {**before, "monitor_iteration": []},
    }
    write_json(tmp_path / "history.json", stages)
    line = report.latents(tmp_path)
    assert line is None if said is None else line.startswith(said)
