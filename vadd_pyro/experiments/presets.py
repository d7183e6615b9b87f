"""Sizes and schedules by name: what a run takes that its command line does not say.

``laptop`` presets train in minutes on two cores (MNIST's in 40) and were chosen on validation
rows, but for those of cifar10 and of hub sets, which were not run. ``paper`` presets have the
sizes and schedules of published models and need a GPU: they follow the texts, and were not run
here.

References:
    Xie et al. 2025 (arXiv 2505.17384) for pixels and text; Sahoo et al. 2024 (arXiv 2406.07524)
    for the small transformer (12 layers of 768) on LM1B and OpenWebText.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vadd_pyro.experiments.settings import Settings
from vadd_pyro.names import check_preset

__all__ = ["PRESETS", "measures", "preset"]

_TABLE: dict[str, Any] = {
    "backbone": "residual",
    "prior": "conditional_categorical",
    "sizes": {"hidden_dim": 256, "num_blocks": 2, "dropout": 0.1, "latent_hidden_dim": 64},
    "times": "balanced",
    "num_iterations": 3000,
    "num_guide_iterations": 600,
    "steps": (1, 2, 4, 8, 16),
}
_IMAGES: dict[str, Any] = {
    "backbone": "pixel",
    "prior": "standard_normal",
    "guide": "relative",
    "latent_dim": 32,
    "sizes": {"hidden_dim": 512, "num_blocks": 3, "dropout": 0.1, "local_dim": 16},
    "times": "part_targets",
    "num_iterations": 14_000,
    "num_chain_iterations": 3000,
    "num_guide_iterations": 800,
    "steps": (1, 2, 4, 8, 16, 32, 64),
    "warmup": 200,
    "precision": "bfloat16",
}
_TEXT: dict[str, Any] = {
    "backbone": "transformer",
    # What letters that are written together owe each other is between neighbours: one code or
    # vector for the row can say little of it, a code at each position does (docs/real_data.md).
    "prior": "conditional_chain",
    "num_codes": 32,
    "latent_dim": 32,  # of continuous priors
    "sizes": {"hidden_dim": 128, "num_layers": 2, "num_heads": 4, "latent_hidden_dim": 32},
    "times": "uniform",
    "num_iterations": 3000,
    "precision": "bfloat16",
    "steps": (1, 2, 4, 8, 16, 32),
    "batch_size": 64,
    "data_options": {"length": 64},
}
_PAPER_TEXT: dict[str, Any] = {
    "backbone": "transformer",
    "prior": "standard_normal",
    "guide": "auto",
    "latent_dim": 128,
    "sizes": {"hidden_dim": 768, "num_layers": 12, "num_heads": 12, "dropout": 0.1},
    "times": "uniform",
    "num_iterations": 1_000_000,
    "num_guide_iterations": 10_000,
    "steps": (1, 2, 4, 8, 16, 32, 64, 128),
    "batch_size": 512,
    "learning_rate": 3e-4,
    "warmup": 2500,
    "ema_decay": 0.9999,
    "precision": "bfloat16",
}
_PAPER_PIXELS: dict[str, Any] = {
    "backbone": "unet",
    "prior": "standard_normal",
    "guide": "auto",
    "latent_dim": 128,
    "sizes": {"hidden_dim": 128, "multipliers": (1, 2, 2, 2), "num_blocks": 2, "dropout": 0.1},
    "times": "uniform",
    "num_iterations": 500_000,
    "num_guide_iterations": 10_000,
    "steps": (1, 2, 4, 8, 16, 32, 64),
    "batch_size": 256,
    "learning_rate": 2e-4,
    "warmup": 5000,
    "ema_decay": 0.9999,
    "precision": "bfloat16",
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "table": {"laptop": _TABLE},
    "digits": {
        "laptop": {
            **_IMAGES,
            # There are 1,259 pictures to train on. Half as many updates have better bounds from
            # two steps on, and worse samples at any number of steps (docs/real_data.md).
            "latent_dim": 8,
            "sizes": {"hidden_dim": 256, "num_blocks": 2, "dropout": 0.4, "local_dim": 16},
            "least_time": 1.0,
            "refit_prior": True,
            "num_iterations": 1000,
            "num_chain_iterations": 200,
            "num_guide_iterations": 100,
            "precision": "float32",
        }
    },
    "mnist": {
        # N(0, I) helps in the first step alone (docs/real_data.md); chains of many steps are drawn
        # more often, so that a ninth of the rows goes to that step and not a quarter.
        "laptop": {
            **_IMAGES,
            "least_time": 1.0,
            "refit_prior": True,
            "num_iterations": 11_000,
            "num_chain_iterations": 2_200,
            "num_guide_iterations": 400,
            "steps": (1, 2, 4, 8, 16, 32, *(64,) * 14),
        },
        "paper": {**_PAPER_PIXELS, "data_options": {"padded": True}},
    },
    "cifar10": {"laptop": {**_IMAGES, "batch_size": 64}, "paper": _PAPER_PIXELS},
    "text8": {"laptop": _TEXT, "paper": {**_PAPER_TEXT, "data_options": {"length": 256}}},
    "text": {"laptop": _TEXT, "paper": {**_PAPER_TEXT, "data_options": {"length": 256}}},
    "hub": {
        "laptop": {
            **_TEXT,
            # With 50,257 tokens the logits of 16 codes are too many.
            "prior": "standard_normal",
            "guide": "relative",
            "times": "part_targets",
            "data_options": {"length": 128, "tokenizer": "gpt2"},
        },
        "lm1b": {
            **_PAPER_TEXT,
            "path": "lm1b",
            "data_options": {"length": 128, "tokenizer": "bert-base-uncased"},
        },
        "openwebtext": {
            **_PAPER_TEXT,
            "path": "openwebtext",
            "data_options": {"length": 1024, "tokenizer": "gpt2"},
        },
    },
}
_MEASURES: dict[str, dict[str, Any]] = {
    "table": {
        "bound_steps": [1, 2, 4, 8, 16],
        "sample_steps": [1, 2, 4, 8, 16],
        "num_rows": None,
    },
    "digits": {"bound_steps": [1, 2, 4, 8, 16, 64], "num_rows": None, "num_samples": 2000},
    "mnist": {"bound_steps": [1, 2, 4, 8, 16, 64], "one_token_terms": 64, "one_token_rows": 500},
    "cifar10": {"num_rows": 100, "one_token": False},
    "text8": {"bound_steps": [1, 2, 4, 8, 16, 32], "sample_steps": [1, 2, 4, 8, 16, 32]},
    "text": {"bound_steps": [1, 2, 4, 8, 16, 32], "sample_steps": [1, 2, 4, 8, 16, 32]},
    "hub": {"num_rows": 100, "one_token": False},
}


def preset(
    data: str,
    path: str | Path | None = None,
    name: str = "laptop",
    model: str = "vadd",
    *,
    sizes: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Settings:
    """Settings of a preset, some of them replaced.

    Args:
        data: a key of :data:`PRESETS`.
        path: file or folder of the data.
        name: of the preset.
        model: ``"vadd"`` or ``"mdm"``; the preset of a model without latent has uniform times in
            place of those for few steps, and one stage of as many updates as the first two, unless
            their numbers are given.
        sizes, data_options: single ones that are replaced or added; with another ``backbone`` than
            the preset's, the sizes are these alone.
        settings: any other of :class:`Settings`.

    Raises:
        ValueError: for unknown names, listing those that are known.
    """
    check_preset(data, name)
    values = dict(PRESETS[data][name])
    for group, own in (("sizes", sizes), ("data_options", data_options)):
        values[group] = {**values.get(group, {}), **(own or {})}
    if settings.get("backbone", values["backbone"]) != values["backbone"]:
        values["sizes"] = dict(sizes or {})
    if settings.get("prior", values["prior"]) != values["prior"] and "guide" not in settings:
        # The preset's guide fits the preset's prior; one that is refitted needs a relative one.
        values["guide"] = "relative" if settings.get("refit_prior") else "auto"
    if model == "mdm":
        # As the baseline does best: what spares a latent collapse costs it at many steps. It is
        # trained for as many updates.
        if values["times"] in ("part_targets", "few_step"):
            values["times"] = "uniform"
        if not {"num_iterations", "num_chain_iterations"} & set(settings):
            plain: dict[str, Any] = {f.name: f.default for f in fields(Settings)}
            plain |= values
            values["num_iterations"] = plain["num_iterations"] + plain["num_chain_iterations"]
        values["num_chain_iterations"] = 0
    final = {**values, **settings}
    if values.get("refit_prior") and "refit_prior" not in settings:
        values["refit_prior"] = (
            model == "vadd"
            and final["guide"] == "relative"
            and final["least_time"] == 1
            and final["prior"] == PRESETS[data][name]["prior"]
        )
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        raise ValueError(
            f"there is no setting {', '.join(unknown)}: expected some of "
            f"{', '.join(Settings.__dataclass_fields__)}"
        )
    place = values.get("path") if path is None else str(path)
    if place is not None and data != "hub":
        place = str(Path(place).expanduser().absolute())  # runs are read from other folders too
    return Settings(**{**values, **settings, "data": data, "path": place, "model": model})


def measures(data: str) -> dict[str, Any]:
    """What is measured of a data set unless other numbers are asked for: arguments of
    :func:`~vadd_pyro.experiments.evaluation.evaluate`.
    """
    common = {
        "bound_steps": [1, 2, 4, 8, 16],
        "sample_steps": [1, 2, 4, 8, 16],
        "num_rows": 1000,
        "num_particles": 64,
        "num_paths": 1,
        "num_samples": 2000,
        "seed": 0,
    }
    return {**common, **_MEASURES[data]}
