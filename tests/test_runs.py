"""Run folders: what is saved is what is built again."""

from __future__ import annotations

import pytest
import torch

from vadd_pyro import cli, data, log_likelihood_bound, sample, zoo
from vadd_pyro.checkpoints import save_checkpoint
from vadd_pyro.runs import find_runs, load_run, save_run

SIZES = {"latent_dim": 2, "num_codes": 9, "hidden_dim": 16}


def saved(folder, prior, guide="auto"):
    density = data.named("moons", 8)
    pair = zoo.build(prior, guide, density.process(), **SIZES)
    with torch.no_grad():
        for parameter in pair.model.parameters():
            parameter.mul_(1.7)
    parts = {"data": "moons", "vocab_size": 8, "prior": prior, "guide": guide, **SIZES}
    save_run(folder, pair.model, pair.guide, parts)
    return density, pair


@pytest.mark.parametrize("prior", ["none", "standard_normal", "vamp", "flow", "categorical"])
def test_a_run_comes_back_as_it_was(prior, tmp_path):
    density, pair = saved(tmp_path, prior)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run = load_run(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    x = [sample(m, run.process, 50, 2, seed=1) for m in (pair.model, run.model)]
    assert torch.equal(*x)
    held_out = density.sample(10)
    first, second = (
        log_likelihood_bound(m, g, run.process, held_out, 2, num_particles=3, seed=2).value
        for m, g in ((pair.model, pair.guide), (run.model, run.guide))
    )
    assert torch.equal(first, second)
    assert run.density is density
    assert "moons" in run.title


def test_runs_are_found_at_and_below_a_folder(tmp_path):
    saved(tmp_path / "b", "none")
    saved(tmp_path / "a" / "deep", "none")
    assert find_runs(tmp_path) == [tmp_path / "a" / "deep", tmp_path / "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    assert find_runs(tmp_path / "b" / "run.pt") == [tmp_path / "b"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        find_runs(tmp_path / "nothing")


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run\.pt"):
        load_run(tmp_path)
    saved(tmp_path, "none")
    whole = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"run\.pt cannot be read"):
        load_run(tmp_path)
    save_checkpoint(tmp_path / "run.pt", {"model": {}})
    with pytest.raises(ValueError, match=r"run\.pt is a checkpoint, but no run"):
        load_run(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    density = data.named("moons", 8)
    pair = zoo.build("standard_normal", "auto", density.process(), **SIZES)
    parts = {"data": "moons", "vocab_size": 8, "prior": "none", "guide": "auto", **SIZES}
    save_run(tmp_path, pair.model, pair.guide, parts)
    with pytest.raises(ValueError, match="do not fit the model"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="configuration lacks prior"):
        save_run(tmp_path, pair.model, pair.guide, {k: 1 for k in parts if k != "prior"})


FEW = ("--num-rows", "100", "--num-draws", "30", "--no-progress")


def test_inspect_writes_a_report_into_each_run_below_a_folder(tmp_path, capsys):
    saved(tmp_path / "a", "none")
    saved(tmp_path / "b", "categorical")
    assert cli.main(["inspect", str(tmp_path), *FEW]) == 0
    said = capsys.readouterr().out
    for name in ("a", "b"):
        report = tmp_path / name / "inspection" / "report.html"
        assert str(report) in said
        assert "moons" in report.read_text()
    assert "the model has no latent" in said
    assert cli.main(["inspect", f"{tmp_path / 'a'}/", "--out", str(tmp_path / "c"), *FEW]) == 0
    assert (tmp_path / "c" / "posterior.nc").exists()


def test_inspect_refuses_by_name_and_goes_on_with_the_other_runs(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none")]) == 1
    assert "no run.pt" in capsys.readouterr().err
    saved(tmp_path / "good", "none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.pt").write_bytes(b"no checkpoint")
    assert cli.main(["inspect", str(tmp_path), *FEW]) == 1
    both = capsys.readouterr()
    assert "bad/run.pt cannot be read" in both.err
    assert "wrote" in both.out
    assert cli.main(["inspect", str(tmp_path), "--out", str(tmp_path / "x"), *FEW]) == 1
    assert "holds 2 runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path), "--num-rows", "0"])
    assert cli.main(["inspect", str(tmp_path / "good"), "--num-rows", "50"]) == 1
    assert "expected at least 100" in capsys.readouterr().err


def test_a_run_without_weights_or_of_unknown_parts_is_refused(tmp_path):
    parts = {"data": "moons", "vocab_size": 8, "prior": "none", "guide": "auto", **SIZES}
    save_checkpoint(tmp_path / "run.pt", {"configuration": parts})
    with pytest.raises(ValueError, match=r"run\.pt is a checkpoint, but no run"):
        load_run(tmp_path)
    parts["data"] = "mars"
    save_checkpoint(tmp_path / "run.pt", {"configuration": parts, "model": {}, "guide": {}})
    with pytest.raises(ValueError, match=r"run\.pt: its pair cannot be built: data must be among"):
        load_run(tmp_path)
