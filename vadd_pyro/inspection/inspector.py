"""Inspect a trained pair: every question of this package asked once, answered on one page.

:func:`inspect_pair` writes a folder with ``report.html``, the figures, ``posterior.nc`` (ArviZ)
and ``inspection.json`` (the numbers behind the verdicts).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadd_pyro._version import __version__
from vadd_pyro.checkpoints import check_writable, write_json, write_whole
from vadd_pyro.inspection.conversion import save_netcdf
from vadd_pyro.inspection.guide_questions import single_rows, trust, writing
from vadd_pyro.inspection.latent_questions import aggregate, coupling, meaning, usage
from vadd_pyro.inspection.page import Section, page
from vadd_pyro.inspection.survey import Survey
from vadd_pyro.inspection.to_arviz import to_arviz
from vadd_pyro.inspection.verdicts import Verdict
from vadd_pyro.process import MaskingProcess, check_size
from vadd_pyro.sampling import seeded

__all__ = ["inspect_pair"]

_ARVIZ_ROWS = 64


def _answered(ask: Callable[[Survey], Section], survey: Survey) -> Section:
    """The answer to a question; what one of them cannot say must not cost the others."""
    try:
        return ask(survey)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        title = (ask.__doc__ or ask.__name__).strip()
        text = f"could not be answered: {type(error).__name__}: {error}"
        return Section(title, [Verdict("note", text, {})], [])


def inspect_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    out: str | Path,
    *,
    title: str = "Inspection of a pair",
    truth: Tensor | None = None,
    num_draws: int = 500,
    num_reference_rows: int = 6,
    seed: int = 0,
    progress: bool = True,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> dict[str, Verdict]:
    """Ask all questions of a trained pair and write the answers to a folder.

    Args:
        model, guide: a step program and its guide, of the zoo or your own.
        process: their forward process.
        x_0: rows of data that the pair was not trained on, ``(N, D)``; 1,000 are plenty, 100 the
            least.
        out: folder for ``report.html``, figures, ``posterior.nc`` and ``inspection.json``.
        title: heading of the report.
        truth: the law of the data, ``(K,) * D``, where it is known.
        num_draws: draws of the posterior of each row.
        num_reference_rows: rows whose posterior is sampled by NUTS and whose guide is refined; the
            most expensive part, about three seconds a row on the toys.
        seed: seed of everything.
        progress: whether to show a progress bar.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        The verdicts, by question.

    Raises:
        ValueError: for too few rows, a folder that cannot be written, or a pair that does not fit.
    """
    from tqdm import tqdm

    check_size("num_draws", num_draws, least=30)
    check_size("num_reference_rows", num_reference_rows, least=3)
    x_0 = process.check_tokens(x_0)
    if len(x_0) < 100:
        raise ValueError(f"x_0 has {len(x_0)} rows: expected at least 100")
    folder = Path(out)
    check_writable(folder / "report.html")
    start = time.perf_counter()
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    with seeded(seed):
        survey = Survey(
            *(model, guide, process, x_0, folder, truth),
            *(num_draws, num_reference_rows, seed, options),
        )
        questions: list[Callable[[Survey], Section]] = [usage, coupling]
        if survey.has_latent:
            questions += [meaning, aggregate, trust]
            if not survey.draws.exact:
                questions.append(single_rows)
        questions.append(writing)
        sections: list[Section] = []
        for ask in tqdm(questions, desc="inspect", disable=not progress):
            sections.append(_answered(ask, survey))
        rows = survey.batch[:_ARVIZ_ROWS]
        data = to_arviz(model, guide, rows, num_draws, seed=seed, log_likelihood=True, **options)
        save_netcdf(data, folder / "posterior.nc")
    found = {
        section.title + (f" ({i + 1})" if i else ""): verdict
        for section in sections
        for i, verdict in enumerate(section.verdicts)
    }
    seconds = time.perf_counter() - start
    numbers = {
        "title": title,
        "verdicts": {name: verdict._asdict() for name, verdict in found.items()},
        "seed": seed,
        "seconds": seconds,
        "vadd_pyro": __version__,
    }
    write_json(folder / "inspection.json", numbers)
    facts = [
        f"{len(x_0)} rows of data, masked anew with seed {seed}; {num_draws} posterior draws of "
        f"each of {len(survey.draws.batch)} rows",
        "what is said of single rows, and of k-hat, is for the state from which samples start, "
        "with everything masked",
        f"ArviZ data of the first {len(rows)} rows: posterior.nc; the "
        "numbers behind the verdicts: inspection.json",
        f"vadd_pyro {__version__}, torch {torch.__version__}, numpy {np.__version__}; "
        f"{seconds:.0f} s",
    ]
    intro = (
        f"Rows of {process.length} tokens from {process.vocab_size} values. Verdicts first, then "
        "each question with its figures."
    )
    text = page(title, intro, sections, facts)
    write_whole(folder / "report.html", lambda file: file.write(text.encode()))
    return found
