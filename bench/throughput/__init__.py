"""Time the step of each rule: ours against torch's own and against the memory's bandwidth.

Each file does one job: :mod:`.tensors` makes parameters and gradients, :mod:`.variants` the steps
that are compared, :mod:`.timing` takes them in turns, :mod:`.cells` measures one rule on one
workload, :mod:`.overhead` and :mod:`.processes` what lies beside the cells, :mod:`.options` reads
the command line and :mod:`.command` runs it.
"""

from clr_optim.bench.throughput.command import DESCRIPTION, exit_code, main, run
from clr_optim.bench.throughput.options import add_arguments

__all__ = ["DESCRIPTION", "add_arguments", "exit_code", "main", "run"]
