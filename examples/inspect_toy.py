"""What the latent of a swiss roll knows, and whether its guide can be trusted.

Trains a small model and asks: each question is one call, and inspect_pair asks them all and writes
a page, inspection/report.html.

    python examples/inspect_toy.py [--num-iterations N] [--out FOLDER]
"""

import argparse

import torch

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    LinearAnnealing,
    MaskedDiffusionELBO,
    data,
    fit,
    guides,
    models,
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

worst = batch[k.argmax().reshape(1)]
reference = reference_posterior(model, worst, 250, guide=guide, num_warmup=200, seed=0)
own = posterior_draws(model, guide, worst, 1000, seed=0)
for name, found in (("guide", own), ("NUTS", reference.draws)):
    z = found.sites["z"][:, 0]
    mean, std = z.mean(0).tolist(), z.std(0).tolist()
    print(f"worst row, {name}: mean {mean[0]:.2f} {mean[1]:.2f}, sd {std[0]:.2f} {std[1]:.2f}")

shared = total_correlation(model, guide, process, rows, times=[0.5, 1.0], seed=0)
for t, value, stderr in zip(*(v.tolist() for v in shared[:3]), strict=True):
    print(f"positions written at once at t = {t:.1f} share {value:.2f} ± {stderr:.2f} nats")

# ArviZ from here on: az.summary(idata), az.plot_pair(idata, ...), idata.to_netcdf(...).
idata = to_arviz(model, guide, batch[:20], num_draws=500, seed=0)
print("ArviZ groups:", ", ".join(str(group).strip("/") for group in idata.groups()))

verdicts = inspect_pair(
    *(model, guide, process, rows, arguments.out),
    title="swiss roll, VADD with prior N(0, I)",
    truth=roll.probabilities,
)
for question, verdict in verdicts.items():
    print(f"{question} {verdict.text}")
print(f"wrote {arguments.out}/report.html")
