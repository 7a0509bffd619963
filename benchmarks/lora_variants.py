"""Five orders of a linear layer with an adapter, forward and backward, on this machine's CPU.

    python benchmarks/lora_variants.py [OUT.md]

All give the same numbers, which is checked first. Times are the least of interleaved repeats, so that a neighbour's
load meets every order alike. M rows, K inputs, N outputs, R rank.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

RANK, REPEATS = 16, 7
SHAPES = [(512, 512), (512, 1408), (1408, 512), (1024, 2816)]
ROWS = [1024, 2048]


class Case(NamedTuple):
    """`wide` is [W | B] [N, K + R], `tall` is [W; A] [N + R, K]: both would be kept beside the layer."""

    x: Tensor  # [M, K]
    g: Tensor  # [M, N]
    weight: Tensor  # [N, K]
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    wide: Tensor
    tall: Tensor


def bare(c: Case) -> tuple[Tensor, Tensor]:
    """The floor: the two products of the frozen weight alone."""
    return c.x @ c.weight.t(), c.g @ c.weight


def separate(c: Case) -> tuple[Tensor, Tensor]:
    """Products apart, then added: what autograd does with peft's formula."""
    down_MR, grad_MR = c.x @ c.a.t(), c.g @ c.b
    _adapter_gradients(c, down_MR, grad_MR)
    return c.x @ c.weight.t() + down_MR @ c.b.t(), c.g @ c.weight + grad_MR @ c.a


def small_last(c: Case) -> tuple[Tensor, Tensor]:
    """The adapter's product is added to the weight's."""
    down_MR, grad_MR = c.x @ c.a.t(), c.g @ c.b
    _adapter_gradients(c, down_MR, grad_MR)
    y_MN = (c.x @ c.weight.t()).addmm_(down_MR, c.b.t())
    return y_MN, (c.g @ c.weight).addmm_(grad_MR, c.a)


def big_last(c: Case) -> tuple[Tensor, Tensor]:
    """The weight's product is added to the adapter's."""
    down_MR, grad_MR = c.x @ c.a.t(), c.g @ c.b
    _adapter_gradients(c, down_MR, grad_MR)
    y_MN = (down_MR @ c.b.t()).addmm_(c.x, c.weight.t())
    return y_MN, (grad_MR @ c.a).addmm_(c.g, c.weight)


def augmented(c: Case) -> tuple[Tensor, Tensor]:
    """[x | S] [W | B]^T: the rank joins the inputs; x is copied."""
    down_MR = c.x @ c.a.t()
    y_MN = torch.cat([c.x, down_MR], 1) @ c.wide.t()
    both = c.g @ c.wide
    dx_MK, grad_MR = both[:, : c.x.shape[1]], both[:, c.x.shape[1] :]
    _adapter_gradients(c, down_MR, grad_MR)
    return y_MN, dx_MK.addmm_(grad_MR, c.a)


def bordered(c: Case) -> tuple[Tensor, Tensor]:
    """x [W; A]^T: the rank joins the outputs, which are then a view with gaps; the gradient is copied."""
    both = c.x @ c.tall.t()
    y_MN, down_MR = both[:, : c.g.shape[1]], both[:, c.g.shape[1] :]
    y_MN.addmm_(down_MR, c.b.t())
    grad_MR = c.g @ c.b
    _adapter_gradients(c, down_MR, grad_MR)
    return y_MN, torch.cat([c.g, grad_MR], 1) @ c.tall


def _adapter_gradients(c: Case, down_MR: Tensor, grad_MR: Tensor) -> tuple[Tensor, Tensor]:
    """Of A and B: the same two products in every order."""
    return grad_MR.t() @ c.x, c.g.t() @ down_MR


ORDERS: list[Callable[[Case], tuple[Tensor, Tensor]]] = [bare, separate, small_last, big_last, augmented, bordered]


def case(M: int, K: int, N: int, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    x, g, w = torch.randn(M, K), torch.randn(M, N), torch.randn(N, K) / K**0.5
    a, b = torch.randn(RANK, K) / K**0.5, torch.randn(N, RANK) / 10
    parts = [t.to(dtype) for t in (x, g, w, a, b)]
    return Case(*parts, torch.cat([parts[2], parts[4]], 1), torch.cat([parts[2], parts[3]]))


def check(c: Case) -> None:
    """Raises AssertionError unless all orders agree."""
    wanted = separate(c)
    tolerance = 1e-4 if c.x.dtype == torch.float32 else 0.1
    for order in ORDERS[2:]:
        for one, other in zip(order(c), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def timed(c: Case) -> list[float]:
    """Least milliseconds of each order."""
    times: list[list[float]] = [[] for _ in ORDERS]
    for _ in range(REPEATS):
        for order, found in zip(ORDERS, times, strict=True):
            start = time.perf_counter()
            order(c)
            found.append(1e3 * (time.perf_counter() - start))
    return [min(found[1:]) for found in times]


Three = list[Case]  # of one input: queries, keys and values


def apart(three: Three) -> tuple[list[Tensor], Tensor]:
    """`big_last` of each: x is read three times for the A's, and three times for their gradients."""
    outputs, dx_MK = [], None
    for c in three:
        down_MR, grad_MR = c.x @ c.a.t(), c.g @ c.b
        _adapter_gradients(c, down_MR, grad_MR)
        outputs.append((down_MR @ c.b.t()).addmm_(c.x, c.weight.t()))
        dx_MK = grad_MR @ c.a if dx_MK is None else dx_MK.addmm_(grad_MR, c.a)
        dx_MK.addmm_(c.g, c.weight)
    assert dx_MK is not None
    return outputs, dx_MK


def stacked(three: Three) -> tuple[list[Tensor], Tensor]:
    """One product with all A's one below the other, and one for all their gradients; the A's are copied together."""
    x, a = three[0].x, torch.cat([c.a for c in three])
    downs = (x @ a.t()).split(RANK, 1)
    outputs = [(down @ c.b.t()).addmm_(c.x, c.weight.t()) for c, down in zip(three, downs, strict=True)]
    grads = torch.cat([c.g @ c.b for c in three], 1)
    grads.t() @ x  # of all A's
    dx_MK = grads @ a
    for c, down in zip(three, downs, strict=True):
        c.g.t() @ down
        dx_MK.addmm_(c.g, c.weight)
    return outputs, dx_MK


def of_one_input(M: int, dtype: torch.dtype) -> list[float]:
    """Least milliseconds of `apart` and `stacked` for heads of 512, 256 and 256 over 512 inputs."""
    three = [case(M, 512, N, dtype) for N in (512, 256, 256)]
    three = [c._replace(x=three[0].x) for c in three]
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for one, other in zip(apart(three)[0], stacked(three)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(apart(three)[1], stacked(three)[1], rtol=tolerance, atol=tolerance)
    times: list[list[float]] = [[], []]
    for _ in range(4 * REPEATS):
        for order, found in zip((apart, stacked), times, strict=True):
            start = time.perf_counter()
            order(three)
            found.append(1e3 * (time.perf_counter() - start))
    return [min(found[1:]) for found in times]


def main() -> None:
    lines = [
        f"# Orders of a LoRA linear, CPU ({torch.get_num_threads()} threads, torch {torch.__version__}, rank {RANK})",
        "",
        "Forward and backward, milliseconds, least of interleaved repeats, beside other work: differences under 10 %",
        "mean nothing. `bare` is the frozen weight's two products alone. `augmented` and `bordered` leave out what it",
        "costs to keep a second copy of the weight, and to renew it after every step.",
        "",
        "| type | M | K | N | " + " | ".join(order.__name__ for order in ORDERS) + " |",
        "|---|---|---|---|" + "---|" * len(ORDERS),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        total = torch.zeros(len(ORDERS))
        for M in ROWS:
            for K, N in SHAPES:
                c = case(M, K, N, dtype)
                check(c)
                found = timed(c)
                total += torch.tensor(found)
                lines.append(f"| {str(dtype)[6:]} | {M} | {K} | {N} | " + " | ".join(f"{t:.1f}" for t in found) + " |")
        lines.append(f"| {str(dtype)[6:]} | all | | | " + " | ".join(f"{t:.1f}" for t in total.tolist()) + " |")
    lines += ["", "Three projections of one input (512 to 512, 256 and 256), their A's apart and stacked:", ""]
    lines += ["| type | M | apart | stacked |", "|---|---|---|---|"]
    for dtype in (torch.float32, torch.bfloat16):
        for M in ROWS:
            two = of_one_input(M, dtype)
            lines.append(f"| {str(dtype)[6:]} | {M} | {two[0]:.2f} | {two[1]:.2f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results/lora_variants.md"
    out.write_text(text)


if __name__ == "__main__":
    main()
