"""Checks of vadd_pyro/inspection/conversion.py that need neither torch nor pytest.

``test_arviz.py`` runs them under the ArviZ at hand, and under the other major version in another
environment, where this file is a script: ``python arviz_checks.py FOLDER``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).parents[1] / "vadd_pyro" / "inspection" / "conversion.py"
TOKENS = ["row", "position"]
DIMS = {
    "posterior": {"z": ["row", "latent"], "code": ["row"]},
    "prior": {"z": ["row", "latent"], "code": ["row"]},
    "posterior_predictive": {"x_0": TOKENS},
    "log_likelihood": {"x_0": ["row"]},
    "sample_stats": {"log_weight": ["row"], "pareto_k": ["row"]},
    "observed_data": {"x_0": TOKENS},
    "constant_data": {"mask": TOKENS, "t": ["row"]},
}


def load() -> Any:
    """The module on its own, as an environment without torch sees it."""
    spec = importlib.util.spec_from_file_location("conversion", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(rows: int = 3, latent: int = 2, length: int = 5, draws: int = 100) -> Any:
    """Groups of random arrays of several types."""
    rng = np.random.RandomState(0)
    shape = (1, draws, rows)

    def latents() -> dict[str, np.ndarray]:
        z = rng.normal(size=(*shape, latent)).astype(np.float32)
        return {"z": z, "code": rng.randint(4, size=shape)}

    return {
        "posterior": latents(),
        "prior": latents(),
        "posterior_predictive": {"x_0": rng.randint(3, size=(*shape, length))},
        "log_likelihood": {"x_0": rng.normal(size=shape)},
        "sample_stats": {
            "log_weight": rng.normal(size=shape),
            "pareto_k": np.broadcast_to(rng.uniform(size=rows), shape),
        },
        "observed_data": {"x_0": rng.randint(3, size=(rows, length))},
        "constant_data": {
            "mask": rng.uniform(size=(rows, length)) < 0.5,
            "t": rng.uniform(size=rows),
        },
    }


def check_equal(data: Any, groups: Any, dims: Any = DIMS, coords: Any = None) -> None:
    """That data holds these arrays, with their types, dimensions and coordinates."""
    for group, variables in groups.items():
        held = data[group]
        assert set(held.data_vars) == set(variables)
        for name, value in variables.items():
            found = held[name]
            before = () if group.endswith("_data") else ("chain", "draw")
            assert found.dims == (*before, *dims[group][name])
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found.values, value)
            for dim, size in zip(found.dims, value.shape, strict=True):
                expected = (coords or {}).get(dim, np.arange(size))
                np.testing.assert_array_equal(found.coords[dim].values, expected)


def raised(kind: type[Exception], call: Callable[[], Any], *parts: str) -> None:
    """That a call raises this kind, with these words in its message."""
    message = None
    try:
        call()
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__} with {parts}"
    for part in parts:
        assert part in message, f"{part!r} is not in {message}"


# ------------------------------------------------------------------------- data and files


def check_a_file_gives_back_equal_arrays_dimensions_types_and_attributes(
    conversion: Any, folder: Path
) -> None:
    groups = arrays()
    coords = {"position": [3, 5, 7, 11, 13]}
    attrs = {"package": "p", "num_draws": 100, "seed": None}
    data = conversion.build(groups, DIMS, coords, attrs)
    check_equal(data, groups, DIMS, coords)
    conversion.save_netcdf(data, folder / "new" / "all.nc")
    loaded = conversion.load_netcdf(folder / "new" / "all.nc")
    assert type(loaded) is type(data)
    for held in (data, loaded):
        check_equal(held, groups, DIMS, coords)
        assert dict(held.attrs) == {"package": "p", "num_draws": 100}
    assert type(loaded.attrs["num_draws"]) is int
    conversion.save_netcdf(loaded, folder / "again.nc")
    check_equal(conversion.load_netcdf(folder / "again.nc"), groups, DIMS, coords)


def check_the_container_is_that_of_the_version(conversion: Any, folder: Path) -> None:
    import arviz

    data = conversion.build(arrays(), DIMS)
    kind = "InferenceData" if arviz.__version__.startswith("0.") else "DataTree"
    assert type(data).__name__ == kind


def check_dimensions_of_size_one_are_kept(conversion: Any, folder: Path) -> None:
    groups = arrays(rows=1, latent=1, length=1, draws=1)
    data = conversion.build(groups, DIMS)
    check_equal(data, groups)
    conversion.save_netcdf(data, folder / "one.nc")
    check_equal(conversion.load_netcdf(folder / "one.nc"), groups)


def check_a_loaded_file_is_in_memory_and_closed(conversion: Any, folder: Path) -> None:
    import h5py

    path = folder / "closed.nc"
    groups = {"posterior": arrays()["posterior"]}
    conversion.save_netcdf(conversion.build(groups, DIMS), path)
    data = conversion.load_netcdf(path)
    with h5py.File(path, "r+"):  # refused while a reader has the file
        pass
    path.unlink()
    check_equal(data, groups)


def check_missing_and_damaged_files_are_named(conversion: Any, folder: Path) -> None:
    import h5py

    path = folder / "damaged.nc"
    raised(FileNotFoundError, lambda: conversion.load_netcdf(path), str(path))
    groups = {"posterior": arrays(draws=2000)["posterior"]}
    conversion.save_netcdf(conversion.build(groups, DIMS), path)
    good = path.read_bytes()
    middle = len(good) // 2
    with h5py.File(path) as file:
        block = file["posterior/z"].id.get_chunk_info(0)
    within = block.byte_offset + block.size // 2
    harmed = {
        "empty": b"",
        "text": b"no NetCDF file",
        "cut": good[:middle],
        "end missing": good[:-100],
        "values harmed": good[:within] + bytes(20) + good[within + 20 :],
    }
    for content in harmed.values():
        path.write_bytes(content)
        raised(ValueError, lambda: conversion.load_netcdf(path), str(path))
    raised(ValueError, lambda: conversion.load_netcdf(folder), str(folder))
    path.write_bytes(good)
    conversion.load_netcdf(path)


def check_a_file_without_groups_is_refused(conversion: Any, folder: Path) -> None:
    import xarray

    path = folder / "bare.nc"
    xarray.Dataset({"a": 1.0}).to_netcdf(path, engine="h5netcdf")
    raised(ValueError, lambda: conversion.load_netcdf(path), str(path), "no groups")


def check_an_interrupted_save_keeps_the_good_file(conversion: Any, folder: Path) -> None:
    import xarray

    path = folder / "kept.nc"
    small = conversion.build({"posterior": {"a": np.zeros((1, 7))}}, {})
    conversion.save_netcdf(small, path)
    good = path.read_bytes()
    files = sorted(folder.iterdir())
    write = xarray.Dataset.to_netcdf
    calls = []

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) == 4:
            raise OSError("disk full")
        return write(self, *args, **kwargs)

    groups = {name: arrays()[name] for name in ("posterior", "sample_stats", "constant_data")}
    data = conversion.build(groups, DIMS)
    xarray.Dataset.to_netcdf = fails
    try:
        raised(OSError, lambda: conversion.save_netcdf(data, path), "disk full")
    finally:
        xarray.Dataset.to_netcdf = write
    assert len(calls) == 4  # the attributes and two groups were written
    assert path.read_bytes() == good
    assert sorted(folder.iterdir()) == files
    conversion.save_netcdf(data, path)
    check_equal(conversion.load_netcdf(path), groups)


def check_what_does_not_fit_is_refused_by_name(conversion: Any, folder: Path) -> None:
    build = conversion.build
    draws = np.zeros((1, 4, 3))
    for groups, dims, coords, *parts in (
        ({"posterior": {"z": draws}}, {}, {}, "posterior/z", "(1, 4, 3)", "chain, draw"),
        ({"posterior": {"z": draws[0]}}, {"posterior": {"z": ["row"]}}, {}, "(4, 3)"),
        ({"sample_stats": {"k": np.zeros(3)}}, {"sample_stats": {"k": ["row"]}}, {}, "(3,)"),
        ({"observed_data": {"x": draws}}, {"observed_data": {"x": ["row"]}}, {}, "(row)"),
        ({"posterior": {"z": draws}}, {"posterior": {"z": ["row"]}}, {"row": [1]}, "'row'"),
        ({"posterior": {"row": draws}}, {"posterior": {"row": ["row"]}}, {}, "posterior/row"),
        ({"posterior": {"z": draws}}, {"posterior": {"z": ["draw"]}}, {}, "twice"),
        ({"posterior": {"a/z": draws[..., 0]}}, {}, {}, "posterior/a/z"),
        ({"posterior": {"z": np.array([["a"]])}}, {}, {}, "posterior/z", "numbers"),
        ({"anterior": {"z": draws}}, {}, {}, "anterior", "posterior_predictive"),
        ({"posterior": {}}, {}, {}, "no variable"),
    ):
        raised(ValueError, lambda g=groups, d=dims, c=coords: build(g, d, c), *parts)
    two = {"a": np.zeros((1, 4)), "b": np.zeros((1, 5))}
    raised(ValueError, lambda: build({"posterior": two}, {}), "posterior/b", "'draw'", "4")
    raised(TypeError, lambda: conversion.save_netcdf({}, folder / "x.nc"), "dict")


# ------------------------------------------------------------------------------- Pareto k


def check_pareto_tails_have_their_k(conversion: Any, folder: Path) -> None:
    rng = np.random.RandomState(0)
    draws, rows = 4000, 60
    tail = int(3 * draws**0.5)
    for k in (0.2, 0.5, 0.7, 1.0):
        found = conversion.psis_k(-k * np.log(rng.uniform(size=(draws, rows))))
        # The fit has the standard error (1 + k) / sqrt(tail) and leans to 1/2 as by ten draws; its
        # own bias is of the order of 1 / tail.
        expected = (tail * k + 5) / (tail + 10)
        error = (1 + k) / (tail * rows) ** 0.5
        assert abs(found.mean() - expected) < 4 * error + 2 / tail, (k, found.mean(), expected)


def check_a_normal_guide_is_trusted_when_right_or_wide_and_not_when_narrow(
    conversion: Any, folder: Path
) -> None:
    # Target N(0, I) in two dimensions, guide N(0, s^2 I): the weights are Pareto, k = 1 - s^2.
    z = np.random.RandomState(1).normal(size=(2000, 40, 2))

    def k(scale: float) -> np.ndarray:
        log_weights = -((scale * z) ** 2).sum(-1) / 2 + (z**2).sum(-1) / 2 + 2 * np.log(scale)
        return conversion.psis_k(log_weights)

    np.testing.assert_array_equal(k(1.0), 0)
    assert (k(2.0) < 0).all()
    tail = int(3 * 2000**0.5)
    for scale in (0.9, 0.7, 0.5, 0.3):
        expected = (tail * (1 - scale**2) + 5) / (tail + 10)
        found = k(scale)
        error = (2 - scale**2) / (tail * 40) ** 0.5
        assert abs(found.mean() - expected) < 4 * error + 2 / tail, (scale, found.mean())
    assert k(0.5).mean() > 0.7
    assert (k(0.3) > 0.7).mean() > 0.7  # 0.88 expected of 40 rows


def check_special_weights(conversion: Any, folder: Path) -> None:
    rng = np.random.RandomState(2)
    rows = rng.normal(size=(500, 7))
    rows[:, 1] = 2.0 + 1e-6 * rows[:, 1]  # equal but for rounding
    rows[:400, 2] = -np.inf
    rows[:495, 3] = -np.inf  # five weights are left
    rows[:, 4] = np.array([0.0, 0.1, 0.2])[rng.choice(3, 500)]  # a discrete latent
    rows[:, 5] = np.log(np.arange(1, 301))[rng.choice(300, 500)]  # many codes
    rows[:, 6] = np.repeat([0.0, 0.1, 0.2], (440, 40, 20))  # two of three in the tail
    k = conversion.psis_k(rows)
    assert k[1] == 0
    assert np.isposinf(k[3])
    assert np.isnan(k[[4, 6]]).all()
    assert np.isfinite(k[[0, 2, 5]]).all()
    # A constant makes no difference, nor does the order, nor what kind of zero a zero is.
    np.testing.assert_allclose(conversion.psis_k(rows[::-1] + 1000), k, rtol=1e-6)
    np.testing.assert_array_equal(conversion.psis_k(np.maximum(rows, -900)), k)
    assert k[5] < 0.3  # uniform weights are bounded


def check_bad_weights_are_refused_by_row(conversion: Any, folder: Path) -> None:
    rows = np.random.RandomState(3).normal(size=(40, 4))
    for value in (np.nan, np.inf):
        bad = rows.copy()
        bad[7, 2] = bad[3, 3] = value
        raised(ValueError, lambda b=bad: conversion.psis_k(b), "row 2", f"[7, 2] is {value}")
    bad = rows.copy()
    bad[:, 1] = -np.inf
    raised(ValueError, lambda: conversion.psis_k(bad), "row 1")
    raised(ValueError, lambda: conversion.psis_k(rows[0]), "(4,)")
    raised(ValueError, lambda: conversion.psis_k(rows[:29]), "29", "30")
    assert np.isfinite(conversion.psis_k(rows[:30])).all()


def check_the_tail_is_arviz_own_where_its_versions_agree(conversion: Any, folder: Path) -> None:
    import arviz

    # A fifth of 100 and 3 sqrt(400) are whole, so that nothing is rounded.
    for draws in (100, 400):
        log_weights = np.random.RandomState(draws).normal(size=(draws, 5)) * 2
        if arviz.__version__.startswith("0."):
            expected = arviz.psislw(log_weights.T.copy())[1]
        else:
            from arviz_stats.base import array_stats

            expected = array_stats.psislw(-log_weights.T)[1]
        np.testing.assert_allclose(conversion.psis_k(log_weights), expected, rtol=1e-9)


# ------------------------------------------------------------------ ArviZ's own functions


def check_arviz_summaries_and_plots_work(conversion: Any, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import arviz as az
    import matplotlib.pyplot as plt

    groups = arrays()
    conversion.save_netcdf(conversion.build(groups, DIMS), folder / "plots.nc")
    data = conversion.load_netcdf(folder / "plots.nc")
    for group, number in (("posterior", 9), ("prior", 9), ("sample_stats", 6)):
        table = az.summary(data, group=group, round_to="none")
        assert len(table) == number
        for name, value in groups[group].items():
            means = [table["mean"][label] for label in table.index if label.startswith(f"{name}[")]
            np.testing.assert_allclose(np.array(means, float), value.mean((0, 1)).ravel(), 1e-5)
    assert az.extract(data)["z"].sizes["sample"] == 100
    loo = az.loo(data, pointwise=True)
    by_row = np.ravel(loo.elpd_i if _new() else loo.loo_i)
    assert by_row.shape == (3,)
    assert np.isfinite(by_row).all()
    az.plot_trace(data, var_names=["z"])
    az.plot_pair(data, var_names=["z"])
    az.plot_forest(data)
    az.plot_khat(loo)
    if _new():
        az.plot_dist(data)
        az.plot_prior_posterior(data, var_names=["z"])
        az.plot_ppc_dist(data)
    else:
        az.plot_posterior(data)
        az.plot_dist_comparison(data, var_names=["z"])
        az.plot_ppc(data)
        assert az.concat(data, data.copy(), dim="chain").posterior.sizes["chain"] == 2
        assert len(data.to_dataframe(groups=["posterior", "sample_stats"])) == 100
    assert plt.get_fignums()
    plt.close("all")


def _new() -> bool:
    import arviz

    return not arviz.__version__.startswith("0.")


CHECKS = {name: value for name, value in list(globals().items()) if name.startswith("check_")}
del CHECKS["check_equal"]


def exchange(conversion: Any, folder: Path) -> None:
    """Answer to the other version: its file read and written again, Pareto k of its weights."""
    data = conversion.load_netcdf(folder / "theirs.nc")
    check_equal(data, arrays())
    conversion.save_netcdf(data, folder / "ours.nc")
    np.save(folder / "k.npy", conversion.psis_k(np.load(folder / "weights.npy")))


def main(folder: Path) -> None:
    """Run all checks and write what came of each, as JSON."""
    import arviz

    assert "torch" not in sys.modules
    conversion = load()
    results = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in {**CHECKS, "exchange": exchange}.items():
            try:
                if name == "exchange":
                    check(conversion, folder)
                else:
                    with tempfile.TemporaryDirectory() as empty:
                        check(conversion, Path(empty))
                results[name] = "passed"
            except Exception:
                results[name] = traceback.format_exc()
    report = {"arviz": arviz.__version__, "checks": results, "torch": "torch" in sys.modules}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
