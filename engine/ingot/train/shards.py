"""A state <-> sharded safetensors, in the layout of torch.distributed.checkpoint: every rank writes and reads its part.

Ranks need no agreement for it: who writes what is a function of names, sizes and the mesh. So no rank ever copies more
than its part, a tensor that all hold included, and planners and storage are driven here without their collectives.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    Metadata,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.tensor import DTensor

from ingot.errors import CheckpointError
from ingot.ranks import Ranks

# torch 2.13 serializes a whole file in memory before it writes it, so files bound what a save needs beside its copy.
FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Part:
    """What one rank writes: where each piece belongs in its tensor, and copies of the pieces in host memory."""

    items: list[WriteItem]
    copies: dict[str, Tensor]


def take(state: dict[str, Tensor], ranks: Ranks, buffers: dict[str, Tensor]) -> Part:
    """Copy this rank's part of `state` into `buffers`, which are made at the first call and used again afterwards.

    Raises CheckpointError for a tensor without elements: a strategy that forgot to put its parts together.
    """
    empty = [name for name, tensor in state.items() if not tensor.numel()]
    if empty:
        raise CheckpointError(f"{len(empty)} of {len(state)} tensors to be saved are empty: {empty[:3]}")
    own = _own(state, ranks)
    plan = create_default_local_save_plan(own, False)
    for name, tensor in own.items():
        local = _local(tensor)
        if name not in buffers or buffers[name].shape != local.shape or buffers[name].dtype != local.dtype:
            buffers[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        buffers[name].copy_(local, non_blocking=True)
    if any(tensor.is_cuda for tensor in own.values()):
        torch.cuda.synchronize()
    return Part(plan.items, {name: buffers[name] for name in own})


def write(folder: Path, part: Part, rank: int) -> list[str]:
    """Write this rank's part as synced files of about FILE_BYTES; return their names. Raises OSError."""
    files = _files(part.copies)
    writer = HuggingFaceStorageWriter(str(folder), files or None, save_distributed=True)
    # The writer numbers files by a plan's place among the ranks' plans.
    plans: list[SavePlan] = [SavePlan([])] * rank + [SavePlan(part.items)]
    results = writer.write_data(writer.prepare_global_plan(plans)[rank], _Copies(part.copies)).wait()
    return sorted({result.storage_data.relative_path for result in results})


class Written:
    """A state that was written by any number of ranks, open for reading.

    `tensors`: name -> shape (`size`), `properties.dtype` and `chunks` of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        self.metadata: Metadata = self._reader.read_metadata()
        found = self.metadata.state_dict_metadata
        self.tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, TensorStorageMetadata)}

    def check_complete(self) -> None:
        """Raise CheckpointError when the pieces of a tensor do not make up the whole of it."""
        for name, tensor in self.tensors.items():
            found = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if found != math.prod(tensor.size):
                raise CheckpointError(f"{self.folder}: {found:,} of {math.prod(tensor.size):,} elements of {name}")

    def fill(self, state: dict[str, Tensor], *, others: Iterable[str] = ()) -> None:
        """Fill the tensors of `state` (of a DTensor this rank's part), whatever ranks wrote them.

        `others` are names that may be in the files and not in `state`. Raises CheckpointError when names or shapes
        differ otherwise.
        """
        self._check_names(state, set(others))
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(
            {name: tensor for name, tensor in state.items() if _local(tensor).numel()}, self.metadata, False
        )
        self._reader.set_up_storage_reader(self.metadata, False)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(planner.finish_plan(plan), planner).wait()

    def _check_names(self, wanted: dict[str, Tensor], others: set[str]) -> None:
        missing = [name for name in wanted if name not in self.tensors]
        extra = [name for name in self.tensors if name not in wanted and name not in others]
        if missing or extra:
            raise CheckpointError(
                f"{self.folder} does not fit this model and strategy: {len(missing)} tensors are missing {missing[:3]}"
                f", {len(extra)} have no place {extra[:3]}"
            )
        for name, tensor in wanted.items():
            if tensor.shape != self.tensors[name].size:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(self.tensors[name].size)}, the model wants "
                    f"{list(tensor.shape)}"
                )


class _Copies(DefaultSavePlanner):
    """Hands the writer what `take` copied."""

    def __init__(self, copies: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(copies)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def _own(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of which this rank writes a piece. Of ranks that hold the same, the one with least to do writes it:
    a sum over global sizes, so all of them come to the same answer.
    """
    loads: dict[int, list[int]] = {}
    own = {}
    for name, tensor in state.items():
        number, copies = _replica(tensor, ranks)
        load = loads.setdefault(copies, [0] * copies)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if number == writer and _local(tensor).numel():
            own[name] = tensor
    return own


def _replica(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """(number of this rank among those that hold the same elements, how many do); -1 for a rank that holds none."""
    if not isinstance(tensor, DTensor):
        return ranks.rank, ranks.world
    place = tensor.device_mesh.get_coordinate()
    if place is None:
        return -1, 1
    number, copies = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            number, copies = number * tensor.device_mesh.size(dim) + place[dim], copies * tensor.device_mesh.size(dim)
    return number, copies


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _files(copies: dict[str, Tensor]) -> dict[str, int]:
    """Name -> number of its file, from 1; a file is closed when it has reached FILE_BYTES."""
    files, number, used = {}, 1, 0
    for name, tensor in copies.items():
        if used >= FILE_BYTES:
            number, used = number + 1, 0
        files[name] = number
        used += tensor.numel() * tensor.element_size()
    return files
