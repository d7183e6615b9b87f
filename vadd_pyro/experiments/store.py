"""Run folders of the command line: settings, data and weights together, read without running code.

``run.pt`` holds the settings and the description of the data as plain values, and the weights; the
pair is built again by :mod:`vadd_pyro.zoo`, and the data read again by their loader and compared
by checksum.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from vadd_pyro import data as loaders
from vadd_pyro import zoo
from vadd_pyro.checkpoints import load_checkpoint, read_json, save_checkpoint
from vadd_pyro.data import DataSet
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.experiments.settings import Settings
from vadd_pyro.models import MixtureOfNormals
from vadd_pyro.nn.networks import make_networks
from vadd_pyro.process import MaskingProcess
from vadd_pyro.refitting import check_fit
from vadd_pyro.runs import FILE, restore, state_of
from vadd_pyro.weights import NamedParameters, Weights

__all__ = [
    "Experiment",
    "build",
    "check_folder",
    "data_of",
    "is_experiment",
    "load",
    "load_data",
    "load_settings",
    "mixture_of",
    "replace_prior",
    "save",
]

_PATH = {"mnist": "folder", "cifar10": "folder", "hub": "dataset"}  # elsewhere "path"
_LOADERS = {"text": "characters"}


@dataclass(frozen=True)
class Experiment:
    """A trained pair with its data.

    Args:
        settings: how it was trained.
        data: what on.
        model, guide: the pair.
        process: its forward process.
        seconds: training time of each stage.
    """

    settings: Settings
    data: DataSet
    model: Any
    guide: Any
    process: MaskingProcess
    seconds: dict[str, float]

    @property
    def title(self) -> str:
        """What reports call it."""
        return f"{self.data.name}, {self.settings.title}"


def load_data(settings: Settings, path: str | None = None) -> DataSet:
    """Read the data of settings.

    Args:
        settings: says which loader, and its arguments.
        path: where the data are now, if they have moved.

    Raises:
        ValueError: for arguments that the loader does not know; whatever it raises itself.
    """
    loader = getattr(loaders, _LOADERS.get(settings.data, settings.data))
    arguments = dict(settings.data_options)
    place = settings.path if path is None else str(Path(path).expanduser().absolute())
    if place is not None:
        if settings.data == "digits":
            raise ValueError(f"digits come with scikit-learn and are read from no path: {place!r}")
        arguments[_PATH.get(settings.data, "path")] = place
    elif settings.data in ("table", "hub"):
        raise ValueError(f"path must say which {settings.data} to read, got None")
    try:
        found: DataSet = loader(**arguments)
    except TypeError as error:
        raise ValueError(f"data_options do not fit {settings.data}: {error}") from error
    return found


def build(settings: Settings, data: DataSet, device: str | None = None) -> zoo.Pair:
    """An untrained pair, a function of the settings and their seed.

    Args:
        settings: names and sizes.
        data: gives vocabulary size, length and shape of pictures.
        device: where it is to be.

    Raises:
        ValueError: for parts that do not fit; for a prior or guide of the user's own whose
        parameters could not be kept.
    """
    process = data.process()
    sizes = dict(settings.sizes)
    if settings.backbone in ("pixel", "unet"):
        if data.shape is None:
            raise ValueError(
                f"backbone {settings.backbone!r} needs pictures, and {data.name} has none"
            )
        colour = len(data.shape) == 3
        sizes = {"shape": data.shape[-2:], "channels": data.shape[0] if colour else 1, **sizes}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        try:
            networks = make_networks(settings.backbone, process, **sizes)
        except TypeError as error:
            raise ValueError(
                f"sizes do not fit backbone {settings.backbone!r}: {error}"
            ) from error
        pair = zoo.build(
            "none" if settings.model == "mdm" else settings.prior,
            "auto" if settings.model == "mdm" else settings.guide,
            process,
            latent_dim=settings.latent_dim,
            num_codes=settings.num_codes,
            networks=networks,
            least_time=settings.least_time,
        )
        _check_kept(pair, MaskedDiffusionELBO(process), data.rows("train", 1))
        if settings.refits_prior:
            check_fit(pair.model, process, (len(data.train), len(data.valid)))
    if device is not None:
        pair.model.to(device)
        pair.guide.to(device)
    return pair


def mixture_of(num_components: int, latent_dim: int) -> MixtureOfNormals:
    """A mixture whose weights are about to be read; torch's random state stays as it is."""
    with torch.random.fork_rng():
        return MixtureOfNormals(latent_dim, num_components)


def replace_prior(pair: zoo.Pair, prior: MixtureOfNormals) -> None:
    """Give a model, and its guide that is told relative to the prior, another one."""
    place = next(iter(pair.guide.parameters())).device
    pair.model.prior = pair.guide.prior = prior.to(place)


def _check_kept(pair: zoo.Pair, elbo: MaskedDiffusionELBO, row: Tensor) -> None:
    """Check that all that is trained belongs to modules, which a run folder keeps."""
    if not isinstance(pair.guide, nn.Module):
        raise ValueError(
            f"guide {pair.guide!r} is a function: make it a torch module, such as a "
            "vadd_pyro.Program, so that its weights can be kept"
        )
    outside = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    try:
        with torch.no_grad(), NamedParameters() as found:
            elbo.loss(pair.model, pair.guide, row)
        weights = Weights(pair.model, pair.guide)
        weights.add_from_store(found.found)
    finally:
        pyro.get_param_store().set_state(outside)
    stored = [name for name in weights.named if name.startswith("store.")]
    if stored:
        raise ValueError(
            f"the parameters {', '.join(n.removeprefix('store.') for n in stored)} live in Pyro's "
            "store, which a run folder does not keep: make the prior or guide a torch module that "
            "holds them"
        )


def save(
    folder: str | Path,
    settings: Settings,
    data: DataSet,
    model: Any,
    guide: Any,
    seconds: dict[str, float],
) -> Experiment:
    """Write ``run.pt`` whole, and return what it holds."""
    content: dict[str, Any] = {
        "settings": settings.to_dict(),
        "data": data.describe(),
        "seconds": seconds,
        "model": state_of(model),
        "guide": state_of(guide),
    }
    if settings.refits_prior:
        content["mixture"] = list(model.prior.z_loc.shape)
    save_checkpoint(Path(folder) / FILE, content)
    return Experiment(settings, data, model, guide, data.process(), seconds)


def load_settings(folder: str | Path) -> dict[str, Any] | None:
    """Settings of a run that was begun in a folder; None if none was."""
    path = Path(folder) / "settings.json"
    return read_json(path) if path.exists() else None


def check_folder(settings: Settings, folder: str | Path) -> bool:
    """Check that a folder can take a run; returns whether the run was begun there before.

    Raises:
        ValueError: if it holds a run with other settings, naming them. Where the data lie may
        change: their checksum is compared instead.
    """
    done = load_settings(folder)
    if done is None:
        return False
    differing = [name for name in settings.differing(done) if name != "path"]
    if differing:
        raise ValueError(
            f"{folder} holds a run with other settings: {', '.join(differing)}; name another "
            "folder"
        )
    return True


def is_experiment(folder: str | Path) -> bool:
    """Whether a folder's ``run.pt`` was written by :func:`save`."""
    return "settings" in load_checkpoint(Path(folder) / FILE)


def _content(folder: str | Path) -> dict[str, Any]:
    """What ``run.pt`` holds, checked."""
    file = Path(folder) / FILE
    content = load_checkpoint(file)
    parts = ("settings", "data", "seconds", "model", "guide")
    missing = [name for name in parts if not isinstance(content.get(name), dict)]
    if missing:
        raise ValueError(
            f"{file} was not written by vadd-pyro train: it lacks {', '.join(missing)}"
        )
    return content


def data_of(folder: str | Path) -> dict[str, Any]:
    """What the ``run.pt`` in a folder says of its data, with the loader's ``"data"`` name."""
    content = _content(folder)
    return {**content["data"], "data": content["settings"].get("data")}


def load(folder: str | Path, path: str | None = None, device: str | None = None) -> Experiment:
    """Read a trained pair and its data.

    Args:
        folder: the run folder.
        path: where the data are now, if they have moved.
        device: where the pair is to be.

    Raises:
        FileNotFoundError: if there is no run in the folder.
        ValueError: naming the file, if it is damaged or of another kind; if the data are others.
    """
    file = Path(folder) / FILE
    content = _content(folder)
    settings = Settings.from_dict(content["settings"])
    data = load_data(settings, path)
    data.check_same(content["data"])
    pair = build(settings, data, device)
    if settings.refits_prior:
        replace_prior(pair, mixture_of(*content["mixture"]))
    # A guide that was refitted may hold a prior of its own beside the model's.
    guide = copy.deepcopy(pair.guide)
    restore(pair.model, content["model"], file, "model")
    restore(guide, content["guide"], file, "guide")
    return Experiment(settings, data, pair.model, guide, data.process(), content["seconds"])
