"""SIGINT and SIGTERM ask a training run to stop between two updates.

Ctrl-C and a scheduler's notice would otherwise end a process in the midst of an update. While a
:class:`StopRequest` is open, the first of them is noted, for the loop to look at; another Ctrl-C
stops at once. Schedulers repeat themselves: another SIGTERM changes nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopRequest", "terminable"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal.

    Args:
        by: the signal.
        iteration: updates done; None if it was stopped at once, wherever it was.
        checkpoint: the file that holds this state; None if there is none.
    """

    def __init__(
        self, by: signal.Signals, iteration: int | None = None, checkpoint: Path | None = None
    ) -> None:
        self.by, self.iteration, self.checkpoint = by, iteration, checkpoint
        if iteration is None:
            message = f"stopped at once by {by.name}"
        elif checkpoint is None:
            message = f"stopped by {by.name} after iteration {iteration}, without a checkpoint"
        else:
            message = f"stopped by {by.name} after iteration {iteration}, kept in {checkpoint}"
        super().__init__(message)

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that the signal has ended."""
        return 128 + self.by


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number))


class StopRequest:
    """Notes the first SIGINT or SIGTERM for as long as it is open.

    Only the main thread can do so, and only a signal that has its default effect is noted: a
    handler of the user's own stays in charge, and what is ignored stays ignored.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                former = signal.getsignal(one)
                if former in (signal.SIG_DFL, signal.default_int_handler, _stop_at_once):
                    self._former[one] = former
                    signal.signal(one, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for one, former in self._former.items():
            signal.signal(one, former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.by is not None and number == signal.SIGINT:
            _stop_at_once(number, frame)
        if self.by is None:
            self.by = signal.Signals(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM raise :class:`Interrupted`, as SIGINT raises ``KeyboardInterrupt``: files are
    closed and half-written ones removed.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
