"""Which ranks do what. Ranks of one tensor group share matrix products, of one context group lines of tokens; the rest
get other rows.
"""

# B rows, T tokens of a line, t tokens of this rank's part of it

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from ingot.errors import RecipeError
from ingot.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """rank = (data_rank * context + context_rank) * tensor + tensor_rank: those that talk most are neighbours.

    `grid` and `context_group` are there after `connected`.
    """

    ranks: Ranks = field(default_factory=Ranks)
    context: int = 1
    tensor: int = 1
    grid: DeviceMesh | None = None
    """[data * context, tensor], named `parts` and `tensor`: the first adds up gradients, the second shares products."""
    context_group: dist.ProcessGroup | None = None
    """The ranks that share this rank's lines."""

    def __post_init__(self) -> None:
        shared = self.context * self.tensor
        if self.ranks.world % shared:
            name = "tensor" if self.tensor > 1 else "context"
            raise RecipeError(
                f"parallel.{name}",
                getattr(self, name),
                f"{self.ranks.world} ranks cannot be parted into groups of context x tensor = {shared}; launch a "
                "multiple of that, or change one of the two",
            )

    @property
    def data(self) -> int:
        """Groups of ranks that get rows of their own."""
        return self.ranks.world // (self.context * self.tensor)

    @property
    def data_rank(self) -> int:
        """The group of this rank: which rows it gets."""
        return self.ranks.rank // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        """Which part of a line this rank gets."""
        return self.ranks.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        """Which part of a cut matrix this rank holds."""
        return self.ranks.rank % self.tensor

    @property
    def loss_parts(self) -> int:
        """Ranks whose losses add up to the step's: those of a tensor group all hold the same one."""
        return self.data * self.context

    def cut(self, line_BT: Tensor) -> Tensor:
        """This rank's part [B, t] of a line [B, T]; T is a multiple of `context`."""
        return line_BT if self.context == 1 else line_BT.chunk(self.context, dim=1)[self.context_rank]

    def spread(self, tensor: Tensor) -> Tensor:
        """A DTensor of one dimension of the grid as one of the whole grid, which tells which ranks hold the same."""
        names = (self.grid.mesh_dim_names if self.grid is not None else None) or ()
        own = tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else None
        if self.grid is None or not isinstance(tensor, DTensor) or own is None or len(own) > 1 or own[0] not in names:
            return tensor
        placements = [tensor.placements[0] if name == own[0] else Replicate() for name in names]
        return _with_layout_of(tensor, self.grid, placements, tensor)

    def connected(self, device_type: str, timeout: timedelta) -> "Layout":
        """With `grid` and `context_group`. Every rank must call it, in the same order as its other collectives."""
        everyone = torch.arange(self.ranks.world).view(self.loss_parts, self.tensor)
        parts, tensor = _group(everyone.t(), timeout), _group(everyone, timeout)
        grid = DeviceMesh.from_group([parts, tensor], device_type, mesh=everyone, mesh_dim_names=("parts", "tensor"))
        by_line = everyone.view(self.data, self.context, self.tensor).transpose(1, 2).reshape(-1, self.context)
        return replace(self, grid=grid, context_group=_group(by_line, timeout))


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What `spread` made of a tensor that lies as `parameter` does, maybe with another last dimension, as it was."""
    if not isinstance(tensor, DTensor) or not isinstance(parameter, DTensor):
        return tensor
    return _with_layout_of(tensor, parameter.device_mesh, parameter.placements, tensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _with_layout_of(tensor: DTensor, mesh: DeviceMesh, placements: Sequence[Placement], whole: Tensor) -> DTensor:
    return DTensor.from_local(
        tensor.to_local(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _group(members: Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """The group of this rank, of those that the rows of `members` list."""
    group, _ = dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)
    return group
