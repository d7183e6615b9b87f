"""What a training run of the command line is made of, in plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vadd_pyro.names import BACKBONES, DATA_SETS, MODELS, PRECISIONS, PRIORS, check
from vadd_pyro.process import check_size, check_time

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """A training run, in plain values.

    Args:
        data: one of :data:`vadd_pyro.names.DATA_SETS`.
        path: file or folder of the data; None for the loader's default.
        data_options: further arguments of the loader.
        model: ``"vadd"`` or ``"mdm"``, the same networks without a latent.
        prior, guide: names, import paths or entry points (:mod:`vadd_pyro.names`); ignored for
            ``"mdm"``.
        latent_dim: size of a continuous latent.
        num_codes: number of codes of a categorical one.
        least_time: steps from earlier times have no latent (:class:`vadd_pyro.models.VADD`);
            needs the guide ``"relative"``, or a latent that is summed out.
        backbone: ``"mlp"``, ``"residual"``, ``"pixel"``, ``"unet"`` or ``"transformer"``.
        sizes: arguments of its networks, see :mod:`vadd_pyro.nn.networks`.
        times: where training looks, a key of :data:`vadd_pyro.names.TIMES`; ``"part_targets"``
            takes the states that samplers of ``steps`` pass through.
        num_iterations: updates by the DELBO.
        num_chain_iterations: updates by the T-step bounds of ``steps`` after these, which train
            model and guide on the targets that samplers meet.
        refit_prior: before those of the guide, put a mixture of normals that is fitted to the
            posteriors in the prior's place (:func:`vadd_pyro.fit_prior`); needs ``least_time = 1``
            and the guide ``"relative"``. Ignored for ``"mdm"``.
        num_guide_iterations: updates of the guide alone by the same bounds at the end, the model
            held fixed.
        steps: numbers of steps ``T`` of these bounds; one named twice is drawn twice as often.
        batch_size: rows per update.
        learning_rate: step size of Adam, decayed to zero by a cosine; half of it after the first
            stage.
        warmup: updates of linear warm-up.
        weight_decay: of AdamW.
        ema_decay: of the average of weights.
        annealing: share of the updates over which the weight of the KL grows to one.
        free_bits: nats of each latent dimension that cost nothing in the first stage, against
            collapse.
        precision: ``"float32"``, or ``"bfloat16"`` for networks under autocast.
        compile: run each update as one compiled graph, as :func:`vadd_pyro.fit` does on request;
            those of the guide of a refitted prior are run by the programs.
        seed: of weights, masks and the order of the data.

    Raises:
        ValueError: for values out of range, naming them.
    """

    data: str
    path: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "vadd"
    prior: str = "conditional_normal"
    guide: str = "auto"
    latent_dim: int = 16
    num_codes: int = 64
    least_time: float = 0.0
    backbone: str = "residual"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    times: str = "few_step"
    num_iterations: int = 3000
    num_chain_iterations: int = 0
    refit_prior: bool = False
    num_guide_iterations: int = 600
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    annealing: float = 0.2
    free_bits: float = 0.0
    precision: str = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("data", DATA_SETS),
            ("model", MODELS),
            ("backbone", BACKBONES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        for name in ("compile", "refit_prior"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("prior", "guide", "times"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a name, got {getattr(self, name)!r}")
        for name in ("sizes", "data_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping, got {getattr(self, name)!r}")
        for name in ("learning_rate", "weight_decay", "ema_decay", "annealing", "free_bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not isinstance(self.steps, tuple | list):
            raise ValueError(f"steps must be several numbers of steps, got {self.steps!r}")
        check("priors", self.prior)
        check("guides", self.guide)
        check("times", self.times)
        check_time("least_time", self.least_time)
        if self.refits_prior and (self.least_time < 1 or self.guide != "relative"):
            raise ValueError(
                "refit_prior needs least_time = 1, for posteriors are looked at in the first step "
                "alone, and guide 'relative', which takes another prior as it is; got least_time "
                f"= {self.least_time} and guide {self.guide!r}"
            )
        for name in ("latent_dim", "num_codes", "num_iterations", "batch_size"):
            check_size(name, getattr(self, name))
        for name in ("num_chain_iterations", "num_guide_iterations", "warmup", "seed"):
            check_size(name, getattr(self, name), least=0)
        if not self.steps:
            raise ValueError("steps must hold at least one number of steps, got none")
        for num_steps in self.steps:
            check_size("steps", num_steps)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay!r}")
        if not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in (0, 1), got {self.ema_decay!r}")
        if not 0 <= self.annealing <= 1:
            raise ValueError(f"annealing must be a share in [0, 1], got {self.annealing!r}")
        if not 0 <= self.free_bits < math.inf:
            raise ValueError(f"free_bits must not be negative, got {self.free_bits!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint keeps them: sequences are lists."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """What :meth:`to_dict` gave.

        Raises:
            ValueError: for names that are none of its own.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"settings have no {', '.join(unknown)}: expected {sorted(known)}")
        if "data" not in values:
            raise ValueError(f"settings must say what data, got {sorted(values)}")
        return cls(**{**values, "steps": tuple(values.get("steps", cls.steps))})

    def differing(self, other: Mapping[str, Any]) -> list[str]:
        """Names of the settings that differ from stored ones."""
        own = self.to_dict()
        # What did not exist yet when a run was made was as it is now by default.
        unsaid = {"compile": False, "free_bits": 0.0, "least_time": 0.0, "refit_prior": False}
        known = {**unsaid, **other}
        return [name for name in own if own[name] != known.get(name, object())]

    @property
    def refits_prior(self) -> bool:
        """Whether there is a prior, and it is fitted to the posteriors in the end."""
        return self.refit_prior and self.model == "vadd"

    @property
    def title(self) -> str:
        """What tables and figures call the model."""
        if self.model == "mdm":
            return "MDM"
        prior = PRIORS.get(self.prior, self.prior)
        return f"VADD, {prior} refitted" if self.refit_prior else f"VADD, {prior}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
