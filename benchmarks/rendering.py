"""What the benchmarks found, as tables of ``docs/performance.md``.

Each function takes what a benchmark wrote, with the conditions that the suite adds, and returns
Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from common import SIZES, TARGETS, Size
from pages import table

__all__ = ["RENDER", "keep_numpyro"]

Record = dict[str, Any]


def caption(record: Record, rounds: str = "medians of {rounds} alternated rounds") -> str:
    """Under what conditions a table was measured."""
    known = record["conditions"]
    told = rounds.format(rounds=record.get("rounds"))
    if record.get("rounds") == 1:
        told = "a single round"
    device = f"{record['device']}; " if "device" in record else ""
    return (
        f"*{known['date']}: {device}{known['processor']}, {known['cores']} cores; torch "
        f"{known['torch']}, Pyro {known['pyro']}, Python {known['python']}; {told}; load average "
        f"{known['load']:.2f} when it began.*"
    )


def ratio(value: float | None, target: float | None = None) -> str:
    """A ratio with its target in brackets."""
    if value is None:
        return "-"
    told = f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"
    return told if target is None else f"{told} ({target:.2f})"


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


# ------------------------------------------------------------------------------------- NumPyro


def keep_numpyro(new: Record, old: Record | None, group: str, base: str) -> None:
    """Where NumPyro did not take part, hold on to the ratios of the last time it did.

    Args:
        new: what was found now; ``numpyro_from`` is added.
        old: what was found before.
        group, base: where seconds are, and of which variant ratios are told.
    """
    if old is None or any("numpyro" in seconds for seconds in new[group].values()):
        return
    before = {k: s["numpyro"] / s[base] for k, s in old[group].items() if "numpyro" in s}
    kept = {"date": old["conditions"]["date"], "ratios": before} if before else None
    kept = kept or old.get("numpyro_from")
    if kept is not None:
        new["numpyro_from"] = kept


def numpyro_ratio(record: Record, seconds: dict[str, float], key: str, base: str) -> float | None:
    """NumPyro's ratio, of this run or kept from an earlier one."""
    if "numpyro" in seconds:
        return seconds["numpyro"] / seconds[base]
    return record.get("numpyro_from", {}).get("ratios", {}).get(key)


def numpyro_note(record: Record, group: str) -> str:
    """What to say of NumPyro's column where it did not take part."""
    if any("numpyro" in seconds for seconds in record[group].values()):
        return ""
    if "numpyro_from" in record:
        date = record["numpyro_from"]["date"]
        return f"\n\nNumPyro was not installed: its column is that of {date}."
    return "\n\nNumPyro was not installed, so that its column is empty."


# --------------------------------------------------------------------------------------- tables


def describe(size: Size) -> str:
    """Sizes in words."""
    network = f"MLP 3 x {size.hidden_dim}"
    if size.network == "transformer":
        network = f"transformer 2 x {size.hidden_dim}"
    return f"D {size.length}, K {size.vocab_size}, batch {size.batch_size}, {network}"


def speed(record: Record) -> str:
    """Training steps."""
    rows = []
    for name, seconds in record["training"].items():
        base = seconds["yardstick"]
        user, package, graph = TARGETS[name]
        other = numpyro_ratio(record, seconds, name, "yardstick")
        shown = [
            (name, describe(SIZES[name]), milliseconds(base), seconds["yardstick compiled"], "")
        ]
        if "compiled dropping" in seconds:
            shown.append((f"{name}, `drop_empty_rows`", "", "", None, " dropping"))
        for called, words, by_hand, by_compiler, suffix in shown:
            compiled = seconds[f"compiled{suffix}"] / base
            half = seconds.get(f"compiled bfloat16{suffix}")  # older records have none
            products = seconds.get(f"products{suffix}")
            rows.append(
                [
                    called,
                    words,
                    by_hand,
                    "" if by_compiler is None else ratio(by_compiler / base),
                    ratio(seconds[f"user{suffix}"] / base, user),
                    ratio(seconds[f"package{suffix}"] / base, package),
                    ratio(compiled, graph),
                    "" if products is None else ratio(products / base),
                    "" if suffix else ratio(other),
                    ratio(None if other is None else compiled / other),
                    ratio(None if half is None else half / base),
                ]
            )
    head = ["size", "", "by hand, ms", "by hand, `torch.compile`", "user model (target)"]
    head += ["package (target)", "package, one graph (target)", "its products alone"]
    head += ["NumPyro, jit", "one graph / NumPyro", "one graph, bfloat16"]
    note = numpyro_note(record, "training")
    return f"{caption(record)}\n\n{table(head, rows)}{note}"


def sampling(record: Record) -> str:
    """Samplers: throughput by steps, ratios by steps, and all variants."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for key, seconds in record["seconds"].items():
        name, steps = key.rsplit("/", 1)
        found.setdefault(name, {})[int(steps)] = seconds
    steps = sorted({s for each in found.values() for s in each})
    head = ["size", "rows", *(f"{s} step{'s' * (s > 1)}" for s in steps)]

    def by_steps(cell: Any) -> str:
        rows = [
            [name, f"{record['rows'][name]:,}", *(cell(name, each[s]) for s in steps)]
            for name, each in found.items()
        ]
        return table(head, rows)

    speeds = by_steps(lambda name, s: f"{record['rows'][name] / s['package']:,.0f}")
    ratios = by_steps(lambda name, s: ratio(s["package"] / s["naive"]))
    kinds = ("naive compiled", "package", "compiled")
    names = ("naive, compiled", "package", "package, compiled")
    rows = []
    for name, each in found.items():
        for number in (s for s in (1, 10) if s in each):
            seconds = each[number]
            base = seconds["naive"]
            cells = [ratio(seconds[k] / base if k in seconds else None) for k in kinds]
            other = numpyro_ratio(record, seconds, f"{name}/{number}", "naive")
            rows.append([name, number, milliseconds(base), *cells, ratio(other)])
    every = table(
        ["size", "steps", "naive, ms", *names, "NumPyro, jit"],
        rows,
    )
    return (
        f"{caption(record)}\n\nRows a second of `sample`:\n\n{speeds}\n\nTime of `sample`, "
        f"relative to the naive sampler:\n\n{ratios}\n\nAll variants, relative to the naive "
        f"sampler:\n\n{every}{numpyro_note(record, 'seconds')}"
    )


def growth(record: Record) -> str:
    """Time over one size after another."""
    from growth import LETTERS, slope

    training, chains = [], []
    for factor, found in record["factors"].items():
        values, seconds = found["values"], found["seconds"]
        steepest = {name: slope(values, column) for name, column in seconds.items()}
        for i, value in enumerate(values):
            last = i == len(values) - 1
            at = {name: column[i] for name, column in seconds.items()}
            if factor == "steps":
                chains.append(
                    [
                        value,
                        milliseconds(at["naive"]),
                        ratio(at["sample"] / at["naive"]),
                        milliseconds(at["bound"]),
                        f"{steepest['sample']:.2f}, {steepest['bound']:.2f}" if last else "",
                    ]
                )
                continue
            graph = at["compiled"] / at["hand"] if "compiled" in at else None
            told = ", ".join(f"{exponent:.2f}" for exponent in steepest.values())
            training.append(
                [
                    f"{factor}, {LETTERS[factor]}" if i == 0 else "",
                    value,
                    milliseconds(at["hand"]),
                    ratio(at["package"] / at["hand"]),
                    ratio(graph),
                    told if last else "",
                ]
            )
    head = ["", "value", "by hand, ms", "package", "package, one graph", "slopes at the end"]
    parts = [caption(record)]
    if training:
        parts.append(table(head, training))
    if chains:
        head = ["T", "naive sampler, ms", "`sample`, relative", "T-step bound, ms"]
        parts.append(table([*head, "slopes at the end: `sample`, bound"], chains))
    return "\n\n".join(parts)


def memory(record: Record) -> str:
    """Fits of the peak, and what the usual distribution holds."""
    rows = []
    usual = {row["decoder"]: row for row in record.get("usual", [])}
    for name, found in record["fits"].items():
        cells = [f"{found[key]:,.0f}" for key in ("constant", "per_row", "per_position")]
        other = usual.get(name)
        tensors = "-"
        if other is not None:
            size = 4 * other["batch_size"] * other["length"] * other["vocab_size"]
            own = next(
                row
                for row in record["steps"]
                if all(row[k] == other[k] for k in ("decoder", "batch_size", "length"))
                and row["vocab_size"] == other["vocab_size"]
            )
            tensors = f"{own['peak'] / size:.2f} / {other['peak'] / size:.2f}"
        error = f"{100 * found['worst_relative_error']:.2f} %"
        rows.append([name, *cells, f"{found['per_logit'] / 4:.2f}", error, tensors])
    head = ["network", "a, bytes", "b", "c", "d / 4", "worst error of the fit"]
    head += ["largest step: peak in tensors of logits, package / usual"]
    return f"{caption(record, 'one pass: bytes do not vary')}\n\n{table(head, rows)}"


def start(record: Record) -> str:
    """Fresh interpreters."""
    rows = []
    for name, seconds in record["seconds"].items():
        ratios = record["ratios"][name]
        rows.append(
            [
                f"`{name}`" if name not in ("python", "usual names") else name,
                f"{seconds['processor']:.2f}",
                ratio(ratios["processor"]),
                f"{seconds['wall']:.2f}",
                ratio(ratios["wall"]),
            ]
        )
    head = ["", "processor time, s", "ratio", "wall time, s", "ratio"]
    return f"{caption(record)}\n\n{table(head, rows)}"


def processes(record: Record) -> str:
    """One process and several."""
    rows = []
    for name, found in record["sizes"].items():
        cells = []
        for kind in ("same", "full", "apart"):
            if f"{kind}_clock_rate" not in found:  # older records have none apart
                cells.append("-")
                continue
            clock, processor = (
                found[f"{kind}_{c}_rate"] / found[f"one_{c}_rate"] for c in ("clock", "processor")
            )
            cells.append(f"{clock:.2f} ({processor:.2f})")
        rows.append(
            [
                name,
                found["batch_size"],
                f"{found['megabytes']:.1f}",
                f"{found['all_reduce_ms']:.1f}",
                f"{found['exchange_ms']:.1f}",
                f"{found['one_clock_ms']:.1f}",
                f"{found['one_clock_rate']:,.0f}",
                *cells,
            ]
        )
    number = record["processes"]
    head = [
        "size",
        "batch",
        "gradient, MB",
        "all-reduce, ms",
        "sum, ms",
        "1 process, ms",
        "rows/s",
    ]
    head += [f"{number} processes, same batch", f"{number} processes, full batches"]
    head += [f"{number} processes apart"]
    return f"{caption(record)}\n\n{table(head, rows)}"


def gpu(record: Record | None) -> str:
    """Training steps on a GPU."""
    if record is None:
        return "Not measured here: no CUDA device was at hand."
    rows: list[Sequence[Any]] = []
    for name, found in record["sizes"].items():
        base = found["seconds"]["hand"]
        seconds = found["seconds"]
        cells = [
            ratio(seconds[k] / base if k in seconds else None) for k in ("package", "compiled")
        ]
        used = ["-"] * 2
        if found["utilisation"] is not None:
            used = [f"{100 * found['utilisation'][k]:.1f} %" for k in ("hand", "best")]
        rows.append([name, found["what"], milliseconds(base), *cells, *used])
    head = ["size", "", "by hand, ms", "package", "package, one graph"]
    head += ["MFU by hand", "MFU, best of the package"]
    return f"{caption(record)}\n\n{record['peak']}\n\n{table(head, rows)}"


RENDER = {
    "speed": speed,
    "sampling": sampling,
    "growth": growth,
    "memory": memory,
    "start": start,
    "processes": processes,
    "gpu": gpu,
}
