"""What the latent of a swiss roll knows, and whether its guide can be trusted.

Trains a small model and asks: each question is one call, and inspect_pair asks them all and writes
a page, inspection/report.html.

    python examples/inspect_toy.py [--num-iterations N] [--out FOLDER]
"""

import argparse
from pathlib import Path

import pyro
import torch
from matplotlib.figure import Figure

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    DiagonalNormal,
    LinearAnnealing,
    MaskedDiffusionELBO,
    data,
    fit,
    guides,
    models,
    plotting,
)
from vadd_pyro.inspection import (
    inspect_pair,
    pareto_k,
    posterior_draws,
    reference_posterior,
    to_arviz,
    total_correlation,
)
from vadd_pyro.nn import MLPDecoder, MLPEncoder

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-iterations", type=int, default=2000)
parser.add_argument("--out", default="inspection")
arguments = parser.parse_args()

torch.manual_seed(0)
roll = data.swiss_roll(vocab_size=50)
process = roll.process()
model = models.VADD(MLPDecoder(process, latent_dim=2), models.StandardNormal(2))
guide = guides.AmortizedNormal(MLPEncoder(process, latent_dim=2))
elbo = MaskedDiffusionELBO(
    process,
    times=AtomTimes(0.25, BalancedTimes()),
    kl_weight=LinearAnnealing(max(1, arguments.num_iterations // 3), start=0.001),
)
x_0 = roll.sample(50_000)
fit(model, guide, elbo, x_0, arguments.num_iterations, learning_rate=3e-3, ema_decay=0.999)

# Some rows that were not trained on, everything masked: the state from which samples start.
rows = roll.sample(500, seed=1)
batch = process.corrupt(rows, 1.0)

draws = posterior_draws(model, guide, batch, num_draws=500, seed=0)
k = pareto_k(draws.log_weights)
print(
    f"Pareto k-hat above 0.7, where the guide misses mass: {100 * (k > 0.7).float().mean():.0f} %"
)


# Break the guide on purpose for some rows, and hold it against the posterior itself.
def broken(batch):
    """The trained guide, but where the first token is even: shifted, and half as wide."""
    z_loc, z_scale = guide.encoder(batch)
    wrong = (batch.x_0[:, :1] % 2 == 0).float()
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", DiagonalNormal(z_loc + 1.5 * wrong * z_scale, z_scale / (1 + wrong)))


odd, even = ((rows[:, 0] % 2 == 1).nonzero()[0], (rows[:, 0] % 2 == 0).nonzero()[0])
two = batch[torch.cat([odd, even])]
reference = reference_posterior(model, two, 250, guide=guide, num_warmup=200, seed=0)
drawn = posterior_draws(model, broken, two, num_draws=1000, seed=0)
figure = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")
for i, name in enumerate(("a row left alone", "a row broken on purpose")):
    mine, true = drawn.sites["z"][:, i], reference.draws.sites["z"][:, i]
    ax = figure.add_subplot(1, 2, i + 1)
    plotting.compare_posteriors(mine, true, ax, names=["z[0]", "z[1]"])
    ax.set_title(f"{name}: k-hat {float(pareto_k(drawn.log_weights)[i]):.2f}", fontsize=9)
    apart = (mine.mean(0) - true.mean(0)).abs() / true.std(0)
    print(f"{name}: means of guide and NUTS {float(apart.max()):.2f} posterior sd apart")
folder = Path(arguments.out)
folder.mkdir(parents=True, exist_ok=True)
plotting.save_figure(figure, folder / "broken_guide.png")

shared = total_correlation(model, guide, process, rows, times=[0.5, 1.0], seed=0)
for t, value, stderr in zip(*(v.tolist() for v in shared[:3]), strict=True):
    print(f"positions written at once at t = {t:.1f} share {value:.2f} ± {stderr:.2f} nats")

# ArviZ from here on: az.summary(idata), az.plot_pair(idata, ...), idata.to_netcdf(...).
idata = to_arviz(model, guide, batch[:20], num_draws=500, seed=0)
print("ArviZ posterior:", dict(idata.posterior.sizes))

verdicts = inspect_pair(
    *(model, guide, process, rows, folder),
    title="swiss roll, VADD with prior N(0, I)",
    truth=roll.probabilities,
)
for question, verdict in verdicts.items():
    print(f"{question} {verdict.text}")
print(f"wrote {folder / 'report.html'} and {folder / 'broken_guide.png'}")
