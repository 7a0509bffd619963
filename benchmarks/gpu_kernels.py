"""Each operation of `ingot_kernels` on a GPU, beside eager torch, torch.compile and Liger-Kernel, and its roofline."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_timing import Bench, Function, distance, forward_backward
from torch import Tensor

from ingot_kernels.gated import gated, gated_reference
from ingot_kernels.linear_cross_entropy import IGNORE, Head, linear_cross_entropy, linear_cross_entropy_reference
from ingot_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linear_reference
from ingot_kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from ingot_kernels.rope import qk_rope, qk_rope_reference

LIGER = find_spec("liger_kernel") is not None
EPS, HALF, FULL = 1e-6, torch.bfloat16, torch.float32


class Sizes:
    """Of Llama-3.1-8B; in a dry run what an interpreter gets through."""

    def __init__(self, dry: bool) -> None:
        self.hidden, self.inner, self.vocabulary = (64, 96, 256) if dry else (4096, 14336, 128256)
        self.heads, self.key_heads, self.head_size = (4, 2, 16) if dry else (32, 8, 128)
        self.tokens = 32 if dry else 8192
        self.losses = (32,) if dry else (1024, 4096, 8192, 16384)
        self.linears = (32,) if dry else (2048, 8192, 16384)


class Machine:
    """What this device reaches: bytes/s of a copy, FLOP/s of a matrix product. The rooflines are made of these."""

    def __init__(self, bench: Bench) -> None:
        big = (1 if bench.dry else 256) * 2**20
        source, target = (torch.empty(big, dtype=HALF, device=bench.device) for _ in range(2))
        side = 128 if bench.dry else 8192
        left, right = (torch.randn(side, side, dtype=HALF, device=bench.device) for _ in range(2))
        times = bench.alternate({"copy": lambda: target.copy_(source), "product": lambda: left @ right})
        self.bandwidth = 2 * 2 * big / times["copy"]["seconds"]
        self.flops = 2 * side**3 / times["product"]["seconds"]

    def floor(self, n_bytes: float, flops: float = 0.0) -> float:
        """Seconds that no implementation can go below."""
        return max(n_bytes / self.bandwidth, flops / self.flops)


def draw(bench: Bench, *shape: int, grad: bool = True, dtype: torch.dtype = HALF, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=bench.device, dtype=torch.float32) * scale).to(dtype).requires_grad_(grad)


def compiled(function: Function, bench: Bench) -> Function:
    """By inductor; in a dry run only traced, since compiling takes a CPU minutes."""
    torch._dynamo.reset()  # functions of one text share a limit of 8 graphs, and the ninth would run eagerly
    return torch.compile(function, backend="eager" if bench.dry else "inductor", dynamic=False)


def row(
    bench: Bench,
    machine: Machine,
    contenders: dict[str, Function],
    tensors: Sequence[Tensor],
    n_bytes: float,
    flops: float = 0.0,
) -> dict[str, Any]:
    """Both passes of all contenders on `tensors`, with their share of the roofline and Ingot's ratio to each."""
    with torch.no_grad():
        outputs = next(iter(contenders.values()))(*[t.detach() for t in tensors])
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    gradients = [torch.randn_like(output) for output in outputs]
    runs = {name: forward_backward(function, tensors, gradients) for name, function in contenders.items()}
    times = bench.alternate(runs)
    floor = machine.floor(n_bytes, flops)
    for name, time in times.items():
        if "seconds" in time:
            time["roofline_share"] = floor / time["seconds"]
            time["peak_bytes"] = bench.peak_bytes(runs[name])
    own = times["ingot"].get("seconds")
    ratios = {n: t["seconds"] / own for n, t in times.items() if own and n != "ingot" and "seconds" in t}
    return {"floor_seconds": floor, "contenders": times, "ratio": ratios}


def checks(bench: Bench) -> dict[str, Any]:
    """Every operation against its float64 truth at a small odd size; timing starts only if all are right."""
    types = (FULL,) if bench.dry else (FULL, HALF)
    import gpu_quantized

    return gpu_quantized.checks(bench) | {
        f"{name} {str(dtype).removeprefix('torch.')}": distance(kernel, reference, tensors)
        for dtype in types
        for name, (kernel, reference, tensors) in _small(bench, dtype).items()
    }


def _small(bench: Bench, dtype: torch.dtype) -> dict[str, tuple[Function, Function, list[Tensor]]]:
    """(kernel, reference, tensors) of each operation."""
    device = bench.device
    torch.manual_seed(0)

    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, residual, w = some(13, 67), some(13, 67), some(67)
    q, k = some(2, 7, 3, 16), some(2, 7, 1, 16)
    angles = torch.arange(7, device=device)[:, None] / 10.0 ** torch.arange(8, device=device)
    cos, sin = (f(torch.cat([angles, angles], -1)).unsqueeze(0) for f in (torch.cos, torch.sin))
    targets = torch.randint(0, 31, (13,), device=device)
    targets[3:6] = IGNORE
    base = some(31, 67)
    adapter = [some(4, 67, dtype=FULL), some(31, 4, dtype=FULL)]

    def normed(function: Function) -> Function:
        return lambda x, w: function(x, w, EPS)

    def turned(function: Function) -> Function:
        return lambda q, k: function(q, k, cos.to(q.dtype), sin.to(q.dtype))

    def lost(function: Function) -> Function:
        return lambda h, w: function(h, Head(w), targets)

    def layer(function: Function) -> Function:
        return lambda x, a, b: function(x, [Projection(base.to(x.dtype), None, (Adapter(a, b, 2.0),))])

    # In a dry run by the interpreter: what is checked is what a GPU would run.
    triton = partial(partial, impl="triton" if bench.dry else "auto")

    return {
        "rms_norm": (normed(triton(rms_norm)), normed(rms_norm_reference), [x, w]),
        "add_rms_norm": (lambda x, r, w: triton(add_rms_norm)(x, r, w, EPS), _added, [x, residual, w]),
        "gated": (triton(gated), gated_reference, [x, residual]),
        "gated tanh": (
            lambda g, u: triton(gated)(g, u, "gelu_tanh"),
            lambda g, u: gated_reference(g, u, "gelu_tanh"),
            [x, residual],
        ),
        "qk_rope": (turned(triton(qk_rope)), turned(qk_rope_reference), [q, k]),
        "linear_cross_entropy": (
            lost(triton(linear_cross_entropy)),
            lost(linear_cross_entropy_reference),
            [x, base],
        ),
        "lora_linear": (layer(triton(lora_linear)), layer(lora_linear_reference), [x, *adapter]),
    }


def _added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, EPS), total


def elementwise(bench: Bench, machine: Machine) -> dict[str, Any]:
    """Norms, rotary positions and gates at 8,192 tokens. Bytes: both passes, as the notes of each operation count."""
    sizes = Sizes(bench.dry)
    M, H, I = sizes.tokens, sizes.hidden, sizes.inner  # noqa: E741
    x, residual = draw(bench, M, H), draw(bench, M, H)
    frozen = draw(bench, H, grad=False)
    gate, up = draw(bench, M, I), draw(bench, M, I)
    q, k = draw(bench, 1, M, sizes.heads, sizes.head_size), draw(bench, 1, M, sizes.key_heads, sizes.head_size)
    angles = torch.rand(1, M, sizes.head_size, device=bench.device)
    cos, sin = angles.cos().to(HALF), angles.sin().to(HALF)

    def norm(function: Function) -> Function:
        return lambda x, w: function(x, w, EPS)

    def turn(function: Function) -> Function:
        return lambda q, k: function(q, k, cos, sin)

    def against(kernel: Function, reference: Function, liger: dict[str, Function]) -> dict[str, Function]:
        return {"ingot": kernel, "eager": reference, "compile": compiled(reference, bench), **liger}

    def tanh(function: Function) -> Function:
        return lambda g, u: function(g, u, "gelu_tanh")

    def added(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, r, w, EPS)

    cases: dict[str, tuple[dict[str, Function], list[Tensor], float]] = {
        "rms_norm": (against(norm(rms_norm), norm(rms_norm_reference), _liger("rms_norm")), [x, frozen], 10.0 * M * H),
        "add_rms_norm": (against(added, _added, _liger("add_rms_norm")), [x, residual, frozen], 16.0 * M * H),
        "swiglu": (against(gated, gated_reference, _liger("swiglu")), [gate, up], 16.0 * M * I),
        "geglu": (against(tanh(gated), tanh(gated_reference), _liger("geglu")), [gate, up], 16.0 * M * I),
        "qk_rope": (
            against(turn(qk_rope), turn(qk_rope_reference), _liger("rope", cos, sin)),
            [q, k],
            8.0 * M * (sizes.heads + sizes.key_heads) * sizes.head_size,
        ),
    }
    cases["rms_norm"][0]["torch"] = norm(lambda x, w, eps: torch.nn.functional.rms_norm(x, (H,), w, eps))
    return {name: row(bench, machine, contenders, tensors, size) for name, (contenders, tensors, size) in cases.items()}


def _liger(name: str, *tensors: Tensor) -> dict[str, Function]:
    """Liger's operation of that name, where it is installed."""
    if not LIGER:
        return {}
    from liger_kernel.transformers import functional as liger

    made: dict[str, Function] = {
        "rms_norm": lambda x, w: liger.liger_rms_norm(x, w, EPS, in_place=False),
        "add_rms_norm": lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, EPS, in_place=False),
        "swiglu": liger.liger_swiglu,
        "geglu": liger.liger_geglu,
        "rope": lambda q, k: liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), *tensors),
    }
    return {"liger": made[name]}


def linear_losses(bench: Bench, machine: Machine) -> dict[str, Any]:
    """The head and its loss, frozen and trained, on random logits and on those of a model that knows its answers: some
    methods skip what is nearly zero.
    """
    sizes, found = Sizes(bench.dry), {}
    H, V = sizes.hidden, sizes.vocabulary
    for logits in ("random", "trained"):
        for M in sizes.losses if logits == "random" else sizes.losses[1:2] or sizes.losses:
            targets = torch.randint(0, V, (M,), device=bench.device)
            rows = torch.arange(M, device=bench.device)
            weight = draw(bench, V, H, grad=False, scale=H**-0.5)
            hidden = draw(bench, M, H, grad=False)
            if logits == "trained":  # the right token stands out by about ten
                hidden = hidden + 10 * H**0.5 * torch.nn.functional.normalize(weight[targets].float(), dim=1).to(HALF)
            for trained in (False, True):
                tensors = [hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)]
                contenders = _losses(bench, targets, rows, many=M > 4096)
                name = f"{'trained' if trained else 'frozen'} head, {M} tokens, {logits} logits"
                found[name] = row(bench, machine, contenders, tensors, 0, (3 if trained else 2) * 2.0 * M * H * V)
    return found


def _losses(bench: Bench, targets: Tensor, rows: Tensor, many: bool) -> dict[str, Function]:
    def eager(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy_reference(h, Head(w), targets)

    contenders: dict[str, Function] = {"ingot": lambda h, w: linear_cross_entropy(h, Head(w), targets, rows_M=rows)}
    contenders["eager"] = eager
    if not many:
        contenders["compile"] = compiled(eager, bench)
    if LIGER:
        from liger_kernel.transformers import functional as liger

        def fused(**options: Any) -> Function:
            return lambda h, w: liger.liger_fused_linear_cross_entropy(h, w, targets, reduction="sum", **options)

        contenders |= {"liger": fused(), "liger float32": fused(accum_dtype=FULL)}
    return contenders


def lora_linears(bench: Bench, machine: Machine) -> dict[str, Any]:
    """A frozen linear layer with an adapter, beside the bare products that it cannot do without, and peft's way."""
    sizes, found = Sizes(bench.dry), {}
    shapes = [(sizes.hidden, sizes.hidden), (sizes.hidden, sizes.inner), (sizes.inner, sizes.hidden)]
    for M in sizes.linears:
        for K, N in shapes:
            weight = draw(bench, N, K, grad=False, scale=K**-0.5)
            tensors = [draw(bench, M, K), draw(bench, 16, K, dtype=FULL), draw(bench, N, 16, dtype=FULL, scale=0.01)]
            contenders: dict[str, Function] = {"ingot": _adapted(weight), "bare": _bare(weight), "peft": _peft(weight)}
            contenders["compile"] = compiled(_plain(weight), bench)
            found[f"{M} tokens, {K} -> {N}"] = row(bench, machine, contenders, tensors, 0, 4.0 * M * K * N)
    return found


def _adapted(weight: Tensor) -> Function:
    return lambda x, a, b: lora_linear(x, [Projection(weight, None, (Adapter(a, b, 2.0),))])


def _plain(weight: Tensor) -> Function:
    return lambda x, a, b: lora_linear_reference(x, [Projection(weight, None, (Adapter(a, b, 2.0),))])


def _bare(weight: Tensor) -> Function:
    return lambda x, a, b: torch.nn.functional.linear(x, weight)


def _peft(weight: Tensor) -> Function:
    """As peft computes with float32 adapters: the input is cast, the update comes back in float32."""

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, weight)
        return (y + torch.nn.functional.linear(torch.nn.functional.linear(x.float(), a), b) * 2.0).to(x.dtype)

    return run


def dequantizing(bench: Bench, machine: Machine) -> dict[str, Any]:
    """Weights in few bits back to bfloat16: read once, written once."""
    import gpu_quantized

    return gpu_quantized.cases(bench, machine, Sizes(bench.dry))


SECTIONS: dict[str, Callable[[Bench, Machine], dict[str, Any]]] = {
    "elementwise": elementwise,
    "linear_cross_entropy": linear_losses,
    "lora_linear": lora_linears,
    "dequantize": dequantizing,
}
