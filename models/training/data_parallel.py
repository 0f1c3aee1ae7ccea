"""Synchronous data-parallel training over processes on one machine.

On CPUs several one-thread processes that average their gradients are faster than one process with as many threads.
Every member starts from the same weights and the same optimiser, so averaging the gradients keeps them equal
(synchronous SGD). One member (the usual case on a GPU) needs no process group at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Member:
    """One training process: its place among size members, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this member logs and writes files."""
        return self.rank == 0

    def average(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace each gradient by its mean over the members."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        torch._foreach_copy_(gradients, [
            part.view_as(gradient)
            for part, gradient in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)
        ])  # fmt: skip

    def wait(self) -> None:
        """Return when every member is here."""
        if self.size > 1:
            dist.barrier()


def _enter(rank: int, size: int, threads: int, rendezvous: str, device: str, work: Callable[..., None], arguments: Any):
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        work(Member(rank, size, torch.device(device)), arguments)
    finally:
        if size > 1:
            dist.destroy_process_group()


def run(work: Callable[[Member, Any], None], arguments: Any, processes: int, threads: int, device: str) -> None:
    """Run work(member, arguments) in every member and return when all are done."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        if processes == 1:
            _enter(0, 1, threads, rendezvous, device, work, arguments)
        else:
            mp.spawn(_enter, (processes, threads, rendezvous, device, work, arguments), nprocs=processes)
