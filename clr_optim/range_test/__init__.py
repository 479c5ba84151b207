"""The LR range test: train for a while as the rate rises, and read both bounds of a cycle off it.

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
section 3.3: base_lr is the rate at which the curve begins to improve. max_lr is the rate at which
the curve slows, turns ragged or falls.
"""

from clr_optim.range_test.arguments import DEFAULT_RANGE as DEFAULT_RANGE
from clr_optim.range_test.arguments import DEFAULT_STEPS as DEFAULT_STEPS
from clr_optim.range_test.measure import lr_range_test
from clr_optim.range_test.reading import BASES as BASES
from clr_optim.range_test.reading import METHODS as METHODS
from clr_optim.range_test.result import METRICS as METRICS
from clr_optim.range_test.result import MODES as MODES
from clr_optim.range_test.result import Bounds, BoundsDict, RangeTest

__all__ = ["Bounds", "BoundsDict", "RangeTest", "lr_range_test"]
