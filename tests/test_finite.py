"""Losses, gradients and weights that are no numbers: named, and the last good state kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from training_runs import PROCESS, Stream, X, pair, state, train

from vadd_pyro import MaskedDiffusionELBO, NonFiniteLossError, fit, guides, models
from vadd_pyro.checkpoints import load_checkpoint
from vadd_pyro.finite import clip_gradient


class Poisoned(nn.Module):
    """A part of a pair whose outcome or gradient is spoilt at one call."""

    def __init__(self, inner, at, spoil):
        super().__init__()
        self.inner, self.when, self.spoil, self.calls = inner, at, spoil, 0
        self.seen = nn.BatchNorm1d(1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments):
        out = self.inner(*arguments)
        self.calls += 1
        if self.calls == self.when + 2:  # the pair is run once before training
            out = self.spoil(self.inner, out)
        first = out[0] if isinstance(out, tuple) else out
        self.seen(first.detach().reshape(-1, 1))
        return out


def spoil_loss(inner, out):
    return (out[0] * math.nan, *out[1:]) if isinstance(out, tuple) else out * math.nan


def spoil_gradient(inner, out):
    def once(gradient):
        handle.remove()
        return gradient * math.inf

    handle = inner.head.weight.register_hook(once)
    return out


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("model", spoil_loss, r"the loss is nan at iteration 17: its reconstruction term is not"),
        ("guide", spoil_loss, r"the loss is nan at iteration 17: its KL term is not finite"),
        (
            "model",
            spoil_gradient,
            r"the gradient of model\.decoder\.inner\.head\.weight is not finite at iteration 17, "
            r"though the loss is \d",
        ),
        ("guide", spoil_gradient, r"the gradient of guide\.encoder\.inner\.head\.weight is not"),
    ],
)
@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_what_is_no_number_is_named_and_the_last_good_state_kept(
    part, spoil, message, clip_norm, tmp_path
):
    model, guide = pair()
    if part == "model":
        model = models.VADD(Poisoned(model.decoder, 17, spoil), model.prior)
    else:
        guide = guides.AmortizedNormal(Poisoned(guide.encoder, 17, spoil))
    poisoned = model.decoder if part == "model" else guide.encoder
    path = tmp_path / "run.pt"
    kept = {}

    def keep():
        for name, program in (("model", model), ("guide", guide)):
            kept[name] = {n: v.clone() for n, v in program.state_dict().items()}

    options = dict(clip_norm=clip_norm, monitor_every=None)
    with pytest.raises(NonFiniteLossError, match=message) as stopped:
        train(path, Stream(17, keep), (model, guide), **options)
    told = str(stopped.value)
    assert f"the programs hold the weights before it; {path} holds iteration 15" in told
    # Weights and batch statistics are those before that update.
    for name, program in (("model", model), ("guide", guide)):
        for key, value in program.state_dict().items():
            assert torch.equal(value, kept[name][key]), key
    assert poisoned.seen.running_mean.isfinite().all()
    content = load_checkpoint(path)
    assert content["iteration"] == 15
    assert all(v.isfinite().all() for v in content["weights"][part].values())
    # Resumed, without what went wrong, it goes on.
    poisoned.calls = 100
    train(path, programs=(model, guide), **options)
    assert load_checkpoint(path)["iteration"] == 30


def test_a_kl_weight_that_is_no_number_is_the_culprit():
    elbo = MaskedDiffusionELBO(PROCESS, kl_weight=lambda i: math.nan if i == 4 else 1.0)
    with pytest.raises(NonFiniteLossError, match="at iteration 4: kl_weight is nan"):
        fit(*pair(), elbo, X, 9, progress=False)


def test_a_gradient_too_large_for_its_norm_names_the_largest():
    programs = pair()
    weight = programs[0].decoder.head.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    for clip_norm in (1.0, None):
        with pytest.raises(
            NonFiniteLossError,
            match=r"norm is inf: that of model\.decoder\.head\.weight is up to 1e\+30 at iterat",
        ):
            train(None, programs=programs, clip_norm=clip_norm)


class Spoils(torch.optim.SGD):
    """An optimiser whose update number 17 is none."""

    def step(self, closure=None):
        super().step(closure)
        self.count = getattr(self, "count", 0) + 1
        if self.count == 17:
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(math.nan)


def test_weights_that_an_update_has_spoilt_are_neither_kept_nor_saved(tmp_path):
    path = tmp_path / "run.pt"
    for every, iteration in ((5, 15), (17, 0)):
        for file in tmp_path.iterdir():
            file.unlink()
        programs = pair()
        settings = dict(optimizer=lambda p: Spoils(p, lr=0.01), checkpoint_every=every)
        with pytest.raises(
            NonFiniteLossError,
            match=r"the weights of model\.\S+ are not finite after iteration 17",
        ) as stopped:
            train_with(path, programs, **settings)
        if iteration:
            assert f"the programs are back at iteration 15, from {path}" in str(stopped.value)
            assert state(*programs).isfinite().all()
            assert load_checkpoint(path)["iteration"] == iteration
        else:  # the first checkpoint was to hold them
            assert "there is no checkpoint to go back to" in str(stopped.value)
            assert not path.exists()


def train_with(path, programs, **settings):
    elbo = MaskedDiffusionELBO(PROCESS)
    fit(*programs, elbo, X, 30, checkpoint=path, resume=True, progress=False, **settings)


def test_clipping_is_torchs_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-4, 0.1, 30.0):
        sets = []
        for _ in range(2):
            generator.manual_seed(5)
            shapes = ((3, 4), (7,), ())
            sets.append([nn.Parameter(torch.randn(s, generator=generator)) for s in shapes])
            for parameter in sets[-1]:
                parameter.grad = spread * torch.randn(parameter.shape, generator=generator)
            sets[-1].append(nn.Parameter(torch.ones(2)))  # without a gradient
        mine, theirs = sets
        for clip_norm in (None, 0.7):
            assert clip_gradient(dict(zip("abcd", mine, strict=True)), clip_norm) == ""
            nn.utils.clip_grad_norm_(theirs, math.inf if clip_norm is None else clip_norm)
            for one, other in zip(mine[:3], theirs[:3], strict=True):
                assert torch.equal(one.grad, other.grad)


def test_sparse_gradients_are_looked_at_too():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 2])).sum().backward()
    assert clip_gradient({"table": table.weight}, 0.5) == ""
    dense = table.weight.grad.to_dense()
    assert float(dense.norm()) == pytest.approx(0.5, rel=1e-5)
    assert torch.allclose(dense[1], 2 * dense[2])
    (table(torch.tensor([3])) * math.nan).sum().backward()
    assert clip_gradient({"table": table.weight}, None) == "the gradient of table is not finite"
    assert clip_gradient({"none": nn.Parameter(torch.ones(1))}, 1.0) == ""
