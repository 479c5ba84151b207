"""The Trainer of transformers with a cyclical learning rate: one changed line.

    python examples/hf_trainer.py

``opt.scheduler`` goes where the Trainer wants a scheduler. It changes nothing and shows the Trainer
the rate to log; without it the Trainer makes a linear one of its own, and logs that.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from clr_optim import CyclicalOptimizer
from clr_optim.demo.train import Digits, build_network, split_digits

CYCLES, EPOCHS_PER_CYCLE, STEPS_PER_EPOCH = 4, 4, 24


class DigitsModel(nn.Module):
    """A model of transformers would do as well: what counts is the loss in what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_network()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def rows(digits: Digits) -> list[dict[str, Tensor]]:
    return [{"images": i, "labels": d} for i, d in zip(digits.images, digits.labels, strict=True)]


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.manual_seed(0)
    train, test = split_digits()
    model = DigitsModel()
    opt = CyclicalOptimizer(  # the changed line: 0.02 is now the top of the cycle
        torch.optim.Adam(model.parameters(), lr=0.02),
        policy="triangular2",
        step_size_up=EPOCHS_PER_CYCLE * STEPS_PER_EPOCH // 2,
    )
    arguments = TrainingArguments(
        output_dir="run", num_train_epochs=CYCLES * EPOCHS_PER_CYCLE,
        per_device_train_batch_size=50, per_device_eval_batch_size=597, logging_strategy="epoch",
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows(train), eval_dataset=rows(test),
        optimizers=(opt, opt.scheduler),
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
    )  # fmt: skip
    trainer.train()
    accuracy = 100 * trainer.state.log_history[-2]["eval_accuracy"]
    print(f"step {opt.iteration}  cycle {opt.cycle:.2f}  test accuracy {accuracy:.2f} %")
