"""Whether a graph says what the programs say: before it is used, and again later.

Programs may change after they were traced: by the rows that are drawn for them, a count of their
calls, an attribute that somebody sets. So the graph is compared with them on several occasions,
loss and every gradient, on the same rows and random numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vadd_pyro.checkpoints import restore_random_state
from vadd_pyro.compiled.graphs import NotOneGraphError, first_line
from vadd_pyro.compiled.traced import Differentiated, TracedLoss, check_agreement
from vadd_pyro.compiled.untouched import Memory, left_alone
from vadd_pyro.distributed import Processes

__all__ = ["RECHECKS", "Comparison"]

RECHECKS = (10, 100, 1000)  # after so many updates by the graph
_LATER = 10_000  # updates, for what the trace has frozen


class Comparison:
    """Compares a graph with the programs.

    Args:
        loss: that of the programs.
        graph: loss and gradient by the graph, of rows ``(B, D)``; it changes nothing.
        memory: of the programs, which has learnt from a call.
    """

    def __init__(
        self, loss: TracedLoss, graph: Callable[[Tensor], Differentiated], memory: Memory
    ) -> None:
        self.loss, self.graph, self.memory = loss, graph, memory

    def before_use(self, x_0: Tensor) -> None:
        """Compare them on rows, and on others and much later, for what the trace has frozen.

        Args:
            x_0: clean tokens, ``(B, D)``.

        Raises:
            NotOneGraphError: saying what differs.
        """
        seen = self._compare(x_0)
        others = (x_0.flip(0) + 1) % self.loss.elbo.process.vocab_size
        with self.loss.later(_LATER), self.memory.of_one_size():
            self.memory.advance(_LATER)
            # Rows that are made up may be impossible ones.
            seen = seen and (self._compare(others) or self._compare(x_0.flip(0)))
        if not seen:
            raise NotOneGraphError(
                "the loss of the programs or its gradient is no number, so that there is nothing "
                "to compare a graph with"
            )

    def after(self, calls: int, x_0: Tensor, processes: Processes) -> str:
        """Compare them in the course of training: what differs, in any process, or nothing.

        Nothing of the run is changed, unless they differ: then numbers that calls of the programs
        change are where they would be without a graph.

        Args:
            calls: how often the programs would have been called without a graph.
            x_0: clean tokens, ``(B, D)``.
            processes: all of them compare.
        """
        reason = ""
        with left_alone(*self.loss.pair):
            try:
                self.memory.advance(calls)
                self._compare(x_0)
            except NotOneGraphError as error:
                reason = str(error)
            except Exception as error:  # of the programs, which will say so again
                reason = first_line(error)
        reason = next(filter(None, processes.gather(reason)), "")
        if reason:
            self.memory.advance(calls)
        return reason

    def _compare(self, x_0: Tensor) -> bool:
        """Compare them once, and on other random numbers if they differ: what lies on a threshold
        may come to either side by rounding. Whether there were numbers to compare.
        """
        try:
            return self._once(x_0)
        except NotOneGraphError:
            return self._once(x_0)

    def _once(self, x_0: Tensor) -> bool:
        random, reference = self.loss.reference(x_0)
        restore_random_state(random)
        found = self.graph(x_0)
        try:
            return check_agreement(found, reference, self.loss.tolerance)
        except NotOneGraphError:
            if not self.loss.half:
                raise
            restore_random_state(random)
            exact = self.loss.eager(x_0, half=False)
            return check_agreement(found, reference, self.loss.tolerance, exact)
