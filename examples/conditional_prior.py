"""A prior that sees the state, p(z | x_t, t), in place of one p(z) for all states.

With both coordinates of a checkerboard masked the latent has to tie them; with one visible there
is nothing left to tie, and the posterior should be the prior. One learned prior has to serve both
states. One that sees x_t may have many modes here and a single plain one there.

    python examples/conditional_prior.py [--num-iterations N]
"""

import argparse
from dataclasses import replace

import torch

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    LinearAnnealing,
    MaskedDiffusionELBO,
    data,
    exact_distribution,
    fit,
    guides,
    latent_statistics,
    metrics,
    models,
)
from vadd_pyro.nn import MLPDecoder, MLPFeatures, StateFeatures

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-iterations", type=int, default=2000)
num_iterations = parser.parse_args().num_iterations

board = data.checkerboard(vocab_size=20)
process = board.process()
x_0, held_out = board.sample(50_000), board.sample(500, seed=1)
both = process.corrupt(held_out, 1.0)
second = torch.tensor([False, True]).expand_as(held_out)
one = replace(
    process.corrupt(held_out, 0.5),
    x_t=held_out.masked_fill(second, process.mask_id),
    masked=second,
    target=second,
)

for name in ("p(z)", "p(z | x_t, t)"):
    torch.manual_seed(0)
    context = None if name == "p(z)" else StateFeatures(process, hidden_dim=64)
    prior = models.NormalizingFlow(2, context)
    model = models.VADD(MLPDecoder(process, latent_dim=2), prior)
    guide = guides.for_prior(prior, MLPFeatures(process))
    elbo = MaskedDiffusionELBO(
        process,
        times=AtomTimes(0.25, BalancedTimes()),
        kl_weight=LinearAnnealing(max(1, num_iterations // 3), start=0.001),
    )
    fit(model, guide, elbo, x_0, num_iterations, learning_rate=3e-3, ema_decay=0.999)

    law = exact_distribution(model, process, num_steps=1, num_draws=2**12)
    js = metrics.jensen_shannon(law, board.probabilities)
    print(f"\nflow as prior {name}")
    print(f"  Jensen-Shannon distance of one-step samples to the data: {js:.4f} nats")
    for state, batch in (("both tokens masked", both), ("one token visible", one)):
        kl = latent_statistics(model, guide, batch, elbo, num_draws=8).kl
        print(f"  KL of the posterior from the prior, {state}: {kl:.3f} nats a row")
