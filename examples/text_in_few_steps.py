"""Text in few network calls: letters written together, without a latent and with a code at each.

python examples/text_in_few_steps.py [--num-iterations N]
"""

import argparse

import torch

from vadd_pyro import (
    MaskedDiffusionELBO,
    data,
    fit,
    guides,
    log_likelihood_bound,
    models,
    sample,
)
from vadd_pyro.nn import LocalTransformerDecoder, TransformerDecoder, TransformerState

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--num-iterations", type=int, default=800)
num_iterations = parser.parse_args().num_iterations

text = data.characters(length=32)  # of the topics in Python's own documentation
process = text.process()
sizes = dict(hidden_dim=64, num_layers=2, num_heads=2)

torch.manual_seed(0)
without = models.MDM(TransformerDecoder(process, **sizes))
torch.manual_seed(0)
context = TransformerState(process, hidden_dim=64, num_layers=1, num_heads=2)
prior = models.Chain(16, process.length, context=context)  # 16 codes a position, 16^32 a row
decoder = LocalTransformerDecoder(process, prior.latent_dim, latent_hidden_dim=32, **sizes)
coupled = models.VADD(decoder, prior)

nothing = guides.NoLatent()  # all of them are summed out: no guide, no gap
rows = text.rows("test", 100)
for title, model in (("no latent", without), ("a chain of codes", coupled)):
    elbo = MaskedDiffusionELBO(process)
    fit(model, nothing, elbo, text.rows("train"), num_iterations, batch_size=64, ema_decay=0.99)
    print(title)
    for num_steps in (1, 2, 4):
        bound = log_likelihood_bound(model, nothing, process, rows, num_steps, seed=0)
        nats, error = bound.mean()
        (drawn,) = text.decode(sample(model, process, 1, num_steps, seed=0))
        print(f"  T = {num_steps}: {nats:.1f} ± {error:.1f} nats a row   {drawn!r}")
