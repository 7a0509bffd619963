"""The ranks of this job: who am I among them, this rank's device, the process group behind them."""

import contextlib
import itertools
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ingot.errors import IngotError
from ingot.launch.detect import detect
from ingot.launch.value import Ranks
from ingot.recipe import Parallel

__all__ = [
    "Ranks",
    "all_reduce_sum",
    "broadcast",
    "gather",
    "idle_gpus",
    "meet",
    "on_main",
    "pick_device",
    "process_group",
    "read_ranks",
    "turns",
]

Value = TypeVar("Value")

# A hang is told by parallel/heartbeat.py with the rank's name; the collective's own end comes behind it.
BACKSTOP_SHARE, BACKSTOP_S = 1.5, 60.0
NCCL_END_S = 60.0
TOLD_S = 60.0  # ranks of a node come within seconds of each other; who waits longer should know for whom


def read_ranks(env: Mapping[str, str] = os.environ) -> Ranks:
    """Who am I, by the launcher's variables: torchrun, Azure ML, Slurm or MPI; without any, the only rank.

    Raises IngotError for half a set of variables and for launchers that contradict each other.
    """
    return detect(env)


def device_name(device: torch.device) -> str:
    """What a device is called: `NVIDIA H200`, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
    """Bring the process group up for several ranks and take it down again; one rank needs none, but for deepspeed.

    Raises IngotError when not all ranks come in time.
    """
    if dist.is_initialized() or (ranks.world == 1 and not section.strategy.startswith("zero")):
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _exported(ranks):
        _meet(ranks, section)
        try:
            yield
        except BaseException:
            # NCCL's own end waits for the others, who may be stuck or gone; gloo's does not.
            if section.backend == "gloo":
                dist.destroy_process_group()
            else:
                _end_within(NCCL_END_S)
            raise
        dist.destroy_process_group()


def _end_within(seconds: float) -> None:
    """End this process `seconds` from now at the latest: threads of NCCL may keep it from ending by itself."""
    timer = threading.Timer(seconds, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def _meet(ranks: Ranks, section: Parallel) -> None:
    """Wait for all ranks, which may still be encoding; then give collectives the time that they may take."""
    seconds = section.timeout_minutes * 60
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    told = threading.Timer(
        TOLD_S, lambda: print(f"rank {ranks.rank} waits for the other ranks at {where}", file=sys.stderr, flush=True)
    )
    told.daemon = True
    if ranks.local == 0:
        told.start()
    try:
        dist.init_process_group(
            section.backend,
            store=_store(ranks, timedelta(minutes=section.meeting_minutes)),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=max(seconds * BACKSTOP_SHARE, seconds + BACKSTOP_S)),
        )
    except dist.DistError as error:
        raise IngotError(
            f"rank {ranks.rank} of {ranks.world} ({ranks.launcher}) did not meet the others at {where} in "
            f"{section.meeting_minutes:g} minutes: {str(error).splitlines()[0]}. Were all {ranks.world} ranks started, "
            f"and can every node reach {where}? Set MASTER_ADDR and MASTER_PORT to a host and a port that it can"
        ) from error
    finally:
        told.cancel()


def _store(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """Where ranks tell each other their addresses: at rank 0, or at torchrun's agent when that says so."""
    if ranks.world == 1:  # meets nobody, and needs no port that another job may have
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _fresh_store(ranks, timeout)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, ranks.world, is_master=ranks.main, timeout=timeout, multi_tenant=True)


def _fresh_store(ranks: Ranks, timeout: timedelta) -> dist.Store:
    """A part of the store of torchrun's agent that only the ranks of this start write to.

    The agent keeps the store over restarts, and in it where the ranks before listened: gloo then calls dead ones (torch
    2.13, most of the time when a group is made after the first). Its count of restarts differs between nodes and cannot
    tell starts apart. So rank 0 invents a name, and hands it to the ranks that ask for it now.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, ranks.world, is_master=False, timeout=timeout)
    me = uuid.uuid4().hex
    if ranks.rank > 0:
        store.set(f"ingot/ask/{ranks.rank}", me)
        start = store.get(f"ingot/answer/{me}").decode()
        store.set(f"ingot/heard/{start}/{ranks.rank}", "")
        return dist.PrefixStore(f"ingot/{start}", store)
    answered: dict[int, str] = {}  # an asking that is older than this start is answered too, and nobody hears it
    missing, deadline = set(range(1, ranks.world)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{ranks.world - len(missing)} of {ranks.world} ranks came")
        for rank in sorted(missing):
            if store.check([f"ingot/ask/{rank}"]):
                asking = store.get(f"ingot/ask/{rank}").decode()
                if answered.get(rank) != asking:
                    store.set(f"ingot/answer/{asking}", me)
                    answered[rank] = asking
            if store.check([f"ingot/heard/{me}/{rank}"]):
                missing.discard(rank)
        time.sleep(0.02)
    return dist.PrefixStore(f"ingot/{me}", store)


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


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (any picklable object), in the order of ranks, on all of them."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def meet() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def turns(name: str) -> Iterator[int]:
    """0, 1, 2, ...: over all ranks that ask by this `name`, each number once. Who is faster gets more of them."""
    if not dist.is_initialized():
        yield from itertools.count()
    store = dist.distributed_c10d._get_default_store()  # the one that `process_group` was made with
    while True:
        yield store.add(f"turns/{name}", 1) - 1


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
