"""Schedulers of torch, read as schedules of ours."""

from clr_optim.from_torch.reading import TorchsCourse, read_scheduler

__all__ = ["TorchsCourse", "read_scheduler"]
