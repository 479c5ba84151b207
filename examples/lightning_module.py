"""Lightning with a cyclical learning rate: one changed line in ``configure_optimizers``.

    python examples/lightning_module.py

The optimizer is all that is returned: there is no scheduler, and ``interval`` cannot be wrong. The
position in the cycle is in Lightning's checkpoints.
"""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from clr_optim import CyclicalOptimizer
from clr_optim.demo.train import build_network, split_digits

CYCLES, EPOCHS_PER_CYCLE, STEPS_PER_EPOCH = 4, 4, 24


class DigitsModule(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_network()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CyclicalOptimizer(  # the changed line: 0.02 is now the top of the cycle
            torch.optim.Adam(self.parameters(), lr=0.02),
            policy="triangular2",
            step_size_up=EPOCHS_PER_CYCLE * STEPS_PER_EPOCH // 2,
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        right = self.net(batch[0]).argmax(dim=1) == batch[1]
        self.log("accuracy", 100 * right.float().mean())


class Report(Callback):
    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        shown = trainer.callback_metrics  # the rate of the last step, from the monitor
        print(
            f"step {trainer.global_step}  cycle {trainer.optimizers[0].cycle:.2f}"
            f"  lr {shown['lr-Adam']:.6f}  test accuracy {shown['accuracy']:.2f} %"
        )


if __name__ == "__main__":
    pl.seed_everything(0)
    train, test = (TensorDataset(d.images, d.labels) for d in split_digits())
    trainer = pl.Trainer(
        accelerator="auto", devices=1, max_epochs=CYCLES * EPOCHS_PER_CYCLE,
        logger=CSVLogger("."), log_every_n_steps=1, gradient_clip_val=1.0,
        callbacks=[LearningRateMonitor("step"), Report()], enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(DigitsModule(), DataLoader(train, 50, shuffle=True), DataLoader(test, len(test)))
