"""A model and a guide written by hand: plain Pyro functions, two latents in a hierarchy.

No class of this package is needed: a step program is a Pyro model over a masked batch.

    python examples/own_program.py [--num-iterations N]
"""

import argparse
import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from vadd_pyro import MaskedDiffusionELBO, data, exact_distribution, log_likelihood_bound, sample
from vadd_pyro.inspection import pareto_k, posterior_draws, prior_draws, to_arviz

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-iterations", type=int, default=1500)
num_iterations = parser.parse_args().num_iterations

pyro.set_rng_seed(0)
bits = data.tied_bits(4)
process = bits.process()
decoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 4 * 2))
encoder = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def model(batch):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(batch), dim=-1):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        low = pyro.sample("low", dist.Normal(top, 0.5))
        logits = decoder(torch.stack([top.expand_as(low), low], -1)).unflatten(-1, (4, 2))
        tokens = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
        pyro.sample("x_0", tokens, obs=batch.x_0)


def guide(batch):
    pyro.module("encoder", encoder)
    seen = torch.cat([batch.x_0 * batch.masked, batch.target], -1).float()
    low_loc, low_raw, top_loc, top_raw = encoder(seen).unbind(-1)
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("top", dist.Normal(top_loc, nn.functional.softplus(top_raw) + 0.01))
        pyro.sample("low", dist.Normal(low_loc, nn.functional.softplus(low_raw) + 0.01))


elbo = MaskedDiffusionELBO(process, objective="chain", num_steps=1)
svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
x_0 = bits.sample(256)
for iteration in range(num_iterations):
    loss = svi.step(x_0) / len(x_0)
    if iteration % 300 == 0:
        print(f"iteration {iteration}: {loss:.3f} nats per row")

law = exact_distribution(model, process, num_steps=1)
bound = log_likelihood_bound(model, guide, process, bits.sample(100), num_steps=1, seed=0)
print(f"entropy of the data {bits.entropy:.3f} nats, bound {-bound.mean()[0]:.3f} nats")
print(f"one-step samples that are all equal: {100 * float(law.flatten()[[0, -1]].sum()):.1f} %")
print(sample(model, process, num_samples=8, num_steps=1, seed=0).tolist())

# Two rows, everything masked: which sign has the top latent, and can the guide be trusted?
rows = process.corrupt(torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), 1.0)
draws = posterior_draws(model, guide, rows, num_draws=1000, seed=0)
k = pareto_k(draws.log_weights)
evidence = draws.log_weights.logsumexp(0) - math.log(1000)
prior = prior_draws(model, rows[:1], 1000, seed=0).sites["top"]
print(f"top latent, prior: {prior.mean():.2f} ± {prior.std():.2f}")
for i, row in enumerate(rows.x_0.tolist()):
    top = draws.sites["top"][:, i]
    print(
        f"top latent given {row}: {top.mean():.2f} ± {top.std():.2f}, k-hat {k[i]:.2f}, "
        f"p(row) {evidence[i].exp():.3f}"
    )
idata = to_arviz(model, guide, rows, num_draws=500, seed=0)
print("ArviZ posterior:", dict(idata.posterior.sizes))
