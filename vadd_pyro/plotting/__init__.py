"""Figures: of toy densities, latent space, decoders, rows, and of whether a guide can be trusted.

Every function of one panel takes a matplotlib axis, or makes a new one, and returns it;
:func:`laws_by_latent` takes and returns several, :func:`compare_steps` makes a whole figure. What
is drawn are plain tensors or arrays. No setting of matplotlib is changed. Text has 8 points or
more, made for panels 3.5 inches wide; colours are safe for colour-blind readers.
"""

from vadd_pyro.plotting.codes import code_usage
from vadd_pyro.plotting.completions import completions_plot
from vadd_pyro.plotting.densities import compare_steps, save_figure, show_density
from vadd_pyro.plotting.diagnostics import gap_bars, pareto_k_plot, rank_plot
from vadd_pyro.plotting.latents import compare_posteriors, density_holes, latent_scatter
from vadd_pyro.plotting.rows import denoising_path, picture_row, show_images, show_tokens
from vadd_pyro.plotting.steps import Curve, curves_by_steps
from vadd_pyro.plotting.times import kl_over_time, total_correlation_plot, units_over_time
from vadd_pyro.plotting.traversals import latent_traversal, laws_by_latent

__all__ = [
    "Curve",
    "code_usage",
    "compare_posteriors",
    "compare_steps",
    "completions_plot",
    "curves_by_steps",
    "denoising_path",
    "density_holes",
    "gap_bars",
    "kl_over_time",
    "latent_scatter",
    "latent_traversal",
    "laws_by_latent",
    "pareto_k_plot",
    "picture_row",
    "rank_plot",
    "save_figure",
    "show_density",
    "show_images",
    "show_tokens",
    "total_correlation_plot",
    "units_over_time",
]
