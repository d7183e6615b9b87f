"""The page of an inspection: HTML that stands on its own beside its figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from vadd_pyro.inspection.verdicts import Verdict

__all__ = ["Section", "page"]

_WORDS = {"good": "good", "warning": "look here", "bad": "problem", "note": "note"}
_MARKS = {"good": "✓", "warning": "!", "bad": "✗", "note": "i"}
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; border: 1px solid #e4e4e4; }
figcaption { color: #444; font-size: .92rem; max-width: 50rem; }
p.verdict { margin: .3rem 0; padding: .35rem .7rem; border-left: .35rem solid;
  background: #f6f6f6; }
.good { border-color: #0072b2 !important; }
.warning { border-color: #e69f00 !important; }
.bad { border-color: #d55e00 !important; }
.note { border-color: #999 !important; }
.mark { font-weight: 700; }
ul { padding-left: 1.2rem; } li { margin: .15rem 0; }
.small { color: #555; font-size: .9rem; }
"""


class Section(NamedTuple):
    """One question, its answer, and the figures behind it.

    Args:
        title: the question.
        verdicts: the answers.
        figures: pairs of a file's name and a caption that says how to read it.
    """

    title: str
    verdicts: list[Verdict]
    figures: list[tuple[str, str]]


def _line(verdict: Verdict, before: str = "") -> str:
    mark, word = _MARKS[verdict.level], _WORDS[verdict.level]
    said = f'{before}<span class="mark">{mark} {word}</span>: {escape(verdict.text)}'
    return f'<p class="verdict {verdict.level}">{said}</p>'


def _link(place: int, section: Section) -> str:
    return f'<a href="#question-{place}">{escape(section.title)}</a> '


def page(title: str, intro: str, sections: Sequence[Section], facts: Sequence[str]) -> str:
    """The whole page as text.

    Args:
        title: heading.
        intro: a sentence or two under it.
        sections: in order.
        facts: lines at the foot: seeds, numbers of draws, versions, seconds.
    """
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(intro)}</p>",
    ]
    for place, section in enumerate(sections):
        parts += [_line(verdict, _link(place, section)) for verdict in section.verdicts]
    for place, section in enumerate(sections):
        parts.append(f'<h2 id="question-{place}">{escape(section.title)}</h2>')
        parts += [_line(verdict) for verdict in section.verdicts]
        for name, caption in section.figures:
            parts.append(
                f'<figure><img src="{escape(name)}" alt="{escape(section.title)}">'
                f"<figcaption>{escape(caption)}</figcaption></figure>"
            )
    parts.append('<h2>How this was made</h2><ul class="small">')
    parts += [f"<li>{escape(fact)}</li>" for fact in facts]
    parts.append("</ul></body></html>")
    return "\n".join(parts) + "\n"
