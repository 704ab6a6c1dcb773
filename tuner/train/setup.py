"""The machine -> devices, ranks, threads and seeds; and a policy wrapped for as many processes as were launched."""

from __future__ import annotations

import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tuner.limits import MOST_THREADS

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """What this process computes on, and its place among the processes of the launch (`torchrun` starts them)."""

    device: torch.device
    rank: int
    world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Adds `values` up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, number: int) -> int:
        """The largest `number` of any rank: how ranks learn that one of them was told to stop."""
        if self.world_size == 1:
            return number
        value = torch.tensor([number], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value.item())

    def for_gather(self, values: Tensor) -> Tensor:
        """`values` where `gather` takes them from: on the host, if there are other ranks to send them to."""
        return values.cpu() if self.world_size > 1 else values

    def gather(self, value: T) -> list[T]:
        """The `value` of every rank, by rank."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def find_devices() -> Devices:
    """The accelerator of this rank, or the CPU; the process group is started where `torchrun` launched several."""
    state = PartialState(cpu=not torch.cuda.is_available())
    return Devices(state.device, state.process_index, state.num_processes)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_threads(threads: str | int, world_size: int) -> int:
    """`auto` -> the cores this process may use, shared fairly among the ranks of this machine; OMP_NUM_THREADS goes
    first, where it is a number that a recipe could name."""
    if threads != "auto":
        return int(threads)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # it may list a number for each level
    given = int(asked) if asked.isascii() and asked.isdigit() else 0
    return given if 1 <= given <= MOST_THREADS else max(1, usable_cores() // max(1, local))


def seed_everything(seed: int) -> None:
    """Seeds torch, numpy and `random`: initialisation and dropout draw from them; the data order has its own seed."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def wrap(policy: nn.Module, devices: Devices) -> nn.Module:
    """DDP where there is more than one rank; it averages gradients, so the loop scales losses by the ranks."""
    if devices.world_size == 1:
        return policy
    ids = [devices.device.index] if devices.device.type == "cuda" else None
    return DistributedDataParallel(policy, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)


def no_sync(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Holds the gradient exchange back until the last microbatch of the step."""
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
