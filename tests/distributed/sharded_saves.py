"""Saves and loads states of DTensors over several gloo ranks; test_checkpoint.py runs it once and judges what it found.

    python sharded_saves.py FOLDER

Leaves FOLDER/results.json: {case: {rank: what it saw}}.
"""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import forked

from ingot.errors import CheckpointError
from ingot.ranks import Ranks, all_reduce_sum
from ingot.train import shards
from ingot.train.checkpoint import Checkpoints, Progress

# Over two or three ranks: uneven, one row for all, columns, a scalar, bfloat16, and plain ones.
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype, Any]] = {
    "model/uneven": ((5, 3), torch.float32, Shard(0)),
    "model/one_row": ((1, 6), torch.bfloat16, Shard(0)),
    "model/columns": ((4, 7), torch.bfloat16, Shard(1)),
    "model/everywhere": ((9,), torch.float32, Replicate()),
    "model/plain": ((11, 2), torch.float32, None),
    "optimizer/uneven/step": ((), torch.float32, None),
    "optimizer/uneven/exp_avg": ((5, 3), torch.float32, Shard(0)),
    "optimizer/columns/step": ((), torch.float32, Replicate()),
}


def whole(seed: int) -> dict[str, torch.Tensor]:
    """The state in one piece."""
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, (shape, dtype, _) in SHAPES.items()}


class Bag:
    """The part of a Sharded that checkpoints use, over as many ranks as there are."""

    device = torch.device("cpu")

    def __init__(self, seed: int, world: int) -> None:
        self.tensors = whole(seed)
        if world > 1:
            mesh = init_device_mesh("cpu", (world,))
            for name, (_, _, placement) in SHAPES.items():
                if placement is not None:
                    self.tensors[name] = distribute_tensor(self.tensors[name], mesh, [placement])

    def state(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        self.tensors |= state

    def differs(self, seed: int) -> list[str]:
        """Names that are not bit for bit what `seed` gives."""
        found = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in self.tensors.items()}
        return [name for name, tensor in whole(seed).items() if not torch.equal(tensor, found[name])]


def checkpoints(folder: Path, ranks: Ranks) -> Checkpoints:
    return Checkpoints(folder, ranks, "hash", keep=3, strategy="test")


def at(step: int) -> Progress:
    return Progress(steps=9, recipe_hash="hash", step=step)


class Cases:
    """Each method is a case; it runs on every rank of its own launch and returns what the test judges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reshard_1_save_on_two(self, ranks: Ranks) -> Any:
        bag, kept = Bag(1, ranks.world), checkpoints(self.folder / "resharded", ranks)
        with slow_writer(0.1 * (1 + ranks.rank)):
            kept.save(bag, at(1))
            for tensor in bag.tensors.values():
                tensor.zero_()
            # The loop's own collectives go on meanwhile: on each rank the thread's fall between others of them.
            sums, busy = set(), 0.0
            while True:
                sums.add(all_reduce_sum(torch.ones(3)).sum().item())
                alive = all_reduce_sum(torch.tensor(float(kept._thread.is_alive()))).item()
                busy += alive
                if not alive:
                    break
            kept.wait()
        other = Bag(8, ranks.world)
        step = kept.load(other, "last", print).step
        copied = sum(tensor.numel() for tensor in kept._buffers.values())
        return {"busy": busy > 20, "sums": sums == {6.0}, "step": step, "differs": other.differs(1), "copied": copied}

    def reshard_2_to_one_and_back(self, ranks: Ranks) -> Any:
        kept, bag = checkpoints(self.folder / "resharded", ranks), Bag(8, 1)
        kept.load(bag, "last", print)
        differs = bag.differs(1)
        kept.save(Bag(2, 1), at(2))
        kept.wait()
        return {"differs": differs}

    def reshard_3_from_one_to_three(self, ranks: Ranks) -> Any:
        kept, bag = checkpoints(self.folder / "resharded", ranks), Bag(8, ranks.world)
        kept.load(bag, "last", print)
        differs = bag.differs(2)
        kept.save(Bag(3, ranks.world), at(3))
        kept.wait()
        return {"differs": differs}

    def reshard_4_from_three_to_two(self, ranks: Ranks) -> Any:
        kept, bag = checkpoints(self.folder / "resharded", ranks), Bag(8, ranks.world)
        kept.load(bag, "last", print)
        return {"differs": bag.differs(3)}

    def sharded_and_replicated(self, ranks: Ranks) -> Any:
        """Four ranks: two groups that hold the same, each spread over two."""
        mesh = init_device_mesh("cpu", (2, 2))
        bag = Bag(4, 1)
        for name in ("model/uneven", "model/columns", "optimizer/uneven/exp_avg"):
            bag.tensors[name] = distribute_tensor(bag.tensors[name], mesh, [Replicate(), Shard(0)])
        kept = checkpoints(self.folder / "hybrid", ranks)
        kept.save(bag, at(1))
        kept.wait()
        other = Bag(8, 1)
        shards.Written(kept.last).fill(other.tensors)
        return {"differs": other.differs(4), "copied": sum(tensor.numel() for tensor in kept._buffers.values())}

    def one_rank_cannot_write(self, ranks: Ranks) -> Any:
        kept = checkpoints(self.folder / "full", ranks)
        kept.save(Bag(1, ranks.world), at(1))
        kept.wait()
        real = shards.write

        def full(*args: Any) -> list[str]:
            real(*args)
            if ranks.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return []

        shards.write = full
        kept.save(Bag(2, ranks.world), at(2))
        while not all_reduce_sum(torch.tensor([float(kept.failed() is not None)])).item():
            time.sleep(0.01)
        said = raised(kept.wait)
        shards.write = real
        bag = Bag(8, ranks.world)
        step = kept.load(bag, "last", print).step
        left = sorted(path.name for path in kept.folder.iterdir())
        return {"said": said, "step": step, "differs": bag.differs(1), "left": left}

    def damaged_newest(self, ranks: Ranks) -> Any:
        kept = checkpoints(self.folder / "damaged", ranks)
        for step in (1, 2):
            kept.save(Bag(step, ranks.world), at(step))
        kept.wait()
        if ranks.main:  # the part that rank 1 wrote and verifies
            [path] = (kept.folder / "step-000002").glob("shard-00002*")
            path.write_bytes(path.read_bytes()[:-1])
        dist.barrier()
        bag, said = Bag(8, ranks.world), []
        step = kept.load(bag, "last", said.append).step
        return {"said": said, "step": step, "differs": bag.differs(1)}

    def nothing_usable(self, ranks: Ranks) -> Any:
        kept = checkpoints(self.folder / "nothing", ranks)
        kept.save(Bag(1, ranks.world), at(1))
        kept.wait()
        if ranks.main:
            (kept.folder / "step-000001" / "checkpoint.json").write_text("{")
        dist.barrier()
        return {"said": raised(lambda: kept.load(Bag(8, ranks.world), "last", print))}

    def other_recipe(self, ranks: Ranks) -> Any:
        kept = Checkpoints(self.folder / "damaged", ranks, "other", keep=3)
        return {"said": raised(lambda: kept.load(Bag(8, ranks.world), "last", print))}

    def rank_dies_in_a_save(self, ranks: Ranks) -> Any:
        kept = checkpoints(self.folder / "died", ranks)
        kept.save(Bag(1, ranks.world), at(1))
        kept.wait()
        real = shards.write

        def dies(*args: Any) -> list[str]:
            if ranks.rank == 1:
                os.kill(os.getpid(), 9)
            return real(*args)

        shards.write = dies
        kept.save(Bag(2, ranks.world), at(2))
        return {"said": raised(kept.wait), "left": sorted(path.name for path in kept.folder.iterdir())}


@contextlib.contextmanager
def slow_writer(seconds: float) -> Iterator[None]:
    real = shards.write

    def slow(*args: Any) -> list[str]:
        time.sleep(seconds)
        return real(*args)

    shards.write = slow
    yield
    shards.write = real


def raised(work: Any) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


WORLDS = {"reshard_2_to_one_and_back": 1, "reshard_3_from_one_to_three": 3, "sharded_and_replicated": 4}


def main(folder: Path) -> None:
    cases, results = Cases(folder), {}
    for name in sorted(name for name in vars(Cases) if not name.startswith("_")):

        def work(ranks: Ranks, name: str = name) -> None:
            found = getattr(cases, name)(ranks)
            (folder / f"{name}.{ranks.rank}.json").write_text(json.dumps(found))

        world = WORLDS.get(name, 2)
        codes = forked.ended(forked.start(world, work, folder))
        found = {rank: folder / f"{name}.{rank}.json" for rank in range(world)}
        results[name] = {
            str(rank): json.loads(path.read_text()) if path.exists() else {"code": codes[rank]}
            for rank, path in found.items()
        }
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
