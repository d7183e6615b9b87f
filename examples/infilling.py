"""Infilling: what a model says about the missing part of a row, in one step and in several.

The rows are two tied pairs, (k, k+1, l, l+1). With the first token given, the second follows and
the last two are free but for their tie. Written in one step without a latent they come out as
strangers.

    python examples/infilling.py [--num-iterations N] [--out FILE]
"""

import argparse

import torch
from matplotlib.figure import Figure

from vadd_pyro import (
    BalancedTimes,
    MaskedBatch,
    MaskedDiffusionELBO,
    data,
    exact_distribution,
    fit,
    guides,
    models,
    plotting,
)
from vadd_pyro.inspection import posterior_predictive
from vadd_pyro.nn import MLPDecoder

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-iterations", type=int, default=1200)
parser.add_argument("--out", default="infilling.png")
arguments = parser.parse_args()

pairs = data.tied_tokens("D2")
process = pairs.process()
x_0 = pairs.sample(20_000)
given = torch.tensor([[3, process.mask_id, process.mask_id, process.mask_id]])
masked = given == process.mask_id
t = process.schedule.inverse((~masked).double().mean(-1)).float()  # the share that is visible
batch = MaskedBatch(given, t, masked, masked)

figure = Figure(figsize=(7.2, 6.4), dpi=150, layout="constrained")
for i, name in enumerate(("without latent", "with 64 codes")):
    torch.manual_seed(0)
    if name == "without latent":
        model = models.MDM(MLPDecoder(process))
    else:
        decoder = MLPDecoder(process, latent_dim=8, hidden_dim=128, num_layers=2)
        model = models.VADD(decoder, models.Categorical(64, 8))
    elbo = MaskedDiffusionELBO(process, times=BalancedTimes())
    guide = guides.NoLatent()  # codes are summed out exactly
    fit(model, guide, elbo, x_0, arguments.num_iterations, learning_rate=3e-3, ema_decay=0.99)

    print(f"\n{name}: completions of (3, ?, ?, ?) that fit the data")
    for num_steps in (1, 2, 4):
        options = {"process": process, "num_steps": num_steps, "seed": 0}
        x = posterior_predictive(model, batch, 5000, **options)[:, 0]
        fits = float((pairs.probabilities[tuple(x.T)] > 0).float().mean())
        law = exact_distribution(
            model, process, num_steps, x_start=given[0], t_start=float(t), num_draws=2**10
        )
        exact = float(law[pairs.probabilities > 0].sum())
        word = "step: " if num_steps == 1 else "steps:"
        print(f"  {num_steps} {word} {100 * fits:5.1f} % (exactly {100 * exact:.1f} %)")
    written = posterior_predictive(model, batch, 5000, seed=0)[:, 0]
    ax = figure.add_subplot(2, 2, i + 1)
    plotting.completions_plot(given[0], written, ax, vocab_size=process.vocab_size)
    ax.set_title(f"{name}: shares of tokens", fontsize=9)
    ax = figure.add_subplot(2, 2, i + 3)
    strangers = (pairs.probabilities[tuple(written[:10].T)] == 0).unsqueeze(-1) & masked
    plotting.show_tokens(
        written[:10],
        ax,
        vocab_size=process.vocab_size,
        highlight=strangers,
        highlight_label="written in a row that does not fit",
        title=f"{name}: ten completions in one step",
    )
plotting.save_figure(figure, arguments.out)
print(f"\nwrote {arguments.out}")
