"""Compile every Triton kernel for a GPU that need not be there, as the operations launch it.

    python compile_kernels.py CAPABILITY DTYPE ...     80 (A100), 90 (H100, H200), 100 (B200); bfloat16, float16 ...

Operations run on CPU tensors of real sizes with a driver that names the GPU: launches compile and compute nothing, so
results are meaningless. A line of JSON for each kernel: its name, type, a thread's registers and what it spills out of
them (bytes), bytes of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from ingot_kernels import adamw, cross_entropy, dispatch, fp8, int8, nf4
from ingot_kernels.gated import geglu, swiglu
from ingot_kernels.rms_norm import add_rms_norm, rms_norm
from ingot_kernels.rope import qk_rope

found: dict[str, dict[str, Any]] = {}  # by a kernel's cache key


def name_a_gpu(capability: int) -> None:
    """Let Triton believe that the active device is one of this compute capability, and compile in the place of
    launching.
    """
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    triton.runtime.driver.set_active(driver)
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            found[kernel.hash] = {"kernel": self.__name__, "shared": kernel.metadata.shared} | usage(kernel, capability)
        return kernel

    JITFunction.run = compile_only
    dispatch.INTERPRETED = True  # CPU tensors may go to Triton
    torch.Tensor.contiguous = lambda tensor, **options: tensor  # as they are: nothing is computed


def usage(kernel: Any, capability: int) -> dict[str, int]:
    """Registers of a thread, and bytes that it spills, as the assembler tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(kernel.asm["ptx"])
        named = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={named}", str(path), "-o", f"{folder}/kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = [re.search(pattern, told) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    return dict(zip(("registers", "spilled"), (int(m[1]) if m else -1 for m in numbers), strict=True))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype).normal_().requires_grad_(dtype.is_floating_point)


def launches(dtype: torch.dtype, capability: int) -> Iterator[Callable[[], Any]]:
    """Every operation in its forms, at sizes of an 8 B model; forward and backward."""
    x, residual, weight = leaf(4, 4096, dtype=dtype), leaf(4, 4096, dtype=dtype), leaf(4096, dtype=dtype)
    wide, scale = leaf(4, 8192, dtype=dtype), leaf(8192, dtype=dtype)

    def back(outputs: Any) -> None:
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    for mode in ("llama", "gemma"):
        yield lambda mode=mode: back(rms_norm(x, weight, 1e-5, mode, impl="triton"))
        yield lambda mode=mode: back(add_rms_norm(x, residual, weight, 1e-5, mode, impl="triton"))
    yield lambda: back(rms_norm(x, None, 1e-5, impl="triton"))
    yield lambda: back(rms_norm(wide, scale, 1e-5, impl="triton"))
    yield lambda: back(rms_norm(x, leaf(4096), 1e-5, impl="triton"))  # as in autocast
    q, k, angle = leaf(1, 8, 32, 128, dtype=dtype), leaf(1, 8, 8, 128, dtype=dtype), torch.rand(1, 8, 128)
    norms = (leaf(128, dtype=dtype), leaf(128, dtype=dtype))
    for part, weights, interleaved in ((128, None, False), (64, norms, False), (128, norms, True)):
        cos, sin = angle[..., :part].to(dtype), angle[..., :part].to(dtype)
        yield lambda cos=cos, sin=sin, weights=weights, interleaved=interleaved: back(
            qk_rope(q, k, cos, sin, weights, 1e-6, interleaved=interleaved, impl="triton")
        )
    gate, up = leaf(4, 14336, dtype=dtype), leaf(4, 14336, dtype=dtype)
    yield lambda: back(swiglu(gate, up, impl="triton"))
    yield lambda: back(geglu(gate, up, impl="triton"))
    for form in ({}, {"softcap": 30.0, "scale": 0.5}):
        for smoothing, width in ((0.0, 128_256), (0.1, 1000)):
            raw, targets = leaf(2, width, dtype=dtype).detach(), torch.tensor([1, 2])
            full = cross_entropy.Form(**form, label_smoothing=smoothing, z_loss=smoothing)
            for weights in (None, torch.ones(2)):
                for gradient in (False, True):
                    yield (
                        lambda raw=raw, targets=targets, full=full, weights=weights, gradient=gradient: (
                            cross_entropy.cross_entropy_(raw, targets, full, weights, gradient, "triton")
                        )
                    )
    frozen = leaf(64, 4096, dtype=dtype).detach()
    yield lambda: int8.dequantize(frozen.to(torch.int8), torch.ones(64), dtype, impl="triton")
    if capability >= 89:  # an A100 has no float8; fp8.py leaves it to torch
        yield lambda: fp8.quantize_rows(frozen, impl="triton")
        yield lambda: fp8.quantize_rows(frozen, torch.ones(4096), impl="triton")
        yield lambda: fp8.dequantize(frozen.to(torch.uint8), torch.ones(64), dtype, impl="triton")
    packed, blocks = torch.zeros(64 * 2048, 1, dtype=torch.uint8), 64 * 4096 // 64
    yield lambda: nf4.dequantize(packed, torch.ones(blocks), None, None, (64, 4096), dtype, impl="triton")
    nested = (torch.zeros(blocks, dtype=torch.uint8), torch.ones(blocks // 256), torch.ones(1))
    yield lambda: nf4.dequantize(packed, *nested, (64, 4096), dtype, impl="triton")
    for eight in (False, True):
        for key in (None, 99) if dtype == torch.bfloat16 else (None,):
            yield lambda eight=eight, key=key: updated(dtype, eight, key)


def updated(dtype: torch.dtype, eight: bool, key: int | None) -> None:
    values = torch.zeros(8, 4096, dtype=torch.uint8 if eight else torch.float32)
    first, second = (adamw.Moment(values, torch.ones(8, 16) if eight else None, signed) for signed in (True, False))
    numbers = adamw.Update(0.01, (0.9, 0.99), 1e-8, 0.1, 1, key=key)
    adamw.adamw(
        leaf(8, 4096, dtype=dtype).detach(), leaf(8, 4096, dtype=dtype).detach(), first, second, numbers, impl="triton"
    )


if __name__ == "__main__":
    capability = int(sys.argv[1])
    name_a_gpu(capability)
    for name in sys.argv[2:]:
        found.clear()
        for launch in launches(getattr(torch, name), capability):
            launch()
        for facts in found.values():
            print(json.dumps(facts | {"dtype": name}), flush=True)
