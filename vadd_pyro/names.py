"""All that is known by a name, as plain text, and what else a name may lead to.

Nothing here needs torch, so that the command line can print its help and refuse a name at once.

A prior or guide is named in one of three ways: a name of the tables below; an import path
``package.module:Attribute``; or the name of an entry point of the group ``vadd_pyro.priors`` or
``vadd_pyro.guides``.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = [
    "BACKBONES",
    "DATA_SETS",
    "GUIDES",
    "KNOWN_LAWS",
    "MODELS",
    "OBJECTIVES",
    "PRECISIONS",
    "PRESETS",
    "PRIORS",
    "TIMES",
    "TIME_GRIDS",
    "TOYS",
    "check",
    "check_preset",
    "list_names",
    "resolve",
]

TOYS = (
    "checkerboard",
    "circles",
    "eight_modes",
    "moons",
    "pinwheel",
    "swiss_roll",
    "swiss_roll_es",
    "two_spirals",
)
KNOWN_LAWS = (*TOYS, "d1", "d2", "tied_bits")
# Presets of each data set.
PRESETS = {
    "digits": ("laptop",),
    "mnist": ("laptop", "paper"),
    "cifar10": ("laptop", "paper"),
    "text8": ("laptop", "paper"),
    "text": ("laptop", "paper"),
    "table": ("laptop",),
    "hub": ("laptop", "lm1b", "openwebtext"),
}
DATA_SETS = tuple(PRESETS)
MODELS = ("vadd", "mdm")
BACKBONES = ("mlp", "residual", "pixel", "unet", "transformer")
PRECISIONS = ("float32", "bfloat16")
TIME_GRIDS = ("equal", "best")
PRIORS = {
    "none": "MDM (no latent)",
    "standard_normal": "N(0, I)",
    "learned_normal": "learned normal",
    "conditional_normal": "normal given x_t",
    "mixture": "mixture of 32 normals",
    "conditional_mixture": "mixture given x_t",
    "vamp": "VampPrior",
    "flow": "flow",
    "conditional_flow": "flow given x_t",
    "hierarchical": "hierarchy of 2",
    "student_t": "Student t",
    "laplace": "Laplace",
    "spherical": "sphere",
    "categorical": "codes",
    "conditional_categorical": "codes given x_t",
    "product": "product of codes",
    "product_one_hot": "product, one-hot",
    "chain": "chain of codes",
    "conditional_chain": "chain of codes given x_t",
}
GUIDES = {
    "auto": "the family that fits",
    "mean_field": "mean-field normal",
    "low_rank": "low-rank normal",
    "full": "full-covariance normal",
    "mixture": "mixture of normals",
    "flow": "flow",
    "semi_amortized": "semi-amortised normal",
    "relative": "normal relative to the prior",
    "hierarchical": "top-down hierarchy",
    "bottom_up": "bottom-up hierarchy",
    "spherical": "projected normal",
    "enumerate": "codes, enumerated",
    "score": "codes, score function",
    "straight_through": "codes, straight-through",
    "none": "no guide (summed out)",
}
OBJECTIVES = {
    "delbo": "DELBO",
    "chain": "T-step bounds, T = 1, 2, 4, 8",
    "iwae": "DELBO, 8 importance samples",
    "dreg": "the same, doubly reparameterised",
    "renyi": "DELBO, Renyi alpha 1/2, 8 draws",
    "free_bits": "DELBO, 0.1 nats free a dimension",
    "cyclical": "DELBO, cyclical annealing",
    "no_annealing": "DELBO, KL weight 1 throughout",
}
TIMES = {
    "uniform": "uniform",
    "balanced": "balanced",
    "atom": "a quarter at t = 1, rest balanced",
    "atom_uniform": "30 % at t = 1, rest uniform",
    "grid": "points of 1, 2, 4, 8 steps",
    "few_step": "points of 1, 2, 4, ..., 64 steps",
    "part_targets": "the same, 30 % with targets of their step",
}


def _known(kind: str) -> dict[str, str]:
    return {"priors": PRIORS, "guides": GUIDES, "objectives": OBJECTIVES, "times": TIMES}[kind]


def check(kind: str, name: str) -> None:
    """Check that a name, import path or entry point leads somewhere.

    Args:
        kind: ``"data"`` (of :data:`KNOWN_LAWS`), ``"priors"``, ``"guides"``, ``"objectives"`` or
            ``"times"``.
        name: the name.

    Raises:
        ValueError: listing the known names, or saying why a path cannot be imported.
    """
    if kind == "data":
        if name not in KNOWN_LAWS:
            raise ValueError(f"data must be among {', '.join(KNOWN_LAWS)}, got {name!r}")
        return
    known = _known(kind)
    if name in known:
        return
    if kind in ("priors", "guides"):
        resolve(kind, name)
        return
    raise ValueError(f"unknown {kind}: {name!r}; expected one of {', '.join(known)}")


def check_preset(data: str, name: str) -> None:
    """Check that a data set has a preset.

    Raises:
        ValueError: for a name that is not known, listing those that are.
    """
    if data not in PRESETS:
        raise ValueError(f"data must be one of {', '.join(PRESETS)}, got {data!r}")
    if name not in PRESETS[data]:
        raise ValueError(f"{data} has the presets {', '.join(PRESETS[data])}, got {name!r}")


def list_names() -> str:
    """All known names of data, priors, guides, objectives and times, as text."""
    lines = ["data: " + ", ".join(KNOWN_LAWS)]
    for kind in ("priors", "guides", "objectives", "times"):
        labels = [f"  {name:<26} {label}" for name, label in _known(kind).items()]
        lines += ["", f"{kind}:", *labels]
    return "\n".join(lines)


def resolve(kind: str, name: str) -> Any:
    """What an import path or an entry point leads to.

    Args:
        kind: ``"priors"`` or ``"guides"``.
        name: the path, or the name of the entry point.

    Raises:
        ValueError: if it leads nowhere, or what it names cannot be imported.
    """
    if ":" not in name:
        from importlib.metadata import entry_points

        for point in entry_points(group=f"vadd_pyro.{kind}"):
            if point.name == name:
                try:
                    return point.load()
                except Exception as error:  # whatever the user's module raises
                    raise ValueError(_not_imported(kind, name, error)) from error
        raise ValueError(
            f"unknown {kind}: {name!r}; expected one of {', '.join(_known(kind))}, an entry point "
            f"of the group vadd_pyro.{kind}, or an import path package.module:Attribute"
        )
    module_name, _, attribute = name.partition(":")
    if not module_name.strip(".") or not attribute:
        raise ValueError(f"{kind}: {name!r} is no import path package.module:Attribute")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # a file beside the user, also under the script
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises
        raise ValueError(_not_imported(kind, name, error)) from error
    if not callable(found):
        raise ValueError(f"{kind}: {name!r} is {found!r}, expected a class or a function")
    return found


def _not_imported(kind: str, name: str, error: Exception) -> str:
    return f"{kind}: {name!r} cannot be imported: {type(error).__name__}: {error}"
