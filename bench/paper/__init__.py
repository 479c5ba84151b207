"""Rerun the paper's tables and Figure 6: CIFAR-10, one network and one schedule per row.

All rows, the fixed ones too, train through :class:`~clr_optim.CyclicalOptimizer`. A row's result is
the accuracy after the last iteration, not the best accuracy on the way. Nothing is tuned. Settings
that the paper leaves open are Caffe's:

- The exponential policy starts at 0.001, the rate of Caffe's solver for this network.
- AdaGrad, RMSprop, AdaDelta and Adam have Caffe's ε of 1e-8; AdaDelta has the decay 0.9.
- The paper's "fixed" may be one of two rows; both are here: a constant rate, and Caffe's steps.
- The last accuracy is over all test images. Accuracies on the way, for the pictures, are over the
  first 2,000; the test images have a random order.

Figure 6 trains Caffe's sigmoid network with batch normalization, at constant rates and in cycles.
Its tests normalize each batch of 1,000 test images by their own statistics, as Caffe's layer does.
The results have the accuracy with torch's running averages too.

Table 4 trains residual networks, the same with stochastic depth, and a DenseNet, on augmented
images; ``resnet`` has its settings and their sources. Its tests normalize by running averages.

On a GPU one captured graph holds the whole iteration: sampling, forward, backward, step. This works
because the positions of batches, of random draws and of the cycle are on the device. A network of
Caffe's size does not fill a GPU, so ``--together`` trains several rows beside each other, each on
its own stream. On a CPU with the same number of threads, a resumed run equals an uninterrupted one
bit for bit.

The files: ``rows``, ``figure_6``, ``resnet``, ``known``, ``networks``, ``deep_networks`` and
``optimizers`` (tables and figure as data), ``augmentation`` and ``noise`` (random crops),
``data``, ``one_run`` (one row at one seed), ``found_bounds`` (its range test), ``training``
(several runs in turns), ``store`` (results and checkpoints), ``unattended`` (all runs, with
signals) and ``progress``, ``comparison``, ``report`` and ``readme`` (the results in words),
``quarters`` and ``figure_report`` (those of the figure), ``resnet_report`` (those of Table 4),
``table_lines``, ``settings_lines``, ``speed``, ``options`` and ``command`` (the command line).

Source: L. N. Smith, *Cyclical Learning Rates for Training Neural Networks*, arXiv 1506.01186,
Tables 1 to 4 and Figure 6.
"""

from clr_optim.bench.paper.command import DESCRIPTION, run, written
from clr_optim.bench.paper.comparison import summarize
from clr_optim.bench.paper.figure_6 import FIGURE_6
from clr_optim.bench.paper.one_run import Run
from clr_optim.bench.paper.optimizers import CaffeSGD
from clr_optim.bench.paper.options import add_arguments
from clr_optim.bench.paper.readme import readme_table
from clr_optim.bench.paper.resnet import RESNET
from clr_optim.bench.paper.rows import ROWS, Row, Scale

__all__ = [
    "DESCRIPTION",
    "FIGURE_6",
    "RESNET",
    "ROWS",
    "CaffeSGD",
    "Row",
    "Run",
    "Scale",
    "add_arguments",
    "readme_table",
    "run",
    "summarize",
    "written",
]
