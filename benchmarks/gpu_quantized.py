"""Weights in few bits turned back to bfloat16, and float8 products, beside the memory's speed."""

from typing import Any

import torch
from gpu_timing import Bench
from torch import Tensor, nn

from ingot.model.quantize import QuantizedLinear
from ingot.recipe import Quantization

HALF = torch.bfloat16
BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0, "fp8": 1.0}  # a weight, scales included where they count


def checks(bench: Bench) -> dict[str, Any]:
    """Weights turned back beside their definitions on the CPU, and float8 products beside those of that weight."""
    torch.manual_seed(0)
    plain, x = nn.Linear(256, 96, bias=False), torch.randn(48, 256)
    found: dict[str, Any] = {}
    for kind in BYTES:
        layer = QuantizedLinear(plain, Quantization(kind=kind))  # type: ignore[arg-type]
        whole = layer.dequantized(torch.float32)
        there = layer.to(bench.device)
        for dtype, limit in ((torch.float32, 1e-6), (HALF, 2**-8)):
            apart = (there.dequantized(dtype).cpu().float() - whole).abs().max() / whole.abs().max()
            found[f"{kind} to {str(dtype)[6:]}"] = {"apart": float(apart), "right": bool(apart <= limit)}
    there_x = x.to(bench.device, HALF)
    forward, back = (t.float().cpu() for t in (there.product(there_x), there.transposed_product(there_x[:, :96])))
    for name, own, true in (("float8 product", forward, x @ whole.t()), ("its gradient", back, x[:, :96] @ whole)):
        apart = (own - true).norm() / true.norm()
        found[name] = {"apart": float(apart), "right": bool(apart < 0.05)}  # 3 bits of mantissa
    return found


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
