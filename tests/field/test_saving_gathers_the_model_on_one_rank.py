"""A checkpoint gathers the whole state on one rank, or a rank reads more than its part.

torchtune#1092, #1735 (a host of a terabyte is killed), #2885 (1,000 s a checkpoint): the run is lost when it is saved.
One process plays a rank of eight here: torch's "fake" backend answers collectives at once, and none may be asked.
"""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ingot.ranks import Ranks
from ingot.train import shards

WORLD, RANK = 8, 3
ROWS, COLUMNS = 4096, 256  # 4 MiB in float32
PART = ROWS // WORLD * COLUMNS


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    yield init_device_mesh("cpu", (WORLD,))
    dist.destroy_process_group()


class Watch(TorchDispatchMode):
    """The largest tensor that any operation makes memory for, and every operation by name."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        views = any(value.alias_info is not None for value in func._schema.returns)
        for tensor in result if isinstance(result, list | tuple) else [result]:
            # Bytes are a mapped file: only what is touched of it takes memory.
            if isinstance(tensor, torch.Tensor) and not views and tensor.dtype != torch.uint8:
                self.largest = max(self.largest, tensor.numel())
        return result


def part_of(mesh: DeviceMesh, value: float) -> DTensor:
    local = torch.full((ROWS // WORLD, COLUMNS), value)
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size([ROWS, COLUMNS]), stride=(COLUMNS, 1)
    )


def state_of(mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """A matrix cut over the ranks with its moments, and small ones that every rank holds (a DDP model)."""
    cut = {name: part_of(mesh, 1.0) for name in ("model/a", "optimizer/a/exp_avg", "optimizer/a/exp_avg_sq")}
    return cut | {f"model/{number}": torch.full((ROWS // 8, 8), 2.0) for number in range(32)}


def test_a_rank_copies_its_part_and_asks_nobody(mesh):
    state, buffers = state_of(mesh), {}
    with Watch() as watch:
        shards.take(state, Ranks(RANK, WORLD), buffers)
    assert watch.largest == PART
    assert not [name for name in watch.names if "c10d" in name]
    copied = sum(tensor.numel() for tensor in buffers.values())
    assert copied == sum(tensor.numel() for tensor in state.values()) / WORLD
    # The check can fail: this is what the others did.
    with Watch() as watch:
        state["model/a"].full_tensor()
    assert [name for name in watch.names if "c10d" in name]
    assert watch.largest >= ROWS * COLUMNS


def test_writing_holds_one_file_beside_the_copy(mesh, tmp_path, monkeypatch):
    state = {f"model/{number}": part_of(mesh, 1.0) for number in range(16)}
    part = shards.take(state, Ranks(RANK, WORLD), {})
    size = 4 * PART
    monkeypatch.setattr(shards, "FILE_BYTES", size)
    names, peak = traced(lambda: shards.write(tmp_path, part, RANK))
    assert len(names) == 16
    assert peak < 4 * size
    # In one file the same takes twice the whole part.
    monkeypatch.setattr(shards, "FILE_BYTES", 1 << 30)
    assert traced(lambda: shards.write(tmp_path, part, RANK))[1] > 16 * size


def test_a_rank_reads_its_part_only(mesh, tmp_path):
    """Also of a checkpoint that one rank wrote in one piece."""
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    shards.write(tmp_path, shards.take({"model/a": whole}, Ranks(), {}), 0)
    target = part_of(mesh, 0.0)
    with Watch() as watch:
        _, peak = traced(lambda: shards.Written(tmp_path).fill({"model/a": target}))
    assert torch.equal(target.to_local(), whole[RANK * ROWS // WORLD : (RANK + 1) * ROWS // WORLD])
    assert watch.largest <= PART
    assert peak < 2 * 4 * PART


def traced(work):
    """(what `work` returned, bytes that Python held at most while it ran: safetensors hands out Python's bytes)."""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_file_of_a_checkpoint_is_a_pickle(mesh, tmp_path: Path):
    shards.write(tmp_path, shards.take(state_of(mesh), Ranks(RANK, WORLD), {}), RANK)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}
