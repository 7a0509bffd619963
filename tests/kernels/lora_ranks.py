"""Adapted layers under FSDP2 on two gloo ranks, beside one process's; test_lora_linear_compiled.py runs it and judges.

    python lora_ranks.py FOLDER

Each rank leaves FOLDER/RANK.json: {case: largest difference, as a share of the gradient's size}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import forked

from ingot.model.quantize import QuantizedLinear
from ingot.ranks import Ranks
from ingot.recipe import Quantization
from ingot_kernels.lora_linear import Adapter, Projection, lora_linear

M, K, R = 6, 32, 3
KINDS = ("plain", "nf4", "int8", "fp8")


class Block(nn.Module):
    """Two layers that share an input, each with an adapter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        linears = [nn.Linear(K, K).requires_grad_(False) for _ in range(2)]
        if kind != "plain":
            section = Quantization(kind=kind)  # type: ignore[arg-type]
            linears = [QuantizedLinear(linear, section) for linear in linears]
        self.bases = nn.ModuleList(linears)
        self.downs = nn.ParameterList([nn.Parameter(torch.randn(R, K) / 4) for _ in range(2)])
        self.ups = nn.ParameterList([nn.Parameter(torch.randn(K, R) / 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        projections = []
        for base, a, b in zip(self.bases, self.downs, self.ups, strict=True):
            held: Any = base
            weight = held if isinstance(held, QuantizedLinear) else held.weight
            projections.append(Projection(weight, held.bias, (Adapter(a, b, 0.5),)))
        gate, up = lora_linear(x, projections)
        return gate.tanh() * up


def trained(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fsdp(rank: int, kind: str, compiled: bool) -> float:
    """Each rank has its half of the rows; FSDP2 takes the mean of the ranks' gradients."""
    torch.manual_seed(1)
    one, many = (nn.Sequential(Block(kind), Block(kind)) for _ in range(2))
    many.load_state_dict(one.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    if compiled:
        for block in many:
            block.compile(backend="aot_eager")
    for block in many:
        fully_shard(block, mesh=mesh)
    fully_shard(many, mesh=mesh)
    x = torch.randn(M, K)
    for scale in (1.0, 2.0):  # two backward passes: gradients add up
        (scale * one(x)).sum().backward()
        (scale * many(x[rank * M // 2 : (rank + 1) * M // 2])).sum().backward()
    differences = []
    for own, other in zip(trained(many), trained(one), strict=True):
        assert isinstance(own.grad, DTensor)
        differences.append(float((own.grad.full_tensor() * 2 - other.grad).abs().max() / other.grad.abs().max()))
    return max(differences)


def work(ranks: Ranks, folder: Path) -> None:
    seen = {kind: fsdp(ranks.rank, kind, compiled=False) for kind in KINDS}
    seen |= {f"{kind} compiled": fsdp(ranks.rank, kind, compiled=True) for kind in ("plain", "nf4")}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    forked.done(2, lambda ranks: work(ranks, Path(sys.argv[1])), Path(sys.argv[1]))
