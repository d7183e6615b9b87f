"""The training loop: it learns, resumes exactly, and says what went wrong."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import small_pair

from vadd_pyro import (
    LinearAnnealing,
    MaskedDiffusionELBO,
    MaskingProcess,
    NonFiniteLossError,
    TokenCategorical,
    data,
    exact_distribution,
    fit,
    fit_guide,
    guides,
    log_likelihood_bound,
    metrics,
)
from vadd_pyro.batches import Batches
from vadd_pyro.checkpoints import load_checkpoint, save_checkpoint
from vadd_pyro.rates import scheduled_rate

PROCESS = MaskingProcess(2, 3)
X = data.tied_bits(3).sample(300)
OPTIONS = dict(batch_size=64, ema_decay=0.95, warmup=5, progress=False, log_every=7, seed=3)


def annealed():
    return MaskedDiffusionELBO(PROCESS, kl_weight=LinearAnnealing(40, 0.1))


def state(*programs):
    return torch.cat([p.detach().flatten() for program in programs for p in program.parameters()])


def test_fit_learns_what_the_latent_is_for():
    model, guide = small_pair("categorical", PROCESS)
    history = fit(model, guide, annealed(), X, 400, learning_rate=0.02, progress=False)
    law = exact_distribution(model, PROCESS, 1)
    assert metrics.total_variation(law, data.tied_bits(3).probabilities) < 0.05
    assert history.iteration[-1] == 400
    assert history.loss[-1] < history.loss[0]
    assert set(history.to_dict()) >= {"iteration", "loss", "kl", "learning_rate", "seconds"}
    json.dumps(history.to_dict())


class Killed(BaseException):
    """Stands for whatever ends a process between two updates."""


class DiesAt(MaskedDiffusionELBO):
    """Ends the run at the given update."""

    at = 0

    def terms(self, *args, **kwargs):
        if self.iteration == self.at:
            raise Killed
        return super().terms(*args, **kwargs)


@pytest.mark.parametrize("prior", ["standard_normal", "mixture_of_normals", "categorical"])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(prior, tmp_path):
    def pair():
        pyro.set_rng_seed(11)
        return small_pair(prior, PROCESS)

    options = dict(**OPTIONS, checkpoint_every=20, learning_rate=0.01)
    model, guide = pair()
    whole = fit(model, guide, annealed(), X, 60, checkpoint=tmp_path / "whole.pt", **options)
    model2, guide2 = pair()
    elbo = DiesAt(PROCESS, kl_weight=LinearAnnealing(40, 0.1))
    elbo.at = 33
    path = tmp_path / "part.pt"
    with pytest.raises(Killed):
        fit(model2, guide2, elbo, X, 60, checkpoint=path, **options)
    assert load_checkpoint(path)["iteration"] == 20
    model3, guide3 = pair()
    torch.randn(17)  # whatever the process does in between
    resumed = fit(model3, guide3, annealed(), X, 60, checkpoint=path, resume=True, **options)
    assert torch.equal(state(model, guide), state(model3, guide3))
    first, second = (load_checkpoint(tmp_path / f"{n}.pt") for n in ("whole", "part"))
    for name, value in first["weights"]["model"].items():
        assert torch.equal(value, second["weights"]["model"][name])
    assert whole.loss == resumed.loss
    assert whole.kl == resumed.kl
    assert whole.iteration == resumed.iteration
    assert resumed.seconds == sorted(resumed.seconds)
    # a finished run resumed is finished
    again = fit(model3, guide3, annealed(), X, 60, checkpoint=path, resume=True, **options)
    assert again.loss == whole.loss


def test_resuming_plain_functions_and_random_data(tmp_path):
    def model(batch):
        table = pyro.param("table", torch.zeros(4, 3, 2))
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            pyro.sample(
                "x_0",
                TokenCategorical(
                    table[z] + z[..., None, None] * 0.1 * torch.tensor([0.0, 1.0]), batch.target
                ),
                obs=batch.x_0,
            )

    def fresh(n):
        return torch.randint(2, (n, 1)).expand(n, 3)

    results = []
    for interrupted in (False, True):
        pyro.clear_param_store()
        path = tmp_path / f"{interrupted}.pt"
        options = dict(**OPTIONS, checkpoint=path, checkpoint_every=10, learning_rate=0.05)
        if interrupted:
            elbo = DiesAt(PROCESS)
            elbo.at = 25
            with pytest.raises(Killed):
                fit(model, guides.NoLatent(), elbo, fresh, 40, **options)
            pyro.clear_param_store()
        elbo = MaskedDiffusionELBO(PROCESS)
        fit(model, guides.NoLatent(), elbo, fresh, 40, resume=True, **options)
        results.append(pyro.param("table").detach().clone())
    assert torch.equal(*results)
    assert results[0].abs().max() > 0.01


def test_the_checkpoint_is_plain_and_loads_without_running_code(tmp_path):
    model, guide = small_pair("standard_normal", PROCESS)
    path = tmp_path / "folder" / "run.pt"
    fit(model, guide, annealed(), X, 10, checkpoint=path, **OPTIONS)
    content = torch.load(path, weights_only=True)
    assert content["iteration"] == 10
    assert content["configuration"]["seed"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]
    # the programs hold averaged weights, the file the raw ones
    raw = content["weights"]["model"]["decoder.head.weight"]
    assert not torch.equal(raw, model.decoder.head.weight)
    averaged = dict(zip(content["parameter_names"], content["average"], strict=True))
    assert torch.equal(averaged["model.decoder.head.weight"], model.decoder.head.weight)


def test_checkpoints_of_other_runs_and_damaged_files_are_refused_by_name(tmp_path):
    pair = small_pair("standard_normal", PROCESS)
    path = tmp_path / "run.pt"
    fit(*pair, annealed(), X, 10, checkpoint=path, **OPTIONS)
    with pytest.raises(
        ValueError, match=r"run\.pt belongs to another run: its num_iterations is 10"
    ):
        fit(*pair, annealed(), X, 20, checkpoint=path, resume=True, **OPTIONS)
    other = small_pair("standard_normal", PROCESS, width=8)
    with pytest.raises(ValueError, match=r"run\.pt does not fit this model"):
        fit(*other, annealed(), X, 10, checkpoint=path, resume=True, **OPTIONS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"run\.pt cannot be read"):
        load_checkpoint(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of vadd_pyro"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_checkpoint(tmp_path / "missing.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"a": 1})
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"a": lambda: None})
    assert load_checkpoint(path)["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("culprit", ["reconstruction", "KL"])
def test_a_nan_names_the_iteration_and_keeps_the_last_good_checkpoint(culprit, tmp_path):
    model, guide = small_pair("standard_normal", PROCESS)
    part = model.decoder if culprit == "reconstruction" else guide.encoder
    calls = []

    def poison(module, inputs, output):
        calls.append(None)
        if len(calls) == 26:  # the pair is run once before training
            return (
                output * math.nan if torch.is_tensor(output) else (output[0], output[1] * math.inf)
            )
        return None

    part.register_forward_hook(poison)
    path = tmp_path / "run.pt"
    with pytest.raises(NonFiniteLossError, match=rf"at iteration 24.*{culprit}|iteration 24"):
        fit(model, guide, annealed(), X, 60, checkpoint=path, checkpoint_every=10, **OPTIONS)
    content = load_checkpoint(path)
    assert content["iteration"] == 20
    assert all(v.isfinite().all() for v in content["weights"]["model"].values())
    assert state(model, guide).isfinite().all()


def test_the_random_state_outside_is_left_alone():
    pair = small_pair("standard_normal", PROCESS)
    before = torch.get_rng_state()
    fit(*pair, annealed(), X, 6, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_visit_every_row_once_an_epoch():
    rows = torch.arange(10).unsqueeze(-1)
    batches = Batches(rows, 4, seed=1, device=torch.device("cpu"))
    seen = torch.cat([batches(i).flatten() for i in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    again = Batches(rows, 4, seed=1, device=torch.device("cpu"))
    assert (again(3) == batches(3)).all()
    large = Batches(rows, 25, seed=1, device=torch.device("cpu"))
    assert len(large(0)) == 25


def test_learning_rate_schedule():
    rates = [scheduled_rate(i, 2.0, 4, 10, "cosine", 0.1) for i in range(11)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[10] == pytest.approx(0.2)
    assert rates[7] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert scheduled_rate(9, 2.0, 0, 10, "constant", 0.0) == 2.0
    assert scheduled_rate(5, 2.0, 0, 10, "linear", 0.0) == 1.0


def test_another_optimiser_is_scheduled_relative_to_its_own_rate():
    pair = small_pair("none", PROCESS)
    history = fit(
        *pair,
        annealed(),
        X,
        4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        decay="constant",
        log_every=1,
        progress=False,
    )
    assert history.learning_rate == [0.5] * 4


def test_refitting_the_guide_tightens_the_bound_and_leaves_the_model():
    model, guide = small_pair("standard_normal", PROCESS)
    fit(model, guide, annealed(), X, 300, learning_rate=0.02, progress=False)
    kept, before = state(model), state(guide)
    loose, error = log_likelihood_bound(
        model, guide, PROCESS, X, 3, num_particles=1, seed=1
    ).mean()
    chain = MaskedDiffusionELBO(PROCESS, "chain", num_steps=3)
    fit_guide(model, guide, chain, X, 300, learning_rate=0.01, progress=False)
    assert torch.equal(state(model), kept)
    assert not torch.equal(state(guide), before)
    assert all(p.requires_grad for p in model.parameters())
    tight, _ = log_likelihood_bound(model, guide, PROCESS, X, 3, num_particles=1, seed=1).mean()
    assert tight > loose - error
    with pytest.raises(TypeError, match="torch modules"):
        fit_guide(lambda b: None, guide, chain, X, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_iterations=0), "num_iterations must be an integer of at least 1, got 0"),
        (dict(batch_size=0), "batch_size"),
        (dict(learning_rate=0.0), "learning_rate must be positive"),
        (dict(warmup=50), "warmup must lie between 0 and num_iterations = 10, got 50"),
        (dict(decay="step"), "decay must be"),
        (dict(clip_norm=-1.0), "clip_norm must be positive or None"),
        (dict(ema_decay=1.0), r"ema_decay must lie in \(0, 1\)"),
        (dict(resume=True), "needs the checkpoint"),
        (dict(data=X + 1), r"data\[\d+, 0\] is 2: expected tokens in 0..1"),
        (dict(data=X[:0]), "data is an empty batch"),
        (dict(data=lambda n: X[:n] + 5), "expected tokens in 0..1"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_trained(options, message):
    model, guide = small_pair("none", PROCESS)
    before = state(model)
    arguments = {"data": X, "num_iterations": 10, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        fit(model, guide, annealed(), **arguments)
    assert torch.equal(state(model), before)


def test_a_pair_that_does_not_fit_or_has_nothing_to_train_is_refused_at_once():
    model, _ = small_pair("standard_normal", PROCESS)
    with pytest.raises(ValueError, match="misses the latent site 'z'"):
        fit(model, guides.NoLatent(), annealed(), X, 10, progress=False)

    def bare(batch):
        with pyro.plate("data", len(batch), dim=-1):
            logits = torch.zeros(len(batch), 3, 2)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    with pytest.raises(ValueError, match="no parameters to train"):
        fit(bare, guides.NoLatent(), annealed(), X, 10, progress=False)
