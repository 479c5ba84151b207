"""What each torch optimizer keeps as state."""

from __future__ import annotations

import torch

__all__ = ["STATE_SLOTS"]

_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})

#: Names that ``optimizer.state[p]`` may hold, by exact class.
STATE_SLOTS: dict[type[torch.optim.Optimizer], frozenset[str]] = {
    torch.optim.Adadelta: frozenset({"step", "square_avg", "acc_delta"}),
    torch.optim.Adafactor: frozenset({"step", "row_var", "col_var", "variance"}),
    torch.optim.Adagrad: frozenset({"step", "sum"}),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adamax: frozenset({"step", "exp_avg", "exp_inf"}),
    torch.optim.ASGD: frozenset({"step", "eta", "mu", "ax"}),
    torch.optim.LBFGS: frozenset(
        {
            "func_evals", "n_iter", "d", "t", "old_dirs", "old_stps", "ro", "H_diag",
            "prev_flat_grad", "prev_loss", "al",
        }
    ),
    torch.optim.Muon: frozenset({"momentum_buffer"}),
    torch.optim.NAdam: frozenset({"step", "mu_product", "exp_avg", "exp_avg_sq"}),
    torch.optim.RAdam: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    torch.optim.RMSprop: frozenset({"step", "square_avg", "momentum_buffer", "grad_avg"}),
    torch.optim.Rprop: frozenset({"step", "prev", "step_size"}),
    torch.optim.SGD: frozenset({"momentum_buffer"}),
    torch.optim.SparseAdam: frozenset({"step", "exp_avg", "exp_avg_sq"}),
}  # fmt: skip
