"""Weights in few bits turned back to bfloat16, float8 products, and the 8-bit optimizer, beside the memory's speed."""

from typing import Any

import torch
from gpu_timing import Bench
from torch import Tensor, nn

from ingot.model.quantize import QuantizedLinear
from ingot.recipe import Quantization

HALF = torch.bfloat16
BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0, "fp8": 1.0}  # a weight, scales included where they count


def cases(bench: Bench, machine: Any, sizes: Any) -> dict[str, Any]:
    """Each kind's weight of an MLP turned back; and float8's two products beside bfloat16's."""
    found: dict[str, Any] = {}
    N, K = sizes.inner, sizes.hidden
    with torch.device(bench.device):
        plain = nn.Linear(K, N, bias=False, dtype=HALF)
    out = torch.empty(N, K, dtype=HALF, device=bench.device)
    for kind, size in BYTES.items():
        layer = QuantizedLinear(plain, Quantization(kind=kind))  # type: ignore[arg-type]
        times = bench.alternate({"ingot": lambda layer=layer: layer.dequantized(HALF, out)})
        floor = machine.floor((size + 2) * N * K)
        if "seconds" in times["ingot"]:
            times["ingot"]["roofline_share"] = floor / times["ingot"]["seconds"]
        found[f"{kind} to bfloat16, {N} x {K}"] = {"floor_seconds": floor, "contenders": times, "ratio": {}}
    layer = QuantizedLinear(plain, Quantization(kind="fp8"))
    for M in sizes.linears:
        x, grad = (torch.randn(M, width, device=bench.device).to(HALF) for width in (K, N))
        found[f"float8 products, {M} tokens"] = _products(bench, layer, plain, x, grad)
    return found


def _products(bench: Bench, layer: QuantizedLinear, plain: nn.Linear, x: Tensor, grad: Tensor) -> dict[str, Any]:
    """Forward and the gradient of x; `ratio`: how many times as long bfloat16 takes."""
    weight = plain.weight.detach()

    def float8() -> None:
        layer.product(x)
        layer.transposed_product(grad)

    def bfloat16() -> None:
        x @ weight.t()
        grad @ weight

    times = bench.alternate({"ingot": float8, "bfloat16": bfloat16})
    ratio = times["bfloat16"]["seconds"] / times["ingot"]["seconds"] if "seconds" in times["ingot"] else None
    return {"contenders": times, "ratio": {} if ratio is None else {"bfloat16": ratio}}
