"""Matrices laid out for oneDNN: a model that writes on a CPU multiplies few rows by large matrices.

torch hands them to a library that lays each one out again in every pass. On one core, 16 rows by [32,000, 512] in
float32 took 14 ms that way and 6 ms as here, 64 rows 34 and 20 ms, 588 rows 234 and 205 ms; a step of 16 rows of 42
million parameters 57 and 38 ms, one of 4 rows 35 and 19 ms.
"""

import torch
from torch import Tensor, nn

CLOSE = 1e-4  # the trial's results reach 30


class PackedLinear(nn.Module):
    """What `linear` computes, without gradients. Its matrix is held once, in an order of oneDNN's own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = nn.Parameter(_packed(linear.weight.detach()), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """A copy of the matrix, for whoever reads it."""
        return self.packed.to_dense()

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.shape[:-1].numel()
        more = rounded(rows) - rows
        if not more:
            return _multiplied(inputs, self.packed, self.bias)
        padded = nn.functional.pad(inputs.reshape(rows, inputs.shape[-1]), (0, 0, 0, more))
        return _multiplied(padded, self.packed, self.bias)[:rows].view(*inputs.shape[:-1], -1)


def rounded(rows: int) -> int:
    """`rows`, or up to an eighth more, so that 64 numbers stand for all of up to 1,024.

    oneDNN keeps code for each number of rows and each shape of a matrix that it has met, 0.57 MB each, the last 1,024
    of them: up to 580 MB, strewn over the memory, whose holes grew too.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def pack(model: nn.Module) -> None:
    """Pack the matrices of a model that only answers, in place: plain layers in float32 on a CPU.

    A matrix that others hold too (the embeddings', where they are tied) stays as it is, and so does a model with
    adapters, which read the matrices below them.
    """
    if hasattr(model, "get_base_model") or not packs():
        return
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and seen[id(layer.weight)] == 1 and _plain(layer):
                setattr(parent, name, PackedLinear(layer))


def _plain(layer: nn.Linear) -> bool:
    weight = layer.weight
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32 and not hooked


def packs() -> bool:
    """Whether this torch packs matrices and multiplies by them: its operations for that are not public."""
    if not torch.backends.mkldnn.is_available():
        return False
    weight, inputs = torch.linspace(-1, 1, 48 * 32).view(48, 32), torch.linspace(0, 1, 3 * 32).view(3, 32)
    try:
        return bool(torch.allclose(_multiplied(inputs, _packed(weight), None), inputs @ weight.T, atol=CLOSE))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _multiplied(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return output
