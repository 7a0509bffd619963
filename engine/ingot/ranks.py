"""Who am I among the ranks: a value read from the launcher's environment, and the process group behind it."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ingot.errors import IngotError
from ingot.recipe import Parallel

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among `world` processes; `local` counts within its node."""

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1

    @property
    def main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def read_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Read torchrun's variables; without them this is the only rank. Half a set of variables is an error."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    present = [name for name in names if name in env]
    if not present:
        return Ranks()
    if "RANK" not in env or "WORLD_SIZE" not in env:
        raise IngotError(f"the environment has {', '.join(present)} but not RANK and WORLD_SIZE: launch with torchrun")
    rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
    if not 0 <= rank < world:
        raise IngotError(f"the environment has RANK={rank}, outside WORLD_SIZE={world}: launch with torchrun")
    return Ranks(rank, world, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world)))


def pick_device(ranks: Ranks) -> torch.device:
    """One GPU a local rank when there are GPUs, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", ranks.local)
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(ranks: Ranks, section: Parallel, device: torch.device) -> Iterator[None]:
    """Bring the process group up for several ranks and take it down again; one rank needs none."""
    if ranks.world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(section.backend, timeout=timedelta(minutes=section.timeout_minutes))
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place; a single rank returns them as they are."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` (any small picklable object) on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(work: Callable[[], Value]) -> Value:
    """Run `work` on rank 0 and return its (small, picklable) value on every rank.

    When it raises an IngotError there, every rank raises, so that none waits for a dead one.
    """
    if not dist.is_initialized():
        return work()
    value, problem = None, None
    if dist.get_rank() == 0:
        try:
            value = work()
        except IngotError as error:
            problem = error
    # The message travels, not the error: its class may need more than a message to be built again.
    value, message = broadcast((value, None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    if message is not None:
        raise IngotError(message)
    return value  # type: ignore[return-value]
