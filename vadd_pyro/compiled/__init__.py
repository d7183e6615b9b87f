"""Training compiled: a whole update, or a loss with its gradient, as one graph.

Pyro programs are Python: handlers, plates and sites cost about as much as the arithmetic of a toy.
They are run once under a tracer that writes down the tensor operations they lead to, the backward
pass and the optimiser's included, and what is written down is compiled. The Pyro semantics are
those of the one run that was traced, which is compared with the programs before and while it is
used.
"""

from vadd_pyro.compiled.choice import compile_updates, give_up
from vadd_pyro.compiled.graphs import NotOneGraphError
from vadd_pyro.compiled.loss import CompiledLoss
from vadd_pyro.compiled.update import Update

__all__ = ["CompiledLoss", "NotOneGraphError", "Update", "compile_updates", "give_up"]
