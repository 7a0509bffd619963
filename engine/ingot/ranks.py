"""The ranks of this job: who am I among them, this rank's device, the process group behind them."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ingot.errors import IngotError
from ingot.launch.detect import detect
from ingot.launch.value import Ranks
from ingot.recipe import Parallel

__all__ = ["Ranks", "all_reduce_sum", "broadcast", "on_main", "pick_device", "process_group", "read_ranks"]

Value = TypeVar("Value")

# A hang is told by parallel/heartbeat.py with the rank's name; the collective's own end comes behind it.
BACKSTOP_SHARE, BACKSTOP_S = 1.5, 60.0


def read_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Who am I, by the launcher's variables: torchrun, Azure ML, Slurm or MPI; without any, the only rank.

    Raises IngotError for half a set of variables and for launchers that contradict each other.
    """
    return detect(env)


def pick_device(ranks: Ranks) -> torch.device:
    """One GPU a local rank when there are GPUs, else the CPU. Raises IngotError for more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1 and ranks.launcher in ("slurm", "mpi"):
        return torch.device("cuda", 0)  # --gpus-per-task=1: every task sees its own GPU, and all call it 0
    if ranks.local >= gpus:
        raise IngotError(
            f"this node has {ranks.local_world} ranks and {gpus} GPUs (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start as many ranks a node as it has GPUs"
        )
    return torch.device("cuda", ranks.local)


def idle_gpus(ranks: Ranks) -> str | None:
    """What to tell the user when GPUs of this node have no rank."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus <= ranks.local_world:
        return None
    return f"{gpus} GPUs are here and {ranks.local_world} is used; torchrun --nproc-per-node {gpus} uses all"


@contextlib.contextmanager
def process_group(ranks: Ranks, section: Parallel, device: torch.device) -> Iterator[None]:
    """Bring the process group up for several ranks and take it down again; one rank needs none.

    Raises IngotError when not all ranks come in time.
    """
    if ranks.world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _exported(ranks):
        _meet(ranks, section)
        try:
            yield
        except BaseException:
            # NCCL's own end waits for the others, who are stuck or gone. gloo's does not.
            if dist.is_initialized() and section.backend == "gloo":
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def _meet(ranks: Ranks, section: Parallel) -> None:
    """Wait for all ranks; then give collectives the time that they may take."""
    minutes = section.timeout_minutes
    where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    try:
        dist.init_process_group(
            section.backend,
            timeout=timedelta(seconds=max(minutes * 60 * BACKSTOP_SHARE, minutes * 60 + BACKSTOP_S)),
        )
    except dist.DistError as error:
        raise IngotError(
            f"rank {ranks.rank} of {ranks.world} ({ranks.launcher}) did not meet the others at {where}: "
            f"{str(error).splitlines()[0]}. Were all {ranks.world} ranks started, and can every node reach "
            f"{where}? Set MASTER_ADDR and MASTER_PORT to a host and a port that it can"
        ) from error


@contextlib.contextmanager
def _exported(ranks: Ranks) -> Iterator[None]:
    """torch.distributed's variables for launchers that set others: transformers and deepspeed read them too."""
    wanted = {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world),
        "LOCAL_RANK": str(ranks.local),
        "LOCAL_WORLD_SIZE": str(ranks.local_world),
        "MASTER_ADDR": ranks.master or "127.0.0.1",
        "MASTER_PORT": str(ranks.port or 29_500),
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


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
