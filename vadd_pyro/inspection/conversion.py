r"""Arrays as ArviZ data, NetCDF files and Pareto k, the same under ArviZ 0.22-0.23 and 1.x.

ArviZ 0.22-0.23 holds groups of variables in an ``InferenceData``, ArviZ 1.x in an xarray
``DataTree``; the files of both are read by both. Arrays come in from numpy and keep every
dimension, those of size one too. Nothing here needs torch.

Pareto k measures how heavy the tail of importance weights :math:`w_1, \dots, w_S` is: a
generalised Pareto distribution with shape ``k`` is fitted to the largest
:math:`\min(S / 5, 3 \sqrt S)` of them, and weights with tail index ``k`` have :math:`1 / k`
moments. ArviZ does the fit. Its versions round the length of the tail to different sides and treat
ties differently; here the tail is counted first and given to both, so that they agree:

- the length is rounded down;
- draws that tie with the largest one outside the tail do not belong to it, and neither do tied
  draws at its lower end as long as they make up its first quarter.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed importance sampling" (arXiv
    1507.02646); Kumar, Carroll, Hartikainen, Martin 2019, "ArviZ".
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MIN_DRAWS", "build", "load_netcdf", "psis_k", "save_netcdf"]

MIN_DRAWS = 30
"""Draws that Pareto k needs at least: a fifth of them is the shortest tail that can be fitted."""

_SHORTEST_TAIL = 6
_EQUAL = 1e-4  # nats; the rounding of a sum of single-precision log-densities
_ZERO = math.log(np.finfo(np.float64).tiny)  # weights below this share of the largest are zero
_SAMPLES = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "sample_stats",
)
_DATA = ("observed_data", "constant_data")


def _major_version() -> int:
    return int(metadata.version("arviz").split(".")[0])


def _arviz() -> Any:
    """The package, imported where it is needed: that takes seconds, and 0.23 warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


# -------------------------------------------------------------------------------------- data


def build(
    groups: Mapping[str, Mapping[str, Any]],
    dims: Mapping[str, Mapping[str, Sequence[str]]],
    coords: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Arrays as ArviZ data.

    Args:
        groups: arrays by group and variable. Those of ``posterior``, ``posterior_predictive``,
            ``prior``, ``prior_predictive``, ``log_likelihood`` and ``sample_stats`` begin with the
            dimensions chain and draw (ArviZ's summaries fail on a group in which one variable
            lacks them), those of ``observed_data`` and ``constant_data`` do not. Groups without
            variables are left out.
        dims: names of the other dimensions by group and variable; none if left out.
        coords: values along dimensions; 0, 1, ... if left out.
        attrs: attributes of the whole, numbers and strings; those that are None are left out.

    Returns:
        An ``arviz.InferenceData``, or with ArviZ 1.x an ``xarray.DataTree``.

    Raises:
        ValueError: for an unknown group, a name that is given twice or cannot be stored, or an
        array that does not fit its dimensions.
    """
    coords = {} if coords is None else dict(coords)
    datasets = {
        group: _dataset(group, variables, dims.get(group, {}), coords)
        for group, variables in groups.items()
        if variables
    }
    if not datasets:
        raise ValueError("groups holds no variable: expected arrays by group and name")
    kept = {name: value for name, value in (attrs or {}).items() if value is not None}
    return _container(datasets, kept)


def _dataset(
    group: str,
    variables: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
) -> Any:
    """One group, every array checked against its dimensions."""
    import xarray

    if group not in _SAMPLES + _DATA:
        raise ValueError(f"unknown group {group!r}; expected one of {', '.join(_SAMPLES + _DATA)}")
    arrays = {}
    along: dict[str, Any] = {}
    for name, value in variables.items():
        where = f"{group}/{name}"
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{where} has dtype {array.dtype}: expected numbers or bool")
        names = list(dims.get(name, ()))
        if group in _SAMPLES:
            names = ["chain", "draw", *names]
        if array.ndim != len(names):
            raise ValueError(
                f"{where} has shape {array.shape}: expected the dimensions ({', '.join(names)})"
            )
        if "/" in name or len(set(names)) < len(names):
            raise ValueError(
                f"{where} ({', '.join(names)}): expected names without '/', and no dimension twice"
            )
        for dim, size in zip(names, array.shape, strict=True):
            values = along.setdefault(dim, np.asarray(coords.get(dim, np.arange(size))))
            if values.shape != (size,):
                raise ValueError(
                    f"{where} has {size} entries along {dim!r}: expected {len(values)}"
                )
        arrays[name] = (names, array)
    for name in arrays:
        if name in along:
            raise ValueError(f"{group}/{name} has the name of a dimension: rename it")
    attributes = {"sample_dims": ["chain", "draw"]} if group in _SAMPLES else {}
    return xarray.Dataset(arrays, coords=along, attrs=attributes)


def _container(datasets: dict[str, Any], attrs: Mapping[str, Any]) -> Any:
    """What the installed ArviZ keeps its groups in."""
    if _major_version() == 0:
        return _arviz().InferenceData(attrs=attrs, **datasets)
    import xarray

    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs = dict(attrs)
    return tree


# -------------------------------------------------------------------------------------- files


def save_netcdf(data: Any, path: str | Path) -> None:
    """Write ArviZ data to a NetCDF file, whole or not at all.

    The file is written beside its place and renamed, so that a half-written one never replaces a
    good one.

    Args:
        data: an ``InferenceData`` or ``DataTree``.
        path: file to write; its folder is made if need be.

    Raises:
        TypeError: for data of another kind.
        ValueError: for data without a group.
    """
    import xarray

    if isinstance(data, xarray.DataTree):
        datasets = {name.strip("/"): part for name, part in data.to_dict().items() if name != "/"}
    elif hasattr(data, "groups") and hasattr(data, "attrs"):
        datasets = {name: data[name] for name in data.groups()}
    else:
        raise TypeError(
            f"data must be an arviz.InferenceData or an xarray.DataTree, got {type(data).__name__}"
        )
    if not datasets:
        raise ValueError(f"data has no group to write to {path}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        xarray.Dataset(attrs=data.attrs).to_netcdf(partial, mode="w", engine="h5netcdf")
        for name, dataset in datasets.items():
            # Compressed blocks carry a checksum, by which damaged values are noticed.
            encoding = {
                variable: {"zlib": True}
                for variable, value in dataset.variables.items()
                if value.dtype.kind in "biuf" and value.size
            }
            dataset.to_netcdf(partial, mode="a", group=name, engine="h5netcdf", encoding=encoding)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_netcdf(path: str | Path) -> Any:
    """Read ArviZ data from a NetCDF file into memory, and close the file.

    Args:
        path: a file of :func:`save_netcdf`, or of ArviZ itself, of either version.

    Returns:
        An ``InferenceData``, or with ArviZ 1.x a ``DataTree``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged or has no groups.
    """
    import xarray

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no NetCDF file at {path}")
    loaded = {}
    try:
        opened = xarray.open_groups(path, engine="h5netcdf")
        try:
            for name, dataset in opened.items():
                loaded[name.strip("/")] = dataset.load().drop_encoding()
        finally:
            for dataset in opened.values():
                dataset.close()
    except Exception as error:  # HDF5's readers raise many kinds; all mean the same to the caller
        raise ValueError(f"{path} cannot be read as NetCDF: {error}") from error
    attrs = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in loaded.pop("").attrs.items()
    }
    if not loaded:
        raise ValueError(f"{path} has no groups: expected ArviZ data")
    return _container(loaded, attrs)


# ------------------------------------------------------------------------------------ Pareto k


def psis_k(log_weights: np.ndarray) -> np.ndarray:
    """Pareto k of the importance weights of rows, by ArviZ.

    Draws are taken as independent (``reff = 1``). Special rows:

    - log-weights that are equal but for rounding (1e-4 nats), as draws from the exact posterior
      have them: 0 by definition;
    - fewer than 6 weights above zero (double precision's, next to the largest): infinity;
    - so many ties that no tail of 6 draws is left, as the few weights of a discrete latent may
      have them: not a number. A tail says nothing about those; read their effective sample size.

    Args:
        log_weights: ``(S, B)``, ``S`` draws of each of ``B`` rows, at least 30; minus infinity is
            a weight of zero.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: for too few draws, or a row with weights that are no numbers, infinite or all
        zero, naming the row.
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    if log_weights.ndim != 2:
        raise ValueError(f"log_weights must have shape (S, B), got {log_weights.shape}")
    if len(log_weights) < MIN_DRAWS:
        raise ValueError(
            f"log_weights has {len(log_weights)} draws: Pareto k needs at least {MIN_DRAWS}"
        )
    bad = np.argwhere(~(log_weights < np.inf))
    if len(bad):
        draw, row = bad[np.lexsort(bad.T)[0]]
        raise ValueError(
            f"log_weights[{draw}, {row}] is {log_weights[draw, row]}: row {row} needs finite "
            "weights"
        )
    largest = log_weights.max(0)
    if np.isneginf(largest).any():
        row = int(np.isneginf(largest).argmax())
        raise ValueError(f"log_weights of row {row} are all minus infinity: no draw has a weight")
    relative = np.sort(np.maximum(log_weights - largest, _ZERO), 0)
    return np.array([_row_k(row) for row in relative.T])


def _row_k(ordered: np.ndarray) -> float:
    """Pareto k of one row, from its log-weights in order, the largest 0."""
    if ordered[0] >= -_EQUAL:
        return 0.0
    if ordered[-_SHORTEST_TAIL] <= _ZERO:
        return math.inf
    number = len(ordered)
    size = int(min(number / 5, 3 * math.sqrt(number)))

    def above(value: float) -> int:
        return number - int(np.searchsorted(ordered, value, side="right"))

    size = above(ordered[-size - 1])
    while size >= _SHORTEST_TAIL and ordered[int(size / 4 + 0.5) - 1 - size] == ordered[-size]:
        size = above(ordered[-size])
    if size < _SHORTEST_TAIL:
        return math.nan
    # ArviZ takes the length of the tail as 3 sqrt(S / reff), rounded up by 0.x and down by 1.x.
    if _major_version() == 0:
        reff = 9 * number / (size - 0.5) ** 2
        return float(_arviz().psislw(ordered[None].copy(), reff=reff)[1][0])
    from arviz_stats.base import array_stats

    reff = 9 * number / (size + 0.5) ** 2
    # Of the weights themselves: arviz_stats 1.3 does not pass its ``log_weights`` on to the fit.
    weights = np.exp(ordered)
    return float(array_stats.pareto_khat(weights, chain_axis=None, r_eff=reff, tail="right"))
