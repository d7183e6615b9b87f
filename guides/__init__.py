"""Amortised guides: what infers the latents of a step program."""

from vadd_pyro.guides.none import NoLatent
from vadd_pyro.guides.normal import AmortizedNormal

__all__ = ["AmortizedNormal", "NoLatent"]
