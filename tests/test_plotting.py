"""Figures: what they are given they draw and return, all text in view and apart, and they leave
matplotlib as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import multivariate_normal, norm

from vadd_pyro import plotting
from vadd_pyro.plotting.diagnostics import _band
from vadd_pyro.plotting.planes import density, draws, grid_over, levels, project

matplotlib.use("Agg")

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape)).float()


def law(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.dirichlet(np.full(shape[-1], 0.3), size=shape[:-1]))


def tokens(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(0, vocab_size, size=shape))


def path(num_steps: int, length: int, vocab_size: int) -> torch.Tensor:
    """States of a sample, all masked first."""
    x, step = tokens(vocab_size, length), tokens(num_steps, length)
    visible = step < torch.arange(num_steps + 1).unsqueeze(-1)
    return torch.where(visible, x, vocab_size)


def masked_row(vocab_size: int, length: int) -> torch.Tensor:
    x = tokens(vocab_size, length)
    x[::2] = vocab_size
    return x


def all_masked_and_all_clean(ax: Axes) -> Axes:
    x = torch.tensor([[10] * 16, list(range(10)) + [0] * 6])
    return plotting.denoising_path(x, normal(1, 16), ax, vocab_size=10, times=[1, 0])


T = torch.linspace(0.1, 1, 7)
P = plotting
# What is drawn, and what must be read in the figure.
CASES: dict[str, tuple[Callable[[Axes], Axes], list[str]]] = {
    "latent_scatter of two dimensions, numbers": (
        lambda ax: P.latent_scatter(
            normal(300, 2), normal(300), ax, label="token x[0]", prior=normal(300, 2)
        ),
        ["Latents by token x[0]", "z[0]", "z[1]", "prior (50, 80, 95 % of mass)"],
    ),
    "latent_scatter of two dimensions, categories": (
        lambda ax: P.latent_scatter(
            normal(300, 2), tokens(7, 300), ax, label="code", names=["a", "b"], prior=normal(9, 2)
        ),
        ["Latents by code", "a", "b", "0", "6"],
    ),
    "latent_scatter of one dimension, words": (
        lambda ax: P.latent_scatter(
            normal(50), np.array(["left", "right"])[tokens(2, 50)], ax, label="side"
        ),
        ["Latent by side", "z", "left", "right"],
    ),
    "latent_scatter of one dimension, numbers, prior": (
        lambda ax: P.latent_scatter(
            normal(50, 1), normal(50), ax, label="sum of tokens", prior=normal(99, 1)
        ),
        ["sum of tokens", "density of the prior"],
    ),
    "latent_scatter of 16 dimensions": (
        lambda ax: P.latent_scatter(
            normal(300, 16), normal(300) > 0, ax, label="x[0] > 0", prior=normal(300, 16)
        ),
        ["2 of 16 principal components", "PC 1 (", "% of variance)", "True"],
    ),
    "latent_scatter of constant columns": (
        lambda ax: P.latent_scatter(
            torch.ones(20, 2), torch.ones(20), ax, label="x", prior=torch.ones(20, 2)
        ),
        ["Latents by x"],
    ),
    "latent_scatter of one row": (
        lambda ax: P.latent_scatter(normal(1, 3), normal(1), ax, label="x", prior=normal(1, 3)),
        ["(0 % of variance)"],
    ),
    "density_holes of two dimensions": (
        lambda ax: P.density_holes(normal(400, 2).abs(), normal(300, 2), ax),
        ["Aggregate posterior against prior", "1/100", "95 % of the prior", "holes, below 1/10"],
    ),
    "density_holes of one dimension": (
        lambda ax: P.density_holes(normal(400).abs(), normal(300), ax),
        ["density", "prior", "aggregate posterior"],
    ),
    "density_holes of 16 dimensions": (
        lambda ax: P.density_holes(normal(400, 16), normal(300, 16), ax),
        ["2 of 16 principal components"],
    ),
    "density_holes of a collapsed posterior": (
        lambda ax: P.density_holes(torch.zeros(30, 2), normal(300, 2), ax),
        ["of the prior"],
    ),
    "code_usage of 128 codes": (
        lambda ax: P.code_usage(torch.full((128,), 1 / 128), law(128), ax),
        ["of 128 used", "probability", "prior", "aggregate posterior"],
    ),
    "code_usage of 20 codes": (
        lambda ax: P.code_usage(law(20), law(20), ax),
        ["code number, the most used first"],
    ),
    "code_usage of two codes": (
        lambda ax: P.code_usage([0.5, 0.5], [1.0, 0.0], ax),
        ["Codes: 1 of 2 used"],
    ),
    "compare_posteriors of two dimensions": (
        lambda ax: P.compare_posteriors(normal(200, 2), normal(150, 2), ax, true=[0.0, 1.0]),
        ["Guide against reference", "guide (50, 95 %)", "reference (50, 95 %)", "true latent"],
    ),
    "compare_posteriors of one dimension": (
        lambda ax: P.compare_posteriors(normal(200), normal(150), ax, true=0.3),
        ["guide", "reference", "true latent", "density"],
    ),
    "compare_posteriors of 16 dimensions": (
        lambda ax: P.compare_posteriors(normal(200, 16), normal(150, 16), ax, true=normal(16)),
        ["2 of 16 principal components"],
    ),
    "compare_posteriors of equal draws": (
        lambda ax: P.compare_posteriors(torch.ones(20, 2), normal(150, 2), ax),
        ["guide"],
    ),
    "compare_posteriors of one code": (
        lambda ax: P.compare_posteriors(tokens(1, 50), tokens(1, 40), ax),
        ["code", "share of draws"],
    ),
    "compare_posteriors of 128 codes": (
        lambda ax: P.compare_posteriors(tokens(128, 500), tokens(9, 400), ax, true=[77]),
        ["more codes: ", "true code", "77"],
    ),
    "compare_posteriors of pairs of codes": (
        lambda ax: P.compare_posteriors(tokens(3, 500, 2), tokens(3, 400, 2), ax),
        ["codes", "2, 2"],
    ),
    "latent_traversal of 2 x 100 tokens": (
        lambda ax: P.latent_traversal(law(9, 2, 100), ax, path=np.arange(9.0), name="z[0]"),
        ["Decoder along a path", "z[0]", "x[0]", "x[1]", "tokens 0 to 99 upwards", "probability"],
    ),
    "latent_traversal of 16 bits": (
        lambda ax: P.latent_traversal(law(9, 16, 2), ax),
        ["probability of token 1", "step along the path", "x[0]"],
    ),
    "latent_traversal of one step of 4 tokens": (
        lambda ax: P.latent_traversal(law(1, 4, 7), ax),
        ["x[3]"],
    ),
    "pareto_k_plot": (
        lambda ax: P.pareto_k_plot(normal(200), ax),
        ["Pareto k̂", "of 200 rows", "bad, above 0.7", "share of rows"],
    ),
    "pareto_k_plot of one row": (lambda ax: P.pareto_k_plot([0.3], ax), ["0 % of 1 row"]),
    "pareto_k_plot of awkward rows": (
        lambda ax: P.pareto_k_plot([0.3, np.nan, np.inf, -np.inf], ax),
        ["33 % of 3 rows", "1 without"],
    ),
    "pareto_k_plot of nothing": (
        lambda ax: P.pareto_k_plot([np.nan], ax),
        ["1 without"],
    ),
    "gap_bars": (
        lambda ax: P.gap_bars(normal(9).abs(), normal(9), ax, stderr=torch.full((9,), 0.2)),
        [
            "Gap of the bound",
            "approximation, mean",
            "amortisation, mean",
            "± 2 s.e.",
            "gap (nats)",
        ],
    ),
    "gap_bars of 300 rows": (
        lambda ax: P.gap_bars(normal(300).abs(), normal(300), ax, stderr=torch.ones(300)),
        ["row, the largest gap first"],
    ),
    "gap_bars of one row": (lambda ax: P.gap_bars([0.1], [0.2], ax), ["mean 0.3 nats"]),
    "kl_over_time of two dimensions": (
        lambda ax: P.kl_over_time(T, normal(7, 2).abs(), None, ax),
        ["t (0 clean, 1 all masked)", "stacked (nats)", "z[0]", "z[1]"],
    ),
    "kl_over_time of 128 dimensions": (
        lambda ax: P.kl_over_time(T, normal(7, 128).abs(), None, ax),
        ["122 others"],
    ),
    "kl_over_time of negative estimates": (
        lambda ax: P.kl_over_time(T, normal(7, 16), None, ax),
        ["KL per row (nats)", "10 others"],
    ),
    "kl_over_time at one time": (lambda ax: P.kl_over_time([1.0], [[0.0]], ["z"], ax), ["z"]),
    "units_over_time": (
        lambda ax: P.units_over_time(T, tokens(17, 7), 16, ax),
        ["Active latent units", "of 16 at t = 1", "all 16"],
    ),
    "total_correlation_plot": (
        lambda ax: P.total_correlation_plot(
            T, T, T / 9, ax, truth=T * 2, gain=T / 2, label="VADD, standard normal"
        ),
        ["share through the latent", "(nats)", "VADD, standard normal", "in the data", "gain on"],
    ),
    "rank_plot of two latents": (
        lambda ax: P.rank_plot(tokens(101, 200, 2), 100, ["z[0]", "log_likelihood"], ax),
        ["of 2 outside", "rank among 100 draws", "too narrow", "log_likelihood", "95 %"],
    ),
    "rank_plot of 16 latents": (
        lambda ax: P.rank_plot(tokens(10, 300, 16), 20, None, ax),
        ["16 of 16 outside", "10 others"],
    ),
    "rank_plot of one row": (lambda ax: P.rank_plot([3], 5, None, ax), ["0 of 1 outside"]),
    "show_tokens of 4 positions": (
        lambda ax: P.show_tokens(
            tokens(11, 5, 4), ax, vocab_size=10, highlight=tokens(2, 5, 4), labels=list("abcde")
        ),
        ["Rows of tokens", "position", "row", "highlighted", "e"],
    ),
    "show_tokens of 16 positions, 100 tokens": (
        lambda ax: P.show_tokens(tokens(101, 12, 16), ax, vocab_size=100),
        ["token"],
    ),
    "show_tokens of 784 bits": (
        lambda ax: P.show_tokens(tokens(3, 12, 784), ax, vocab_size=2),
        ["masked"],
    ),
    "denoising_path of two tokens and latents": (
        lambda ax: P.denoising_path(
            path(4, 2, 100), normal(4, 2), ax, vocab_size=100, times=[1, 0.75, 0.5, 0.25, 0]
        ),
        ["One sample in 4 steps", "0.75", "masked", "just written", "latent", "z[1]"],
    ),
    "denoising_path of 16 tokens and latents": (
        lambda ax: P.denoising_path(path(8, 16, 10), normal(8, 16), ax, vocab_size=10),
        ["16 latents", "step 8", "z = "],
    ),
    "denoising_path of codes": (
        lambda ax: P.denoising_path(path(2, 4, 2), torch.tensor([17, 120]), ax, vocab_size=2),
        ["17", "120", "start"],
    ),
    "denoising_path without latent": (
        lambda ax: P.denoising_path(path(64, 4, 10), None, ax, vocab_size=10),
        ["One sample in 64 steps"],
    ),
    "denoising_path in one step": (all_masked_and_all_clean, ["One sample in 1 step"]),
    "completions_plot of one of two": (
        lambda ax: P.completions_plot(
            torch.tensor([100, 37]), tokens(100, 50, 2), ax, vocab_size=100, truth=tokens(100, 2)
        ),
        ["Completions: x[0] given x[1] = 37", "token x[0]", "true token"],
    ),
    "completions_plot of two": (
        lambda ax: P.completions_plot([50, 50], tokens(50, 50, 2), ax, vocab_size=50),
        ["2 of 2 positions", "share of completions"],
    ),
    "completions_plot of 16": (
        lambda ax: P.completions_plot(
            masked_row(27, 16),
            tokens(27, 50, 16),
            ax,
            vocab_size=27,
            truth=tokens(27, 16),
            characters=list("abcdefghijklmnopqrstuvwxyz "),
        ),
        ["8 of 16 positions", "observed", "true token", "a"],
    ),
    "completions_plot of 784 bits": (
        lambda ax: P.completions_plot(masked_row(2, 784), tokens(2, 9, 784), ax, vocab_size=2),
        ["392 of 784 positions"],
    ),
    "show_images, partly masked": (
        lambda ax: P.show_images(tokens(3, 7, 64), (8, 8), ax, vocab_size=2, title="Digits"),
        ["Digits", "masked"],
    ),
    "picture_row, partly masked": (
        lambda ax: P.picture_row((tokens(3, 6, 8, 8).float() - 1).clamp_max(1), ax, "4 steps"),
        ["4 steps"],
    ),
    "curves_by_steps with errors and levels": (
        lambda ax: P.curves_by_steps(
            {
                "MDM": P.Curve([1, 2, 4], [-9.0, -7.0, -6.5], [0.1, 0.1, float("nan")]),
                "VADD": P.Curve([1, 2], [-6.1, -6.0], [0.1, 0.1]),
            },
            ax,
            title="Bounds",
            ylabel="nats per row",
            levels={"circuit": -6.0},
        ),
        ["Bounds", "network calls T", "nats per row", "MDM", "VADD", "circuit"],
    ),
    "show_images of one": (lambda ax: P.show_images(normal(1, 64), (16, 4), ax), ["Images"]),
}


def panel() -> Axes:
    return Figure(figsize=(3.5, 3.1), dpi=150, layout="constrained").subplots()


def written(ax: Axes) -> list[Text]:
    """All texts of an axis and of those inside it that can be seen."""
    return [
        text
        for text in ax.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text.get_window_extent().width > 0
    ]


def on_scale(axis: Any) -> list[Text]:
    """Tick labels of an axis that are drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
    slack = 1e-9 * (high - low)
    return [text for at, text in ticks if low - slack <= at <= high + slack and text.get_text()]


def check_layout(axes: list[Axes]) -> None:
    """Nothing clipped, nothing on top of another, nothing too small."""
    figure = axes[0].get_figure()
    assert figure is not None
    figure.draw_without_rendering()
    everything = [one for ax in axes for one in (ax, *ax.child_axes)]
    hidden = {
        id(text)
        for one in everything
        for axis in (one.xaxis, one.yaxis)
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        for text in (tick.label1, tick.label2)
        if text not in on_scale(axis)
    }
    # Findobj descends into the axes inside.
    texts = [text for ax in axes for text in written(ax) if id(text) not in hidden]
    box = figure.bbox
    places = [(text.get_text(), text.get_window_extent()) for text in texts]
    for name, place in places:
        assert place.x0 >= box.x0 - 1, f"{name!r} leaves the figure on the left"
        assert place.y0 >= box.y0 - 1, f"{name!r} leaves the figure at the bottom"
        assert place.x1 <= box.x1 + 1, f"{name!r} leaves the figure on the right"
        assert place.y1 <= box.y1 + 1, f"{name!r} leaves the figure at the top"
    for text in texts:
        assert text.get_fontsize() >= 8, f"{text.get_text()!r} is too small to print"
    shrunk = [(name, place.padded(-1)) for name, place in places]
    for (one, a), (other, b) in itertools.combinations(shrunk, 2):
        assert not a.overlaps(b), f"{one!r} stands on {other!r}"


@pytest.mark.parametrize("name", CASES)
def test_a_figure_is_readable_on_its_axis_and_leaves_matplotlib_alone(name):
    import matplotlib.pyplot as plt

    plt.close("all")
    before = dict(matplotlib.rcParams)
    ax = panel()
    draw, expected = CASES[name]
    assert draw(ax) is ax
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == before
    check_layout([ax])
    said = " | ".join(text.get_text().replace("\n", " ") for text in written(ax))
    for words in expected:
        assert words in said.replace("\u00a0", " "), said
    assert ax.get_title() or name.startswith("picture_row")
    images = name.startswith(("show_images", "picture_row"))
    assert images or (ax.get_xlabel() and (ax.get_ylabel() or "denoising" in name))


def test_every_public_figure_has_a_case():
    several = {"Curve", "compare_steps", "laws_by_latent", "save_figure", "show_density"}
    assert {name.split()[0].rstrip(",") for name in CASES} | several == set(plotting.__all__)


@pytest.mark.parametrize("layout", ["tight", "constrained"])
def test_panels_beside_each_other_keep_apart(layout):
    figure = Figure(figsize=(7.2, 6.6), dpi=150, layout=layout)
    axes = list(figure.subplots(2, 2).ravel())
    CASES["latent_scatter of two dimensions, numbers"][0](axes[0])
    CASES["density_holes of two dimensions"][0](axes[1])
    CASES["rank_plot of two latents"][0](axes[2])
    CASES["latent_traversal of 2 x 100 tokens"][0](axes[3])
    check_layout(axes)


@pytest.mark.parametrize(
    "name",
    [
        "latent_scatter of 16 dimensions",
        "density_holes of 16 dimensions",
        "compare_posteriors of 128 codes",
        "latent_traversal of one step of 4 tokens",
        "rank_plot of two latents",
        "denoising_path of two tokens and latents",
    ],
)
def test_three_panels_fit_across_a_page(name):
    ax = Figure(figsize=(2.4, 2.9), dpi=150, layout="constrained").subplots()
    CASES[name][0](ax)
    check_layout([ax])


def test_without_an_axis_a_new_one_of_print_size_is_made():
    import matplotlib.pyplot as plt

    plt.close("all")
    ax = plotting.pareto_k_plot([0.1, 0.9])
    assert len(plt.get_fignums()) == 1
    assert ax.get_figure().get_figwidth() == pytest.approx(3.5)
    check_layout([ax])
    plt.close("all")


# ------------------------------------------------------------------------------ known answers


def test_densities_of_draws_agree_with_the_law_they_are_from():
    points = np.random.default_rng(1).normal(size=(20_000, 2)) * [1.0, 0.3]
    grid = grid_over(points)
    found = density(points, grid)
    true = multivariate_normal([0, 0], np.diag([1.0, 0.09])).pdf(grid.points)
    assert found.sum() * grid.cell == pytest.approx(1, abs=0.01)
    assert np.abs(found.ravel() - true).max() < 0.1 * true.max()
    # Half of a plane normal's mass lies where its density is above half of its highest.
    exact = true.reshape(found.shape)
    assert levels(exact, [0.5])[0] == pytest.approx(0.5 * exact.max(), rel=0.03)


def test_a_density_on_a_line_agrees_with_its_law():
    points = np.random.default_rng(1).normal(size=(5000, 1))
    grid = grid_over(points)
    assert np.abs(density(points, grid) - norm.pdf(grid.axes[0])).max() < 0.03


def test_a_projection_finds_the_widest_plane_and_its_share_of_the_variance():
    z = np.random.default_rng(1).normal(size=(4000, 5)) * [1, 4, 1, 3, 1]
    view = project(draws("z", z), None)
    assert np.abs(view.directions[[1, 3], [0, 1]]).min() > 0.99
    assert (view.directions[[1, 3], [0, 1]] > 0).all()
    assert view.labels[0] in {f"PC 1 ({p} % of variance)" for p in (56, 57, 58)}  # 16 / 28
    one = project(draws("z", z[:, :2]), ["a", "b"])
    assert one.note == ""
    assert np.array_equal(one(z[:, :2]), z[:, :2])


def _lost(ax: Axes) -> float:
    (label,) = [t.get_text() for t in ax.get_legend().get_texts() if t.get_text()[:5] == "holes"]
    return float(label.split(":")[1].split("%")[0].strip(" <"))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_holes_are_found_where_the_posterior_is_missing_and_nowhere_else(dimensions):
    rng = np.random.default_rng(2)
    prior = rng.normal(size=(4000, dimensions))
    full = rng.normal(size=(4000, dimensions))
    assert _lost(plotting.density_holes(full, prior, panel())) == 0
    half = full[full[:, 0] > -0.5]  # 31 % of the prior's mass is left out, the rim blurred
    assert 15 < _lost(plotting.density_holes(half, prior, panel())) < 31


def test_codes_count_as_used_above_a_tenth_of_an_equal_share():
    posterior = torch.full((10,), 0.098)
    posterior[0], posterior[1] = 0.009, 0.207
    ax = plotting.code_usage(torch.full((10,), 0.1), posterior, panel())
    assert ax.get_title() == "Codes: 9 of 10 used"
    heights = [patch.get_height() for patch in ax.patches]
    assert heights == sorted(heights, reverse=True)
    assert heights[-1] == pytest.approx(0.009)


def test_codes_of_guide_and_reference_have_their_shares():
    guide, reference = torch.tensor([4] * 3 + [7]), torch.tensor([7] * 4 + [9] * 4)
    ax = plotting.compare_posteriors(guide, reference, panel())
    widths = [patch.get_width() for patch in ax.patches]
    rows = [text.get_text() for text in ax.get_yticklabels()]
    assert dict(zip(rows, widths[:3], strict=True)) == {"4": 0.75, "7": 0.25, "9": 0.0}
    assert dict(zip(rows, widths[3:], strict=True)) == {"4": 0.0, "7": 0.5, "9": 0.5}


def test_a_traversal_shows_the_first_position_on_top_and_tokens_upwards():
    p = torch.full((3, 2, 10), 0.01)
    p[:, 0, 9] = p[:, 1, 0] = 0.91
    ax = plotting.latent_traversal(p, panel())
    rows = ax.collections[0].get_array()
    brightest = np.flatnonzero(np.asarray(rows)[:, 0] > 0.5)
    assert brightest.tolist() == [0, len(rows) - 1]
    assert ax.yaxis_inverted()


def test_stacked_kl_ends_at_the_whole():
    kl = torch.rand(7, 30)
    ax = plotting.kl_over_time(T, kl, None, panel())
    top = max(area.get_paths()[0].vertices[:, 1].max() for area in ax.collections)
    assert top == pytest.approx(float(kl.sum(1).max()), rel=1e-5)


def test_models_on_one_axis_differ_and_the_data_are_named_once():
    ax = panel()
    for label in ("first", "second"):
        plotting.total_correlation_plot(T, T, T / 9, ax, truth=T, gain=T, label=label)
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(names) == ["first", "gain on data", "in the data", "second"]
    first, second = (line for line in ax.lines if line.get_label() in ("first", "second"))
    assert to_hex(first.get_color()) != to_hex(second.get_color())
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()
    check_layout([ax])


def test_uniform_ranks_leave_their_band_as_often_as_it_says():
    count, num_draws, repeats = 100, 50, 1000
    uniform = (np.arange(num_draws) + 1) / (num_draws + 1)
    low, high = _band(count, uniform)
    ranks = np.random.default_rng(5).integers(0, num_draws + 1, (repeats, count, 1))
    found = (ranks <= np.arange(num_draws)).mean(1)
    outside = ((found < low - 1e-9) | (found > high + 1e-9)).any(1).mean()
    # Binomial error of the repeats, and as much for the draws behind the band; counts are coarse.
    assert outside == pytest.approx(0.05, abs=0.025)


@pytest.mark.parametrize(("shape", "outside"), [(1.0, 0), (0.5, 1), (2.0, 1)])
def test_ranks_of_a_wrong_guide_are_outside_the_band(shape, outside):
    ranks = (np.random.default_rng(0).beta(shape, shape, 400) * 101).astype(int)
    ax = plotting.rank_plot(ranks, 100, None, panel())
    assert f"{outside} of 1 outside" in ax.get_title().replace("\n", " ")
    curve = next(line for line in ax.lines if line.get_label() == "z").get_ydata()
    if outside:
        assert np.sign(curve[len(curve) // 4]) == (1 if shape < 1 else -1)


def test_a_path_outlines_each_token_once_where_it_is_written():
    states = path(5, 6, 9)
    ax = plotting.denoising_path(states, None, panel(), vocab_size=9)
    outlines = [patch for patch in ax.patches if not patch.get_fill()]
    assert len(outlines) == int((states[0] == 9).sum() - (states[-1] == 9).sum()) == 6
    for patch in outlines:
        row, column = round(patch.get_y() + 0.44), round(patch.get_x() + 0.46)
        assert states[row, column] != 9
        assert states[row - 1, column] == 9


def test_completions_show_the_shares_of_missing_positions_only():
    drawn = torch.tensor([[1, 0, 2], [1, 0, 2], [1, 2, 2], [1, 2, 0]])
    ax = plotting.completions_plot([1, 3, 3], drawn, panel(), vocab_size=3)
    heat = ax.images[0].get_array()
    assert heat.mask[:, 0].all()
    assert heat[:, 1].tolist() == [0.5, 0, 0.5]
    assert heat[:, 2].tolist() == [0.25, 0, 0.75]


def test_images_stand_in_their_order_and_masks_are_told_from_pixels():
    rows = torch.tensor([[0, 1, 1, 0], [2, 2, 0, 1], [1, 1, 1, 1]])
    ax = plotting.show_images(rows, (2, 2), panel(), vocab_size=2, num_columns=2)
    sheet = ax.images[0].get_array()
    assert sheet.shape == (5, 5)
    assert sheet[:2, :2].tolist() == [[0, 1], [1, 0]]
    assert sheet.mask[0, 3:].all()
    assert sheet[3:, :2].min() == 1


# ------------------------------------------------------------------------------ several panels


def test_laws_by_latent_share_one_scale_on_the_axes_given():
    laws = law(4, 100).reshape(4, 10, 10)
    axes = list(Figure(figsize=(7.2, 2.2), dpi=150, layout="constrained").subplots(1, 4))
    found = plotting.laws_by_latent(laws, [f"code {i}" for i in range(4)], axes)
    assert found == axes
    assert len({ax.images[0].get_clim() for ax in axes}) == 1
    assert torch.equal(torch.as_tensor(np.asarray(axes[2].images[0].get_array())), laws[2].T)
    check_layout(axes)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_laws_by_latent_make_a_figure_that_holds_them(count):
    import matplotlib.pyplot as plt

    axes = plotting.laws_by_latent(law(count, 9).reshape(count, 3, 3), ["a"] * count)
    assert len(axes) == len(axes[0].get_figure().axes) == count
    check_layout(axes)
    plt.close("all")


def test_compare_steps_and_saving(tmp_path):
    truth = law(25).reshape(5, 5)
    laws = {"VADD": {1: truth, 2: truth}, "MDM": {1: truth, 2: truth}}
    scores = {name: {1: 0.1, 2: 0.0} for name in laws}
    figure = plotting.compare_steps(truth, laws, scores, title="Toy")
    plotting.save_figure(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"
    assert len(figure.axes) == 5


def test_show_density_draws_the_first_token_to_the_right():
    p = torch.zeros(4, 4)
    p[3, 0] = 1
    ax = panel()
    assert plotting.show_density(p, ax) is ax
    assert np.argwhere(np.asarray(ax.images[0].get_array()) == 1).tolist() == [[0, 3]]


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: P.latent_scatter(normal(3, 2), normal(4), label="x"), r"color .*\(3,\).*\(4,\)"),
        (lambda: P.latent_scatter(normal(3, 0), normal(3), label="x"), r"z must have shape"),
        (
            lambda: P.latent_scatter(normal(9), list("abcdefghi"), label="x"),
            "9 different words",
        ),
        (
            lambda: P.latent_scatter(normal(3, 2), normal(3), label="x", prior=normal(9, 3)),
            "prior must have 2 dimensions, got 3",
        ),
        (
            lambda: P.latent_scatter(normal(3, 2), normal(3), label="x", names=["a"]),
            "names must be 2",
        ),
        (lambda: P.density_holes([np.nan, 1], normal(9)), "posterior has 1 entries .* not finite"),
        (lambda: P.compare_posteriors(normal(9, 2), normal(9, 3)), "reference must have 2"),
        (lambda: P.code_usage([0.5, 0.5], [0.5, 0.6]), "posterior must be probabilities"),
        (lambda: P.code_usage([0.5, 0.5], [0.5]), r"posterior must have shape \(2\)"),
        (lambda: P.latent_traversal(torch.ones(2, 2, 3)), "sum to one"),
        (lambda: P.latent_traversal(law(2, 2, 3), path=[1, 0]), "path must increase"),
        (lambda: P.laws_by_latent(law(2, 3, 3), ["a"]), "labels must be 2"),
        (lambda: P.pareto_k_plot(normal(2, 2)), r"k must have shape"),
        (lambda: P.gap_bars([0.1], [0.1, 0.2]), "amortisation must have shape"),
        (lambda: P.kl_over_time([0.5, 0.5], normal(2, 2)), "times must increase"),
        (lambda: P.units_over_time([0.5], [3], 2), "active must lie in 0..num_units = 0..2"),
        (lambda: P.rank_plot([0, 11], 10), "ranks must lie in 0..num_draws = 0..10"),
        (lambda: P.show_tokens([[0, 5]], vocab_size=4), r"x must hold tokens in 0..3 or the mask"),
        (lambda: P.show_tokens([[0.5]], vocab_size=4), "x must hold integer tokens"),
        (lambda: P.show_tokens([[1]], vocab_size=4, characters="ab"), "characters must be 4"),
        (lambda: P.denoising_path([[1]], vocab_size=4), "states has one state"),
        (lambda: P.denoising_path(path(2, 2, 4), normal(3), vocab_size=4), "latents must have"),
        (lambda: P.completions_plot([1], [[1]], vocab_size=2), "no masked position"),
        (lambda: P.completions_plot([2], [[2]], vocab_size=2), r"completions must .* in 0..1,"),
        (lambda: P.show_images(normal(2, 5), (2, 2)), r"rows must have shape \(any, 4\)"),
        (lambda: P.picture_row(normal(2, 5)), r"pictures must have shape \(N, H, W\)"),
        (lambda: P.picture_row(torch.full((1, 2, 2), 2.0)), r"brightness in \[0, 1\], got 2 to 2"),
        (lambda: P.curves_by_steps({}, ylabel="y"), "curves is empty"),
        (
            lambda: P.curves_by_steps({"a": P.Curve([1, 2], [1.0], [0.1])}, ylabel="y"),
            r"values of 'a' must have shape \(2\)",
        ),
        (lambda: P.show_density(torch.ones(3)), "p must be a law over pairs"),
    ],
)
def test_errors_name_the_argument_and_open_no_figure(draw, message):
    import matplotlib.pyplot as plt

    plt.close("all")
    with pytest.raises(ValueError, match=message):
        draw()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("values", [[0.3, 0.33], [0.11, 0.56], [0.0044, 0.13], [1e-5, 2.0]])
def test_logarithmic_axes_are_labelled_however_short_they_are(values):
    ax = P.curves_by_steps({"MDM": P.Curve([1, 2], values, [0, 0])}, panel(), ylabel="y", log=True)
    ax.figure.draw_without_rendering()
    low, high = ax.get_ylim()
    inside = [t for t in ax.yaxis.get_ticklabels() if low <= t.get_position()[1] <= high]
    assert 2 <= len(inside) <= 9
    for label in inside:
        assert float(label.get_text().replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            label.get_position()[1]
        )
