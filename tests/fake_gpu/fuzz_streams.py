"""Random events on three streams of the fake device, compared with torch's step on the CPU.

``python -m fake_gpu.fuzz_streams --seeds 20`` plays the events of each seed twice: on the device,
with streams in random order, and on the CPU. The events on the device are ordered as users order
them: a stream waits for the stream that was used before. Half of the seeds capture no graph, and
steps come in rows on one stream, so that native code takes most of them.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clr_optim import CyclicalOptimizer
from clr_optim.core.ordinary import OrdinarySteps
from clr_optim.schedule import triangular
from fake_gpu import device

EVENTS = 25
SIZES = (40, 1, 11)
#: a GradScaler leaves its signals to a step if the optimizer is fused
OPTIMIZERS = {
    "sgd": lambda p, fused: torch.optim.SGD(p, lr=0.1, fused=fused),
    "sgd-momentum": lambda p, _: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p, fused: torch.optim.AdamW(p, lr=0.01, fused=fused),
    "rmsprop": lambda p, _: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p, _: torch.optim.NAdam(p, lr=0.01),
}
#: event -> how often it is drawn; events after "capture" need a graph, or make one
WEIGHTS = {
    "step": 4, "steps": 6, "idle": 2, "scaled": 2, "scaled_steps": 4, "overflow": 1,
    "replay": 8, "capture": 2, "add_group": 1, "set_bounds": 1, "set_iteration": 1,
    "write_setting": 1, "checkpoint": 1, "ask": 1, "other_code": 2,
}  # fmt: skip


class Event(NamedTuple):
    """An event, the stream on which it happens, and a number that the event may use."""

    name: str
    stream: int
    number: float


def events(seed: int) -> Iterator[Event]:
    """Yield the events of a seed."""
    chance = random.Random(seed)
    weights = {**WEIGHTS, **({} if seed % 2 else {"capture": 0, "replay": 0})}
    stream = 0
    for _ in range(EVENTS):
        (name,) = chance.choices([*weights], [*weights.values()])
        if chance.random() < 0.3:
            stream = chance.randrange(3)
        yield Event(name, stream, chance.random())


class Player:
    """Plays events by torch's step on the CPU."""

    place = "cpu"
    wrap: dict[str, Any] = {"backend": "torch"}  # noqa: RUF012

    def __init__(self, seed: int) -> None:
        chance = random.Random(-seed - 1)
        self.generator = torch.Generator().manual_seed(seed)
        # The addresses of up to eight gradients are arguments of the kernel.
        more = chance.choice([(), (), (5,) * 8])
        self.params = [self.new(size) for size in (*SIZES, *more)]
        make, fused = OPTIMIZERS[chance.choice([*OPTIMIZERS])], chance.random() < 0.7
        inner = make(self.params, fused and self.place == "cuda")
        norm = chance.choice([None, None, 0.5])
        follows = {"weight_decay": triangular(2, base_lr=0.0, max_lr=0.1)}
        schedules = follows if chance.random() < 0.3 else None
        self.opt = CyclicalOptimizer(
            inner, step_size_up=3, max_grad_norm=norm, schedules=schedules, **self.wrap
        )
        self.scaler = torch.amp.GradScaler(self.place, init_scale=16.0, growth_interval=3)
        self.has_graph = False
        # The first steps create the state, as a capture may not.
        self.steps_before_capture = 2

    def draw(self, size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def new(self, size: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.draw(size))

    def play(self, event: Event) -> None:
        getattr(self, event.name)(event.number)

    def result(self) -> tuple[int, list[Tensor]]:
        return self.opt.iteration, [param.detach().cpu() for param in self.params]

    # ---- events

    def set_gradients(self, scale: float = 1.0) -> None:
        for param in self.params:
            param.grad = self.draw(param.numel()) * scale

    def step(self, _: float) -> None:
        self.set_gradients()
        self.opt.step()
        self.steps_before_capture -= 1

    def steps(self, number: float) -> None:
        for _ in range(2 + int(4 * number)):
            self.step(number)

    def idle(self, number: float) -> None:
        """Step while one parameter has no gradient."""
        self.set_gradients()
        self.params[int(number * len(self.params))].grad = None
        self.opt.step()

    def scaled(self, _: float, infinite: bool = False) -> None:
        """Step by a GradScaler."""
        loss = self.scaler.scale(torch.zeros((), device=self.place))  # makes the scale
        self.set_gradients(float(self.scaler.get_scale()) + 0.0 * float(loss))
        if infinite:
            self.params[0].grad[0] = float("inf")
        self.scaler.step(self.opt)
        self.scaler.update()

    def scaled_steps(self, number: float) -> None:
        """Step several times by a GradScaler, perhaps with an overflow among them."""
        steps = 3 + int(3 * number)
        for k in range(steps):
            self.scaled(number, infinite=k == int(20 * number))

    def overflow(self, number: float) -> None:
        self.scaled(number, infinite=True)

    def capture(self, number: float) -> None:
        if self.has_graph or self.steps_before_capture > 0:
            return
        self.step(number)
        self.make_graph()
        self.has_graph = True

    def make_graph(self) -> None:
        """Capture a step; nothing happens on the CPU."""

    def replay(self, number: float) -> None:
        if self.has_graph:
            self.step(number)

    def add_group(self, _: float) -> None:
        if not self.has_graph:
            self.params.append(self.new(7))
            self.opt.add_param_group({"params": self.params[-1:]})
            self.steps_before_capture = 2

    def set_bounds(self, number: float) -> None:
        self.opt.set_bounds(base_lr=0.01 + number / 10, max_lr=0.2)

    def set_iteration(self, number: float) -> None:
        self.opt.set_iteration(int(number * 12))

    def write_setting(self, number: float) -> None:
        if not self.has_graph:
            self.opt.param_groups[0]["weight_decay"] = number / 10

    def checkpoint(self, _: float) -> None:
        if not self.has_graph:
            self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
            self.steps_before_capture = 2

    def ask(self, _: float) -> None:
        self.answers = [*getattr(self, "answers", []), self.opt.iteration]

    def other_code(self, number: float) -> None:
        """Let other code use memory of a stream; nothing happens on the CPU."""


class DevicePlayer(Player):
    """Plays events by the kernels, on three streams."""

    place = "cuda"
    wrap: dict[str, Any] = {"backend": "triton"}  # noqa: RUF012

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        self.last = 0
        device.set_order(device.Order.RANDOM, seed)

    def draw(self, size: int) -> Tensor:
        """Return random numbers on the device, without a wait for the device."""
        return super().draw(size).pin_memory().to("cuda", non_blocking=True)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that the user owns."""
        for param in self.params:
            yield param
            if param.grad is not None:
                yield param.grad
            for value in self.opt.state.get(param, {}).values():
                if isinstance(value, Tensor) and value.is_cuda:
                    yield value

    def play(self, event: Event) -> None:
        here = self.streams[event.stream]
        if event.stream != self.last:
            here.wait_stream(self.streams[self.last])
            self.last = event.stream
            for tensor in self.tensors():
                tensor.record_stream(here)
        with torch.cuda.stream(here):
            super().play(event)

    def result(self) -> tuple[int, list[Tensor]]:
        torch.cuda.synchronize()
        device.set_order(device.Order.AT_ONCE)
        return super().result()

    def make_graph(self) -> None:
        self.static = [torch.zeros_like(param) for param in self.params]
        for param, grad in zip(self.params, self.static, strict=True):
            param.grad = grad
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.streams[1 + self.last % 2]):
            self.opt.step()

    def replay(self, _: float) -> None:
        if self.has_graph:
            for param, grad in zip(self.params, self.static, strict=True):
                grad.copy_(self.draw(param.numel()), non_blocking=True)
            self.graph.replay()

    def other_code(self, number: float) -> None:
        with torch.cuda.stream(self.streams[(self.last + 1) % 3]):
            for i in range(8):
                torch.full((64 * (1 + i % 4),), 7, device="cuda")


class Counter:
    """Counts the steps that native code takes alone."""

    def __init__(self) -> None:
        self.count = 0
        take = OrdinarySteps.take

        def counted(steps: OrdinarySteps, attributes: dict[str, Any]) -> bool:
            taken = take(steps, attributes)
            self.count += taken
            return taken

        OrdinarySteps.take = counted  # type: ignore[method-assign]


def compare(seed: int) -> str | None:
    """Return how the device differs from the CPU after the events of a seed, or None."""
    players = [Player(seed), DevicePlayer(seed)]
    device.take_violations()
    for event in events(seed):
        for player in players:
            player.play(event)
    (iteration, expected), (found_iteration, found) = (player.result() for player in players)
    violations = device.take_violations()
    if violations:
        return f"violations: {violations}"
    if found_iteration != iteration:
        return f"iteration {found_iteration}, and {iteration} on the CPU"
    answers = [getattr(player, "answers", None) for player in players]
    if answers[0] != answers[1]:
        return f"positions {answers[1]}, and {answers[0]} on the CPU"
    apart = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    return None if apart < 1e-4 else f"parameters differ by {apart}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    bad, native = 0, Counter()
    for seed in range(options.first, options.first + options.seeds):
        difference = compare(seed)
        if difference is not None:
            bad += 1
            print(f"seed {seed}: {difference}", flush=True)
    print(f"{options.seeds} seeds, {bad} of them bad; {native.count} native steps", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    import fake_gpu.install  # noqa: F401

    sys.exit(main())
