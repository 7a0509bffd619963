"""The norm of a gradient whose parts lie on several ranks, each part counted once."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip(gradients: Sequence[Tensor], limit: float, *, scale: bool = True) -> float:
    """Scale `gradients` in place to a global L2 norm of at most `limit`; return the norm before.

    Without `scale` they stay as they are, for an update that multiplies by `factor` itself.

    Plain tensors are the same on all ranks; of a DTensor each rank holds a part in the mesh dimensions that cut it and
    the same in the others. Every rank of the meshes must call it with its parts of the same gradients.
    """
    parts: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            parts[None, ()].append(gradient)
            continue
        assert not any(placement.is_partial() for placement in gradient.placements)
        cut = tuple(number for number, placement in enumerate(gradient.placements) if not placement.is_replicate())
        parts[gradient.device_mesh, cut].append(gradient.to_local())
    squares = []
    for (mesh, cut), tensors in parts.items():
        square = torch.nn.utils.get_total_norm(tensors, foreach=True).double().square()
        for number in cut:
            assert mesh is not None
            square = square.to(mesh.device_type)  # parameters that are kept in CPU memory have their gradients there
            dist.all_reduce(square, group=mesh.get_group(number))
        squares.append(square.cpu())
    if not squares:
        return 0.0
    norm = torch.stack(squares).sum().sqrt().item()
    if scale and factor(norm, limit) < 1.0:
        torch._foreach_mul_([tensor for group in parts.values() for tensor in group], factor(norm, limit))
    return norm


def factor(norm: float, limit: float) -> float:
    """What makes a gradient of this norm one of at most `limit`, as torch.nn.utils.clip_grad_norm_ reckons it."""
    return min(1.0, limit / (norm + 1e-6))
