"""The gate of a step on each device: the factor of its gradients, and whether the step happens.

A GradScaler, clipping and ``skip_above`` fill the gate by kernels, so the host need not wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clr_optim.backends import device as current
from clr_optim.backends.base import Gradients, WhoKnows
from clr_optim.backends.triton.clock import Clock, fill_gate
from clr_optim.backends.triton.launch import Launch
from clr_optim.backends.triton.prebound import Call
from clr_optim.gate import Gate
from clr_optim.plan import Plan
from clr_optim.sharding import no_sums, sum_over_ranks

__all__ = ["DeviceStatistics", "fill_gates"]


class DeviceStatistics:
    """The statistics of ``skip_above`` on all devices, which are equal after each step.

    The host's are up to date whenever the host knows the position.

    Args:
        clocks: the clock of each device.
    """

    def __init__(self, clocks: Mapping[torch.device, Clock]) -> None:
        self._clocks = clocks
        self._gate: Gate | None = None

    def follow(self, gate: Gate | None) -> None:
        """Remember the gate of the host, once a step has one."""
        self._gate = gate or self._gate

    def send(self, clock: Clock) -> None:
        """Write the host's statistics to a device that has not heard of them.

        Raises:
            RuntimeError: if a write is needed and the step is being captured.
        """
        if self._gate is not None:
            clock.take_statistics(self._gate)

    def ask(self) -> bool:
        """Have the host know the statistics; return whether the gate is closed."""
        if self._gate is None:
            return False
        closed, statistics = next(iter(self._clocks.values())).ask_gate()
        self._gate.take(statistics)
        for clock in self._clocks.values():
            clock.note_statistics(statistics)
        return closed

    def doubt(self, who_knows: WhoKnows) -> None:
        """Have the next step write the host's statistics again, after a step that has raised.

        Args:
            who_knows: who knows the position. If the host does, no tensor has changed, but a gate
                may have taken the norm into the statistics.
        """
        if who_knows is WhoKnows.HOST:
            for clock in self._clocks.values():
                clock.note_statistics(None)

    def opens(self, gradients: Gradients, norm: Tensor | None) -> bool:
        """Return False if the host knows that the gate is closed.

        Args:
            gradients: how the step changes its gradients. The gates are filled.
            norm: the norm of all gradients.
        """
        gate = gradients.gate
        if gate is None or norm is None:
            return True
        if not self._clocks:  # only other ranks have gradients
            return not gate.closes(norm.item())
        return not (gradients.waits and self.ask())


def fill_gates(
    plan: Plan,
    clocks: Mapping[torch.device, Clock],
    by_device: Mapping[torch.device, Sequence[Launch]],
    gradients: Gradients,
    calls: list[Call],
) -> tuple[dict[torch.device, Tensor], Tensor | None]:
    """Return each device's gate, and the norm of all gradients if the step depends on it.

    Args:
        plan: the plan of the optimizer.
        clocks: the clock of each device.
        by_device: the launches on each device.
        gradients: how the step changes its gradients.
        calls: receives the launches.
    """
    clocks = {device: clocks[device] for device in by_device}
    if not gradients.fills_gate:
        return {device: clock.open for device, clock in clocks.items()}, None
    scales = {device: _on(gradients.scale, clock.one) for device, clock in clocks.items()}
    sums, count = None, 0
    if gradients.needs_norm:
        by_launch: dict[Launch, Tensor] = {}
        of_devices: list[Tensor] = []
        for device, launches in by_device.items():
            with current.guard(device):
                of_device, parts = _sum_squares(device, launches, scales[device], calls)
            of_devices.append(of_device)
            by_launch.update(parts)
        sums = _join(plan, of_devices, by_launch)
        count = len(sums)
    gates: dict[torch.device, Tensor] = {}
    dtype = plan.norm_dtype
    norm = None
    if sums is not None and not clocks:  # only other ranks have gradients
        norm = sums.sum().sqrt().to(dtype)
    for device, clock in clocks.items():
        gates[device] = clock.gate
        with current.guard(device):
            if len(gates) > 1 and norm is not None:  # the first device has summed for all
                clock.gate.copy_(next(iter(gates.values())))
                continue
            limits = clock.one
            if sums is not None:
                if clock.norm is None or clock.norm.dtype != dtype:
                    clock.norm = torch.empty((), dtype=dtype, device=device)
                norm = clock.norm
                limits = clock.limits(gradients)
            call = fill_gate(
                clock.one if sums is None else sums.to(device), count, limits,
                scales[device], _on(gradients.found_inf, clock.zero),
                clock.one if norm is None else norm, clock.gate,
                clips=sums is not None, skips=gradients.gate is not None,
            )  # fmt: skip
            calls.append(call)
    return gates, norm


def _sum_squares(
    device: torch.device, launches: Sequence[Launch], scale: Tensor, calls: list[Call]
) -> tuple[Tensor, dict[Launch, Tensor]]:
    """Return sums of squares of the gradients on one device, a sum per chunk, in order.

    Returns:
        All sums, and the part of each launch.
    """
    counts = [launch.count for launch in launches]
    sums = torch.empty(sum(counts), dtype=torch.float64, device=device)
    parts = dict(zip(launches, torch.split(sums, counts), strict=True))
    for launch, part in parts.items():
        calls.append(launch.sum_squares(scale, part))
    return sums, parts


def _join(plan: Plan, sums: Sequence[Tensor], parts: Mapping[Launch, Tensor]) -> Tensor:
    """Return the sums of all devices and ranks, on the first device.

    Args:
        plan: the plan of the optimizer.
        sums: the sums of each device.
        parts: the sums of each launch.
    """
    meshes = [spread.mesh.device_type for spread in plan.spreads if spread]
    if not meshes and len(sums) <= 1:
        return sums[0] if sums else torch.zeros(0, dtype=torch.float64, device="cpu")
    device = sums[0].device if sums else torch.device(meshes[0])
    by_spread = no_sums(plan.spreads, device)
    for launch, part in parts.items():
        total = by_spread[launch.bucket.spread]
        total += part.sum().to(total.device)
    return sum_over_ranks(by_spread).reshape(1)


def _on(tensor: Tensor | None, default: Tensor) -> Tensor:
    """Return a GradScaler's tensor with the device and dtype of a default, or the default."""
    if tensor is None:
        return default
    return tensor.to(default.device, default.dtype, non_blocking=True)
