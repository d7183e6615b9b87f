"""What the sites of a pair of programs are: rows' or shared, and whether guide and model fit.

Rows of a batch are the entries of the plate at dim -1 around the model's site ``"x_0"``. A site
inside that plate has one factor per row and carries the row's weight; any other belongs to no row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from pyro.distributions import Delta, Independent, MaskedDistribution, constraints
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from vadd_pyro.distributions import check_vocabulary, token_logits
from vadd_pyro.recorder import Recorder, Site

__all__ = [
    "PARTICLES",
    "Layout",
    "check_between",
    "check_fit",
    "check_pair",
    "check_summed",
    "check_tokens_site",
    "data_plate",
    "is_row_site",
    "plate_dims",
]

PARTICLES = "vadd_particles"


def check_pair(guide: Recorder, model: Recorder) -> None:
    """Check that the guide gives exactly the latents that the model has left to infer.

    Raises:
        ValueError: naming the site.
    """
    for name, site in guide.sites.items():
        if site.observed:
            if name in model.sites and not model.sites[name].observed:
                raise ValueError(
                    f"{name!r} is observed in the guide and latent in the model: condition the "
                    "model too, or neither"
                )
            continue
        if site.auxiliary:
            if getattr(site.fn, "has_enumerate_support", False):
                raise ValueError(
                    f"the guide's auxiliary site {name!r} is discrete: its entropy would count as "
                    "if the model had the site; only a change of variables, completed by a Delta "
                    "site with its log_density, may be auxiliary"
                )
            continue
        if name not in model.sites:
            raise ValueError(
                f"the guide samples {name!r}, which the model lacks (the model has "
                f"{_names(model)}): rename or remove it"
            )
        if model.sites[name].observed:
            raise ValueError(
                f"the guide samples {name!r}, which is observed in the model: leave it out of the "
                f"guide (poutine.block(guide, hide=[{name!r}]))"
            )
    for name, site in model.sites.items():
        if not site.observed and name not in guide.sites and site.enum_dim is None:
            if getattr(site.fn, "sums_by_position", False):
                raise ValueError(
                    f"{name!r} is a chain along the row, which losses, bounds and "
                    "latent_statistics sum out; here its combinations would have to be laid out, "
                    "and they are too many"
                )
            raise ValueError(
                f"the guide misses the latent site {name!r} of the model, "
                f"{type(site.fn).__name__}(...) (the guide has {_names(guide)}): only small "
                "discrete sites can be summed out without a guide"
            )


def check_tokens_site(model: Recorder, vocab_size: int) -> None:
    """Check that the model scores the data, as categoricals over the clean tokens.

    Raises:
        ValueError: for a model without an observed site ``"x_0"``, or with other than ``K``
        logits.
    """
    site = model.sites.get("x_0")
    if site is None or not site.observed:
        raise ValueError(
            f"the model has no observed site 'x_0' (it has {_names(model)}): it must score "
            "batch.x_0 there, by pyro.sample('x_0', ..., obs=batch.x_0); were model and guide "
            "swapped?"
        )
    check_vocabulary(token_logits(site.fn), vocab_size)


def check_whole(*programs: Recorder) -> None:
    """Check that no plate stands for more rows than a batch has: it would be scaled by those that
    are left of them.

    Raises:
        ValueError: naming the site and its plate.
    """
    for program in programs:
        for site in program.sites.values():
            for frame in site.frames:
                if getattr(frame, "full_size", None) not in (None, frame.size):
                    raise ValueError(
                        f"site {site.name!r} stands in the plate {frame.name!r} of {frame.size} "
                        f"of {frame.full_size} rows, which drop_empty_rows=True would count "
                        "without those that it leaves out: leave it False"
                    )


def check_fit(guide: Recorder, msg: dict[str, Any]) -> None:
    """Check that the guide's value can be one of the model's site, before the model meets it.

    Raises:
        ValueError: naming both sites.
    """
    name = msg["name"]
    if name not in guide.sites or isinstance(msg["fn"], _Subsample):
        return
    own = _inner_plates(guide.sites[name].frames)
    other = _inner_plates(msg["cond_indep_stack"])
    if own != other:
        raise ValueError(
            f"the guide's site {name!r} stands in plates of dims and sizes {own} inside the data "
            f"plate, the model's site {name!r} in {other}: give both the same, or one draw would "
            "count as several"
        )
    guess = guide.sites[name].fn
    if any(isinstance(fn, Delta) for fn in (guess, getattr(guess, "base_dist", None))):
        return
    (shape, kind), (other_shape, other_kind) = _kind(guess), _kind(msg["fn"])
    known = "values" not in (kind, other_kind)
    if shape != other_shape or (known and kind != other_kind):
        raise ValueError(
            f"guide and model do not fit: the guide's site {name!r} is {_describe(guess)}, the "
            f"model's site {name!r} is {_describe(msg['fn'])}; guides.for_prior(prior, encoder) "
            "picks a guide that fits"
        )


def _inner_plates(frames: Iterable[Any]) -> dict[int, int]:
    """Sizes of plates other than that of the rows and of particles, by dim."""
    return {
        f.dim: f.size for f in frames if f.dim is not None and f.dim < -1 and f.name != PARTICLES
    }


def _kind(fn: Any) -> tuple[Any, ...]:
    """What values a law has: their shape, and the sort of their support where it is known."""
    shape = tuple(fn.event_shape)
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    try:
        support = fn.support
    except NotImplementedError:
        return (shape, "values")
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.one_hot:
        return (shape, "one-hot rows")
    if support is constraints.sphere:
        return (shape, "unit vectors")
    return (shape, "integers" if support.is_discrete else "real numbers")


def _describe(fn: Any) -> str:
    shape, kind = _kind(fn)
    while isinstance(fn, Independent | MaskedDistribution):
        fn = fn.base_dist
    return f"{type(fn).__name__} over {kind} of shape {shape}"


def _names(recorder: Recorder) -> str:
    return ", ".join(repr(name) for name in recorder.sites) or "no sites"


def data_plate(x_0: Site) -> str | None:
    """Name of the plate over rows, at dim -1 around the site ``"x_0"``; None without one."""
    names = [f.name for f in x_0.frames if f.dim == -1]
    return names[0] if names else None


def is_row_site(site: Site, plate: str | None, num_rows: int) -> bool:
    """Whether a site has one factor per row: it stands in the data plate, or has that shape where
    the program uses none.
    """
    if plate is not None:
        return any(f.dim == -1 and f.name == plate for f in site.frames)
    return site.fn.batch_shape[-1:] == (num_rows,)


class Layout:
    """Dimensions of log-densities: ``(supports ..., [particles,] inner plates ..., rows)``."""

    def __init__(
        self, guide: Recorder, model: Recorder, active: Tensor, row_plates: int, vectorized: bool
    ) -> None:
        self.num_rows = len(active)
        self.device = active.device
        self.row_plates = row_plates
        self.particle_dim = -1 - row_plates if vectorized else None
        plate = data_plate(model.sites["x_0"])
        self.rows = {
            name: is_row_site(site, plate, self.num_rows) for name, site in model.sites.items()
        }
        for name, site in guide.sites.items():
            # A guide's site goes with the model's; its plates may have other names.
            dims = plate_dims(site)
            shape = site.fn.batch_shape[-1:] == (self.num_rows,)
            self.rows.setdefault(name, -1 in dims or (not dims and shape))
        for site in (*model.sites.values(), *guide.sites.values()):
            for dim in plate_dims(site):
                if dim < -row_plates:
                    raise ValueError(
                        f"site {site.name!r} stands in a plate at dim {dim}, but "
                        f"max_plate_nesting is {row_plates}: pass max_plate_nesting={-dim}"
                    )
            check_between(site, row_plates)

    def reduce(self, value: Tensor) -> Tensor:
        """Sum over plates between the rows and the particles, keeping their dimensions."""
        for dim in range(-self.row_plates, -1):
            if value.dim() >= -dim:
                value = value.sum(dim, keepdim=True)
        return value

    def total(self, value: Tensor) -> Tensor:
        """Sum of a shared site's log-density, averaged over particles."""
        dim = self.particle_dim
        return value.mean(dim).sum() if dim is not None and value.dim() >= -dim else value.sum()

    def sum(self, values: list[Tensor]) -> Tensor:
        """Broadcast sum of row terms; zeros if there are none."""
        if not values:
            return torch.zeros(self.num_rows, device=self.device)
        return functools.reduce(torch.add, values)


def check_between(site: Site, row_plates: int) -> None:
    """Check that a site has nothing at dimensions of plates that it does not stand in: it would be
    summed as if those were its factors, and particles among them.
    """
    shape, own = site.fn.batch_shape, plate_dims(site)
    for dim in range(-row_plates, -1):
        if len(shape) >= -dim and shape[dim] != 1 and dim not in own:
            raise ValueError(
                f"site {site.name!r} has size {shape[dim]} at dim {dim}, where it stands in no "
                "plate: keep dimensions when summing over an inner plate (keepdim=True), so that "
                "those of particles stay to the left"
            )


def plate_dims(site: Site) -> list[int]:
    """Batch dimensions of the plates around a site, the particles' own left out."""
    return [f.dim for f in site.frames if f.dim is not None and f.name != PARTICLES]


def check_summed(sites: Iterable[Site], layout: Layout) -> None:
    """Check that discrete sites can be summed out row by row.

    Raises:
        ValueError: naming the site and what to do instead.
    """
    for site in sites:
        if not layout.rows[site.name]:
            raise ValueError(
                f"the discrete site {site.name!r} stands outside the data plate and couples all "
                "rows: it cannot be summed out row by row; give the guide a site of that name"
            )
        if any(dim < -1 for dim in plate_dims(site)):
            raise ValueError(
                f"the discrete site {site.name!r} stands in a plate inside the data plate: only "
                "sites with the data plate alone are summed out; give the guide a site of that "
                "name"
            )
