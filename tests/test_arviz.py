"""ArviZ data: what it holds of a pair of programs, and its files, under both major versions."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import arviz_checks
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import codes_of, small_pair

from vadd_pyro import MaskedBatch, MaskedDiffusionELBO, MaskingProcess, zoo
from vadd_pyro.inspection import conversion, posterior_draws, prior_draws
from vadd_pyro.inspection.to_arviz import pareto_k, to_arviz
from vadd_pyro.monitor import latent_statistics

ROOT = Path(__file__).parents[1]
PROCESS = MaskingProcess(3, 4)

pytestmark = pytest.mark.filterwarnings("ignore")  # ArviZ's and matplotlib's own


def masked_rows(number: int = 3) -> MaskedBatch:
    x_0 = torch.randint(3, (number, 4), generator=torch.Generator().manual_seed(5))
    return PROCESS.corrupt(x_0, 0.8, at_least_one=True)


def names(data: Any) -> set[str]:
    """The groups, under either version."""
    return set(data.children) if hasattr(data, "children") else set(data.groups())


# ------------------------------------------------------------------ the part without torch


@pytest.mark.parametrize("check", arviz_checks.CHECKS)
def test_conversion(check, tmp_path):
    arviz_checks.CHECKS[check](conversion, tmp_path)


def arviz1_python() -> str | None:
    """A Python with ArviZ 1.x: that of ARVIZ1_PYTHON, or of the Makefile's environment."""
    ready = ROOT / ".venv-arviz1" / ".ready"
    here = str(ready.parent / "bin" / "python") if ready.exists() else None
    return os.environ.get("ARVIZ1_PYTHON", here)


@pytest.mark.skipif(
    arviz1_python() is None,
    reason="no Python with ArviZ 1.x: run make .venv-arviz1/.ready (it needs Python 3.12 or "
    "later), or set ARVIZ1_PYTHON",
)
def test_conversion_under_arviz_1_and_both_versions_read_each_other(tmp_path):
    data = conversion.build(arviz_checks.arrays(), arviz_checks.DIMS)
    conversion.save_netcdf(data, tmp_path / "theirs.nc")
    rng = np.random.RandomState(0)
    # Lengths of which a fifth, or thrice the root, is not whole; ties; zero weights.
    weights = rng.normal(size=(227, 40)) * np.linspace(0.1, 4, 40)
    weights[:, 30:] = weights[:, 30:].round(1)
    weights[:150, 20:25] = -np.inf
    np.save(tmp_path / "weights.npy", weights)
    script = str(ROOT / "tests" / "arviz_checks.py")
    result = subprocess.run(
        [str(arviz1_python()), "-W", "ignore", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert int(report["arviz"].split(".")[0]) >= 1
    assert not report["torch"]
    failed = {name: text for name, text in report["checks"].items() if text != "passed"}
    assert not failed, "\n".join(failed.values())
    assert set(report["checks"]) == {*arviz_checks.CHECKS, "exchange"}
    arviz_checks.check_equal(conversion.load_netcdf(tmp_path / "ours.nc"), arviz_checks.arrays())
    theirs = np.load(tmp_path / "k.npy")
    np.testing.assert_allclose(theirs, conversion.psis_k(weights), rtol=1e-9)
    assert np.isfinite(theirs).sum() > 30


# -------------------------------------------------------------------- what is held of pairs

PAIRS = [(prior, "auto") for prior in zoo.PRIORS] + [
    ("standard_normal", "flow"),
    ("hierarchical", "bottom_up"),
    ("categorical", "score"),
    ("categorical", "enumerate"),
    ("product", "score"),
    ("product_one_hot", "straight_through"),
]


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_every_pair_of_the_zoo_is_held_as_drawn(prior, guide):
    pair = zoo.build(prior, guide, PROCESS, hidden_dim=16, num_codes=codes_of(prior))
    batch = masked_rows(2)
    data = to_arviz(pair.model, pair.guide, batch, 32, log_likelihood=True, seed=1)
    draws = posterior_draws(pair.model, pair.guide, batch, 32, seed=1)
    latents = {"posterior", "prior"} if prior != "none" else set()
    assert names(data) == latents | {
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "constant_data",
    }
    for name, value in draws.sites.items():
        held = data["posterior"][name]
        np.testing.assert_array_equal(held.values[0], value.numpy())
        assert held.dims[:3] == ("chain", "draw", "row")
        assert data["prior"][name].dims == held.dims
        assert data["prior"][name].dtype == held.dtype
    stats = data["sample_stats"]
    np.testing.assert_array_equal(stats["log_weight"].values[0], draws.log_weights.numpy())
    np.testing.assert_array_equal(
        data["log_likelihood"]["x_0"].values[0], draws.log_likelihood.numpy()
    )
    k = pareto_k(draws.log_weights)
    np.testing.assert_array_equal(stats["pareto_k"].values[0], k.expand(32, -1).numpy())
    if draws.exact:
        assert (k == 0).all()


@pytest.mark.parametrize("prior", ["none", "hierarchical", "categorical", "product_one_hot"])
def test_a_file_gives_back_what_a_pair_gave(prior, tmp_path):
    pair = zoo.build(prior, "auto", PROCESS, hidden_dim=16, num_codes=codes_of(prior))
    data = to_arviz(pair.model, pair.guide, masked_rows(), 5, log_likelihood=True)
    conversion.save_netcdf(data, tmp_path / "pair.nc")
    loaded = conversion.load_netcdf(tmp_path / "pair.nc")
    assert names(loaded) == names(data)
    for group in names(data):
        for name, value in data[group].data_vars.items():
            assert loaded[group][name].identical(value)
            assert loaded[group][name].dtype == value.dtype


def test_dimensions_are_named_after_what_the_latents_are():
    def dims(prior: str, guide: str = "auto") -> dict[str, tuple[str, ...]]:
        pair = zoo.build(prior, guide, PROCESS, hidden_dim=16, num_codes=codes_of(prior))
        data = to_arviz(pair.model, pair.guide, masked_rows(), 3, prior=False, predictive=False)
        return {name: v.dims[2:] for name, v in data["posterior"].data_vars.items()}

    assert dims("standard_normal") == {"z": ("row", "latent")}
    assert dims("categorical") == {"z": ("row",)}
    assert dims("product") == {"z": ("row", "latent")}
    assert dims("product_one_hot") == {"z": ("row", "latent_factor", "latent_code")}
    assert dims("hierarchical") == {
        "z_1": ("row", "latent_z_1"),
        "z_2": ("row", "latent_z_2"),
    }


def own_model(batch: MaskedBatch) -> None:
    """A hand-written program with awkward names, an inner plate and a matrix."""
    with pyro.plate("data", len(batch.x_t), dim=-1):
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
        latent = pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        matrix = pyro.sample("a/matrix", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        pyro.sample("a.matrix", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 2, dim=-2):
            inner = pyro.sample("t", dist.Normal(0.0, 1.0))
        logits = matrix + row[..., None, None] + latent.sum(-1)[..., None, None]
        logits = logits * (1 + inner.sum(-2, keepdim=True)[..., None, None])
        x_0 = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
        pyro.sample("x_0", x_0, obs=batch.x_0)


def own_guide(batch: MaskedBatch) -> None:
    with pyro.plate("data", len(batch.x_t), dim=-1):
        pyro.sample("row", dist.Normal(0.0, 1.0))
        pyro.sample("latent", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("a/matrix", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        pyro.sample("a.matrix", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 2, dim=-2):
            pyro.sample("t", dist.Normal(0.0, 1.0))


def test_a_hand_written_pair_with_names_of_dimensions_is_held(tmp_path):
    import arviz

    batch = masked_rows()
    data = to_arviz(own_model, own_guide, batch, 40, seed=2, max_plate_nesting=2)
    draws = posterior_draws(own_model, own_guide, batch, 40, seed=2, max_plate_nesting=2)
    conversion.save_netcdf(data, tmp_path / "own.nc")
    loaded = conversion.load_netcdf(tmp_path / "own.nc")
    held = loaded["posterior"]
    expected = {
        "row": ("row_", ()),
        "latent": ("latent", ("latent_latent",)),
        "a/matrix": ("a.matrix", ("latent_a.matrix_0", "latent_a.matrix_1")),
        "a.matrix": ("a.matrix_", ()),
        "t": ("t", ("latent_t",)),
    }
    assert set(held.data_vars) == {variable for variable, _ in expected.values()}
    for site, (variable, dims) in expected.items():
        assert held[variable].dims == ("chain", "draw", "row", *dims)
        np.testing.assert_array_equal(held[variable].values[0], draws.sites[site].numpy())
    assert len(arviz.summary(loaded)) == 3 * (1 + 2 + 12 + 1 + 2)


def test_data_attributes_and_coordinates_are_those_of_the_batch():
    import vadd_pyro

    pair = small_pair("standard_normal", PROCESS)
    batch = masked_rows()
    data = to_arviz(*pair, batch, 10, seed=3)
    for name, value in (("x_t", batch.x_t), ("mask", batch.masked), ("target", batch.target)):
        np.testing.assert_array_equal(data["constant_data"][name].values, value.numpy())
        assert data["constant_data"][name].dims == ("row", "position")
    assert data["constant_data"]["mask"].dtype == bool
    np.testing.assert_array_equal(data["constant_data"]["t"].values, batch.t.numpy())
    np.testing.assert_array_equal(data["observed_data"]["x_0"].values, batch.x_0.numpy())
    for dim, size in (("chain", 1), ("draw", 10), ("row", 3), ("position", 4)):
        along = data["posterior_predictive"].coords[dim].values
        np.testing.assert_array_equal(along, np.arange(size))
    np.testing.assert_array_equal(data["posterior"].coords["latent"].values, [0, 1])
    assert data.attrs["package"] == "vadd_pyro"
    assert data.attrs["version"] == vadd_pyro.__version__
    assert (data.attrs["num_draws"], data.attrs["seed"]) == (10, 3)
    assert np.isnan(data["sample_stats"]["pareto_k"].values).all()  # of ten draws


def test_one_row_one_position_and_one_latent_stay_dimensions():
    process = MaskingProcess(3, 1)
    pair = small_pair("standard_normal", process, latent_dim=1)
    data = to_arviz(*pair, process.corrupt(torch.tensor([[2]]), 1.0), 1)
    assert data["posterior"]["z"].shape == (1, 1, 1, 1)
    assert data["posterior_predictive"]["x_0"].shape == (1, 1, 1, 1)
    assert data["observed_data"]["x_0"].shape == (1, 1)


def test_completions_keep_visible_tokens_and_take_steps_with_a_process():
    pair = small_pair("standard_normal", PROCESS)
    batch = masked_rows()
    for options in ({}, {"process": PROCESS, "num_steps": 3}):
        data = to_arviz(*pair, batch, 20, **options)
        x_0 = data["posterior_predictive"]["x_0"].values[0]
        visible = ~batch.masked.numpy()
        np.testing.assert_array_equal(
            x_0[:, visible], np.broadcast_to(batch.x_t.numpy()[visible], (20, visible.sum()))
        )
        assert set(np.unique(x_0)) == {0, 1, 2}
    with pytest.raises(ValueError, match="num_steps is 3"):
        to_arviz(*pair, batch, 20, num_steps=3)
    bare = to_arviz(*pair, batch, 20, prior=False, predictive=False)
    assert not names(bare) & {"prior", "posterior_predictive", "log_likelihood"}


def test_completions_are_not_told_the_data_and_are_made_in_the_given_steps():
    process = MaskingProcess(2, 2)

    def model(batch: MaskedBatch) -> None:
        """The sign of z, where nothing is seen; afterwards the other of the visible token."""
        with pyro.plate("data", len(batch.x_t), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            first = torch.stack([-z, z], -1).sign().unsqueeze(-2).expand(*z.shape, 2, 2)
            seen = torch.where(batch.masked, 0, 1 - 2 * batch.x_t).sum(-1)[..., None]
            other = torch.stack([-seen, seen], -1).expand_as(first)
            logits = 50.0 * torch.where(batch.masked.all(-1)[..., None, None], first, other)
            x_0 = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
            pyro.sample("x_0", x_0, obs=batch.x_0)

    def guide(batch: MaskedBatch) -> None:
        with pyro.plate("data", len(batch.x_t), dim=-1):
            pyro.sample("z", dist.Normal(9.0, 1.0))

    batch = process.corrupt(torch.tensor([[1, 1]]), 1.0)
    for num_steps in (1, 30):
        data = to_arviz(
            model, guide, batch, 400, process=process, num_steps=num_steps, prior=False, seed=0
        )
        x_0 = data["posterior_predictive"]["x_0"].values[0, :, 0]
        assert (data["posterior"]["z"].values > 0).all()
        assert abs(x_0.mean() - 0.5) < 4 * 0.5 / math.sqrt(400)
        together = (x_0[:, 0] == x_0[:, 1]).mean()  # both in one of T steps: 1 / T
        share = 1 / num_steps
        assert abs(together - share) <= 4 * math.sqrt(share * (1 - share) / 400)


def test_a_seed_repeats_the_call_and_prior_and_guide_have_their_own_noise():
    pair = small_pair("standard_normal", PROCESS)
    batch = masked_rows()
    state = torch.get_rng_state()
    first, second = (to_arviz(*pair, batch, 200, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = to_arviz(*pair, batch, 200, seed=8)
    for group in names(first):
        for name, value in first[group].data_vars.items():
            np.testing.assert_array_equal(value.values, second[group][name].values)
    for group, name in (("posterior", "z"), ("prior", "z"), ("posterior_predictive", "x_0")):
        assert (first[group][name].values != other[group][name].values).any()
    z, prior = (first[group]["z"].values[0, :, 0, 0] for group in ("posterior", "prior"))
    assert abs(np.corrcoef(z, prior)[0, 1]) < 4 / math.sqrt(200)
    expected = prior_draws(pair[0], batch, 200, seed=7).sites["z"].numpy()
    assert (first["prior"]["z"].values[0] != expected).any()


# ----------------------------------------------------------------------- known answers


def test_kl_of_a_normal_guide_has_its_closed_form_as_mean():
    model, guide = small_pair("standard_normal", PROCESS)
    batch = masked_rows(4)
    data = to_arviz(model, guide, batch, 4000, prior=False, predictive=False, seed=0)
    law = pyro.poutine.trace(guide).get_trace(batch).nodes["z"]["fn"]
    exact = torch.distributions.kl_divergence(
        torch.distributions.Normal(law.mean, law.variance.sqrt()),
        torch.distributions.Normal(0.0, 1.0),
    ).sum(-1)
    found = data["sample_stats"]["kl"].values[0]
    error = found.std(0) / math.sqrt(4000)
    assert (abs(found.mean(0) - exact.detach().numpy()) < 4.5 * error).all()
    assert (exact > 10 * torch.tensor(error)).any()  # zero would be noticed


def test_summed_out_codes_have_exact_weights_their_kl_and_a_harmonic_mean():
    import arviz

    model, guide = small_pair("categorical", PROCESS)
    batch = masked_rows(4)
    data = to_arviz(
        model, guide, batch, 4000, log_likelihood=True, prior=False, predictive=False, seed=0
    )
    stats = data["sample_stats"]
    log_p = stats["log_weight"].values[0]
    assert (log_p == log_p[0]).all()
    assert (stats["pareto_k"].values == 0).all()
    found = stats["kl"].values[0].mean(1)  # over rows: what latent_statistics gives exactly
    exact = latent_statistics(model, guide, batch, MaskedDiffusionELBO(PROCESS)).kl
    assert abs(found.mean() - exact) < 4.5 * found.std() / math.sqrt(4000)
    assert exact > 10 * found.std() / math.sqrt(4000)
    # With a latent of its own, leaving a row out leaves its prior: elpd is log p(x_S | x_t), as a
    # harmonic mean over draws from the exact posterior.
    inverse = np.exp(-data["log_likelihood"]["x_0"].values[0].astype(float))
    error = inverse.std(0) / inverse.mean(0) / math.sqrt(4000)
    loo = arviz.loo(data, pointwise=True)
    elpd = np.ravel(loo.loo_i if hasattr(loo, "loo_i") else loo.elpd_i)
    assert (abs(elpd - log_p[0]) < 4.5 * error + 0.01).all()  # the tail is smoothed


def test_a_guide_made_too_narrow_is_found_out_and_a_right_one_trusted():
    # x does not depend on z, so that the posterior is the prior N(0, I) in two dimensions.
    def model(batch: MaskedBatch) -> None:
        with pyro.plate("data", len(batch.x_t), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            x_0 = dist.Categorical(logits=torch.zeros(4, 3)).mask(batch.target).to_event(1)
            pyro.sample("x_0", x_0, obs=batch.x_0)

    def guide(batch: MaskedBatch, scale: float) -> None:
        with pyro.plate("data", len(batch.x_t), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))

    batch = masked_rows(20)
    for scale in (1.0, 0.9, 0.4):
        data = to_arviz(
            lambda batch: model(batch),
            lambda batch, scale=scale: guide(batch, scale),
            batch,
            2000,
            prior=False,
            predictive=False,
            seed=0,
        )
        k = data["sample_stats"]["pareto_k"].values[0, 0]
        if scale == 1:
            assert (k == 0).all()
        elif scale == 0.9:
            assert (k < 0.7).all()
            assert k.mean() < 0.5
        else:  # the weights are Pareto with k = 1 - 0.4 ** 2
            assert k.mean() > 0.7
            assert (k > 0.5).all()


def test_pareto_k_of_tensors_keeps_type_and_refuses_too_few_draws():
    log_weights = torch.randn(100, 3, requires_grad=True)
    k = pareto_k(log_weights)
    assert k.dtype == torch.float32
    np.testing.assert_allclose(k, conversion.psis_k(log_weights.detach().numpy()), rtol=1e-6)
    assert pareto_k(log_weights.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="at least 30"):
        pareto_k(log_weights[:20])


def test_importing_does_not_import_arviz():
    code = (
        "import sys, arviz_checks; arviz_checks.load(); "
        "sys.exit(bool({'arviz', 'xarray', 'torch'} & set(sys.modules)))"
    )
    folder = ROOT / "tests"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=120).returncode == 0
    text = (ROOT / "vadd_pyro" / "inspection" / "to_arviz.py").read_text()
    assert not re.search(r"^\s*(import|from) (arviz|xarray)", text, re.M)


def test_arviz_is_imported_without_its_warning_of_the_day(monkeypatch, tmp_path):
    platformdirs = pytest.importorskip("platformdirs", reason="ArviZ 1.x has no such warning")
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args: str(tmp_path))
    saved = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == "arviz"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            conversion.build({"posterior": {"a": np.zeros((1, 3))}}, {})
    finally:
        sys.modules.update(saved)
