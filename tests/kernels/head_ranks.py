"""Cross-entropy of a head on two gloo ranks, beside one process's; test_linear_cross_entropy.py runs it and judges.

    python head_ranks.py FOLDER

Each rank leaves FOLDER/RANK.json: {case: largest difference, or what was raised}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import forked

from ingot.ranks import Ranks
from ingot_kernels import cross_entropy
from ingot_kernels.gated import swiglu
from ingot_kernels.linear_cross_entropy import (
    IGNORE,
    Head,
    LowRank,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from ingot_kernels.rms_norm import add_rms_norm
from ingot_kernels.rope import qk_rope

N, H, V, R = 13, 8, 38, 3
FORM: dict[str, float] = {"label_smoothing": 0.1, "z_loss": 0.02}


def drawn() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((N, H), (V, H), (V,), (R, H), (V, R))]
    targets = torch.randint(V, (N,))
    targets[1::3] = IGNORE
    return tensors, targets


def head_of(tensors: list[Tensor]) -> Head:
    _, weight, bias, a, b = tensors
    return Head(weight, bias, LowRank(a, b, 0.7), 0.5, 2.0)


def difference(ours: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((own - other).detach().abs().max()) for own, other in zip(ours, expected, strict=True))


def sliced(tensors: list[Tensor], rank: int) -> list[Tensor]:
    """This rank's half of the rows of weight, bias and b."""
    own = slice(rank * V // 2, (rank + 1) * V // 2)
    return [t if n in (0, 3) else t[own] for n, t in enumerate(tensors)]


def vocabulary(rank: int, reduction: str, trainable: bool, impl: str, function: Any = linear_cross_entropy) -> float:
    tensors, targets = drawn()
    n_leaves = 5 if trainable else 1
    upstream = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(1.5)
    expected = linear_cross_entropy_reference(tensors[0], head_of(tensors), targets, reduction=reduction, **FORM)
    gradients = list(torch.autograd.grad(expected, tensors[:n_leaves], upstream))
    leaves = [t.detach().clone().requires_grad_(n < n_leaves) for n, t in enumerate(sliced(tensors, rank))]
    options = {**FORM, "reduction": reduction, "group": dist.group.WORLD, "impl": impl, "chunk_bytes": 3 * V * 4}
    loss = function(leaves[0], head_of(leaves), targets, **options)
    found = list(torch.autograd.grad(loss, leaves[:n_leaves], upstream))
    if trainable:
        gradients = sliced(gradients, rank)
    return difference([loss, *found], [expected, *gradients])


def unreduced(rank: int) -> float:
    own = dist.all_reduce
    dist.all_reduce = lambda *_, **__: None
    try:
        return vocabulary(rank, "sum", True, "torch")
    finally:
        dist.all_reduce = own


class Graded(nn.Linear):
    """A head whose forward is the loss, as the engine's is."""

    def forward(self, hidden: Tensor, targets: Tensor, reduction: Any) -> Tensor:  # type: ignore[override]
        return linear_cross_entropy(hidden, Head(self.weight), targets, reduction=reduction, chunk_bytes=3 * V * 4)


class Tiny(nn.Module):
    """Every operation with weights that ranks hold parts of, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.RMSNorm(H), nn.RMSNorm(H // 2)
        self.body, self.head = nn.Linear(H, 2 * H), Graded(H, V, bias=False)

    def forward(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        normed, total = add_rms_norm(x, x.flip(1), self.norm.weight, 0.1)
        gate, up = self.body(normed).chunk(2, dim=-1)
        q, k = (t.view(1, -1, 2, H // 2) for t in (swiglu(gate, up), total))
        angle = torch.arange(4.0).expand(1, q.shape[1], 4)
        q, k = qk_rope(q, k, angle.cos(), angle.sin(), (self.heads.weight, self.heads.weight), 0.1)
        loss: Tensor = self.head((q * k).transpose(1, 2).reshape(-1, H), targets, reduction)
        return loss


def fsdp(rank: int, reduction: str) -> float:
    """Each rank has its half of the rows; FSDP2 takes the mean of the ranks' gradients."""
    (x, *_), targets = drawn()
    weights = torch.linspace(0.5, 2, N)

    def step(model: nn.Module, part: slice) -> None:
        for scale in (1.0, 2.0):  # two backward passes: gradients add up
            losses = model(x.detach()[part], targets[part], reduction)
            (scale * (losses * weights[part] if reduction == "none" else losses)).sum().backward()

    torch.manual_seed(1)
    one, many = Tiny(), Tiny()
    many.load_state_dict(one.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(many.head, mesh=mesh)
    fully_shard(many, mesh=mesh)
    step(one, slice(None))
    step(many, slice(0, N // 2) if rank == 0 else slice(N // 2, N))
    found = []
    for parameter in many.parameters():
        assert isinstance(parameter.grad, DTensor)
        found.append(parameter.grad.full_tensor() * 2)
    return difference(found, [p.grad for p in one.parameters()])


def whole_graph(rank: int) -> str:
    torch._dynamo.reset()  # otherwise it remembers that it gave up on this function, and leaves it to eager
    try:
        vocabulary(rank, "sum", True, "torch", torch.compile(linear_cross_entropy, backend="eager", fullgraph=True))
    except Exception as error:
        return str(error)
    return "nothing was raised"


def work(ranks: Ranks, folder: Path) -> None:
    cross_entropy.TRITON_BLOCK = 8
    seen: dict[str, Any] = {}
    for reduction in ("sum", "none"):
        for trainable in (False, True):
            for impl in ("torch", "triton"):
                name = f"vocabulary {reduction} {'trainable' if trainable else 'frozen'} {impl}"
                seen[name] = vocabulary(ranks.rank, reduction, trainable, impl)
        seen[f"fsdp {reduction}"] = fsdp(ranks.rank, reduction)
    seen["vocabulary without its last all_reduce"] = unreduced(ranks.rank)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager")
    seen["compiled"] = vocabulary(ranks.rank, "sum", True, "torch", compiled)
    seen["compiled whole"] = whole_graph(ranks.rank)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    forked.done(2, lambda ranks: work(ranks, Path(sys.argv[1])), Path(sys.argv[1]))
