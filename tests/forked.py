"""Cheap ranks: a process that has imported everything once forks them. An import costs 8 s, a fork 20 ms.

For scripts that tests start. The script itself must not compute with torch before it forks.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ingot.ranks import Ranks

torch.set_num_threads(1)
_launches = 0


def start(world: int, work: Callable[[Ranks], None], folder: Path) -> list[int]:
    """Fork `world` ranks that do `work`, with gloo between them when they are several; return their process ids."""
    global _launches
    _launches += 1
    store = folder / f".store-{os.getpid()}-{_launches}"
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            _child(Ranks(rank, world, rank, world), work, store)
        pids.append(pid)
    return pids


def ended(pids: list[int], seconds: float = 120.0) -> list[int]:
    """Exit codes in order, minus the signal's number for a killed one. One that hangs is killed and named."""
    deadline = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            raise TimeoutError(f"rank {[pids.index(pid) for pid in set(pids) - set(codes)]} hangs")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def done(world: int, work: Callable[[Ranks], None], folder: Path) -> None:
    """Run `work` on `world` ranks; raises when one of them fails."""
    codes = ended(start(world, work, folder))
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def _child(ranks: Ranks, work: Callable[[Ranks], None], store: Path) -> None:
    code = 1
    try:
        if ranks.world > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(str(store), ranks.world),
                rank=ranks.rank,
                world_size=ranks.world,
                timeout=timedelta(seconds=60),
            )
        work(ranks)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
