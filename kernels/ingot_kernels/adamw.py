"""AdamW (Loshchilov & Hutter 2019) with moments in 8 bits (Dettmers et al. 2021) and weights in bfloat16 that are
rounded stochastically (Zamirai et al. 2020, section 3), so that steps below half a unit in the last place still add up.

R rows (all dimensions but the last), K columns, G groups of columns that share a scale
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ingot_kernels.codes import dynamic_codes, midpoints, nearest
from ingot_kernels.dispatch import Impl, device_of, jit, tl, triton, uses_triton

State = Literal["float32", "int8"]
BLOCK = 256  # columns of one row that share a scale
SMALLEST = 4096  # elements of a tensor from which on 8 bits are worth their error, as in bitsandbytes
PORTION = 1 << 16  # elements that the torch path works on at a time, so that its temporaries stay in the cache
MOMENTS = ("exp_avg", "exp_avg_sq")
TINY = torch.finfo(torch.float32).tiny


class Moment(NamedTuple):
    """A moment [R, K] float32, or its codes uint8 [R, K] with the absmax of each group, float32 [R, G]."""

    values: Tensor
    scales: Tensor | None
    signed: bool


@dataclass(frozen=True)
class Update:
    """One step's numbers. `key`: of the random bits; None: round to nearest. `start`: place of the first element in
    the whole tensor, so that bits do not depend on how it is cut.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0
    key: int | None = None
    start: int = 0

    @property
    def step_size(self) -> float:
        """Rate with the first moment's correction for its start at zero."""
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def root(self) -> float:
        """The same correction of the second moment's root."""
        return math.sqrt(1 - self.betas[1] ** self.step)


class AdamW(torch.optim.Optimizer):
    """Decoupled decay, moments in 8 bits or float32, float32 arithmetic for weights of any type.

    `state` int8: matrices from SMALLEST elements on; the rest keeps float32 moments. Groups may set their own.
    `stochastic`: bfloat16 weights are rounded up or down at random, with bits that follow from `seed`, the step, the
    number of the parameter and the place in the whole tensor: ranks that hold the same get the same. `grad_scale`
    multiplies gradients inside the update: what clipping would do in a pass of its own.

    Parameters may be DTensors that are cut along their first dimension. Groups that share a scale lie in one row, so
    a state fits any number of ranks. Raises ValueError for a cut along another dimension.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state: State = "int8",
        stochastic: bool = False,
        seed: int = 0,
        impl: Impl = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "state": state}
        super().__init__(params, {**defaults, "stochastic": stochastic})
        self.seed, self.impl = seed, impl
        self.grad_scale = 1.0

    def fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state before its first step: `step`, and per moment its values and, in 8 bits, its scales."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        small = parameter.ndim < 2 or parameter.numel() < SMALLEST
        eight = group["state"] == "int8" and not small
        found = {"step": torch.zeros((), dtype=torch.float32)}  # on the CPU: reading it waits for no GPU
        for name in MOMENTS:
            found[name] = _zeros(parameter, parameter.shape[-1:], torch.uint8 if eight else torch.float32)
            if eight:
                found[name + "_scale"] = _zeros(parameter, (groups_of(parameter.shape[-1]),), torch.float32)
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, group, number)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state |= self.fresh(parameter)
        state["step"] += 1
        step, start = int(state["step"]), _start(parameter)
        rounded = group["stochastic"] and parameter.dtype == torch.bfloat16
        update = Update(
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            step,
            self.grad_scale,
            key_of(self.seed, step, number) if rounded else None,
            start,
        )
        first, second = (
            Moment(_local(state[name]), _local(state[name + "_scale"]) if name + "_scale" in state else None, signed)
            for name, signed in zip(MOMENTS, (True, False), strict=True)
        )
        adamw(_local(parameter), _local(cast(Tensor, parameter.grad)), first, second, update, impl=self.impl)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast 8-bit moments and those of bfloat16 weights to the parameters' type."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                place = value.device if name == "step" else parameter.device
                self.state[parameter][name] = value.detach().clone().to(place)


def adamw(
    parameter: Tensor, grad: Tensor, first: Moment, second: Moment, update: Update, *, impl: Impl = "auto"
) -> None:
    """One step of one tensor, in place: `parameter` [..., K] of any floating type; `grad` and moments of its shape.

    Moments are contiguous. The weight is moved by the moments before they are rounded.
    """
    if parameter.numel() == 0:
        return
    K = parameter.shape[-1] if parameter.ndim else 1
    whole = parameter.contiguous()
    run = _triton if uses_triton(impl, parameter) else _torch
    rows = (whole.view(-1, K), grad.contiguous().view(-1, K))
    run(*rows, _rows(first, K), _rows(second, K), update)
    if whole is not parameter:
        parameter.copy_(whole)


def groups_of(columns: int) -> int:
    """Groups that a row of so many columns has."""
    return -(-columns // BLOCK)


def dequantize(moment: Moment) -> Tensor:
    """values uint8 [R, K] and scales [R, G] -> float32 [R, K]; a float32 moment itself."""
    if moment.scales is None:
        return moment.values
    table = dynamic_codes(moment.signed, moment.values.device)
    R, K = moment.values.shape
    found = table.index_select(0, moment.values.flatten().int()).view(R, K)
    return _each_group(found, moment.scales, torch.mul)


def quantize(values: Tensor, moment: Moment) -> None:
    """Put float32 [R, K] into `moment`: the nearest code of each value as a share of its group's absmax."""
    assert moment.scales is not None
    R, K = values.shape
    G = groups_of(K)
    padded = torch.nn.functional.pad(values, (0, G * BLOCK - K)) if K % BLOCK and K > BLOCK else values
    moment.scales.copy_(padded.view(R, G, -1).abs().amax(2).clamp_min_(TINY))
    shares = _each_group(values, moment.scales, torch.div)
    moment.values.copy_(nearest(shares, moment.signed))


def _each_group(values: Tensor, scales: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    (R, K), G = values.shape, scales.shape[1]
    if G == 1 or K % BLOCK == 0:
        return function(values.view(R, G, -1), scales.unsqueeze(2)).view(R, K)
    return function(values, scales.repeat_interleave(BLOCK, 1)[:, :K])


def _torch(parameter: Tensor, grad: Tensor, first: Moment, second: Moment, update: Update) -> None:
    """Portions of whole rows."""
    R, K = parameter.shape
    step = max(1, PORTION // K)
    for begin in range(0, R, step):
        part = slice(begin, begin + step)
        few, more = _portion(first, part), _portion(second, part)
        gradient = grad[part].float() * update.grad_scale
        m = dequantize(few).lerp_(gradient, 1 - update.betas[0])
        v = dequantize(more).mul_(update.betas[1]).addcmul_(gradient, gradient, value=1 - update.betas[1])
        divisor = v.sqrt().div_(update.root).add_(update.eps)
        moved = parameter[part].float() if parameter.dtype != torch.float32 else parameter[part]
        moved = moved.mul_(1 - update.lr * update.weight_decay).addcdiv_(m, divisor, value=-update.step_size)
        if parameter.dtype != torch.float32:
            if update.key is not None:
                moved = round_randomly(moved, random_bits(moved, update.start + begin * K, update.key))
            parameter[part] = moved
        for moment, values in ((few, m), (more, v)):
            if moment.scales is not None:
                quantize(values, moment)


def _portion(moment: Moment, part: slice) -> Moment:
    return Moment(moment.values[part], None if moment.scales is None else moment.scales[part], moment.signed)


def round_randomly(values: Tensor, bits: Tensor) -> Tensor:
    """float32 -> float32 that bfloat16 holds exactly: up or down with chances that keep the mean; `bits` int32, of
    which the lower 16 are used. Infinities stay.
    """
    return (values.view(torch.int32) + (bits & 0xFFFF)).bitwise_and_(-0x10000).view(torch.float32)


def random_bits(like: Tensor, start: int, key: int) -> Tensor:
    """int32 bits of the shape of `like`: the mixer lowbias32 (Wellons 2018) of element number and key."""
    first = _signed(start * 0x9E3779B9 & 0xFFFFFFFF)
    bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    bits.mul_(_signed(0x9E3779B9)).add_(first).bitwise_xor_(key)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        if factor is not None:
            bits *= _signed(factor)
    return bits.view(like.shape)


def key_of(*numbers: int) -> int:
    """An odd 31-bit key of seed, step and parameter: always the same kind of argument to a compiled kernel."""
    key = 0x2545F491
    for number in numbers:
        key = (key ^ number) * 0x9E3779B1 & 0xFFFFFFFF
        key ^= key >> 15
        key = key * 0x85EBCA77 & 0xFFFFFFFF
        key ^= key >> 13
    return key & 0x7FFFFFFF | 3


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def _rows(moment: Moment, columns: int) -> Moment:
    scales = None if moment.scales is None else moment.scales.view(-1, moment.scales.shape[-1])
    return Moment(moment.values.view(-1, columns), scales, moment.signed)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _start(parameter: Tensor) -> int:
    """Number of this rank's first element in the whole tensor."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, rows, first = parameter.device_mesh, parameter.shape[0] if parameter.ndim else 1, 0
    for number, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0):
            raise ValueError(f"a parameter is cut as {placement}; 8-bit moments and random rounding need cuts by rows")
        size = -(-rows // mesh.size(number))
        skipped = min(rows, mesh.get_local_rank(number) * size)
        first, rows = first + skipped, min(size, rows - skipped)
    return first * math.prod(parameter.shape[1:])


def _zeros(parameter: Tensor, last: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Zeros that lie as `parameter` does, with another last dimension."""
    local, last = _local(parameter), tuple(last)
    zeros = torch.zeros((*local.shape[:-1], *last), dtype=dtype, device=local.device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = (*parameter.shape[:-1], *last) if parameter.ndim > 1 else tuple(parameter.shape)
    if parameter.ndim == 1:
        zeros = torch.zeros(local.shape, dtype=dtype, device=local.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


@jit
def _decode(values_ptr, scales_ptr, codes_ptr, place, group, mask, EIGHT: tl.constexpr):  # type: ignore[no-untyped-def]
    if EIGHT:
        code = tl.load(values_ptr + place, mask=mask, other=0).to(tl.int32)
        found = tl.load(codes_ptr + code) * tl.load(scales_ptr + group, mask=mask, other=0.0)
    else:
        found = tl.load(values_ptr + place, mask=mask, other=0.0)
    return tl.where(mask, found, 0.0)


@jit
def _encode(  # type: ignore[no-untyped-def]
    values_ptr, scales_ptr, edges_ptr, values, place, group, mask, first_mask, EIGHT: tl.constexpr
):
    """The nearest code by bisection of the 255 places where codes round up."""
    if EIGHT:
        scale = tl.maximum(tl.max(tl.abs(values), 1), 1.1754943508222875e-38)[:, None]
        shares = values / scale
        code = tl.zeros_like(place).to(tl.int32)
        for power in tl.static_range(8):
            half = 128 >> power
            code = tl.where(tl.load(edges_ptr + code + half - 1) < shares, code + half, code)
        tl.store(values_ptr + place, code.to(tl.uint8), mask=mask)
        tl.store(scales_ptr + group, tl.broadcast_to(scale, place.shape), mask=first_mask)
    else:
        tl.store(values_ptr + place, values, mask=mask)


@jit
def _round_randomly(values, number, key):  # type: ignore[no-untyped-def]
    bits = (number.to(tl.uint32) * 0x9E3779B9) ^ key.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    summed = values.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return (summed & 0xFFFF0000).to(tl.float32, bitcast=True)


@jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    parameter_ptr, grad_ptr, m_ptr, m_scales_ptr, v_ptr, v_scales_ptr, codes_ptr, edges_ptr,
    R, K, G, grad_scale, few, more, kept, less, step_size, root, eps, start, key,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, EIGHT: tl.constexpr, RANDOM: tl.constexpr,
):  # fmt: skip
    """ROWS groups of WIDTH columns: one of each of so many rows, group by group. `few` = 1 - beta1, `more` = beta2,
    `less` = 1 - beta2. One dimension of programs: of a second one a GPU has no more than 65,535.

    `codes` and `edges` hold the signed table and, 256 further on, the unsigned one.
    """
    own = tl.program_id(0) % G
    row = (tl.program_id(0) // G * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (own * WIDTH + tl.arange(0, WIDTH))[None, :]
    mask = (row < R) & (column < K)
    place, group = row * K + column, row * G + own + column * 0
    first_mask = mask & (column == own * WIDTH)
    gradient = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32) * grad_scale
    m = _decode(m_ptr, m_scales_ptr, codes_ptr, place, group, mask, EIGHT)
    v = _decode(v_ptr, v_scales_ptr, codes_ptr + 256, place, group, mask, EIGHT)
    m = m + few * (gradient - m)
    v = v * more + gradient * gradient * less
    weight = tl.load(parameter_ptr + place, mask=mask, other=0.0).to(tl.float32)
    weight = weight * kept - step_size * (m / (tl.sqrt(v) / root + eps))
    if RANDOM:
        weight = _round_randomly(weight, place + start, key)
    tl.store(parameter_ptr + place, weight.to(parameter_ptr.dtype.element_ty), mask=mask)
    _encode(m_ptr, m_scales_ptr, edges_ptr, m, place, group, mask, first_mask, EIGHT)
    _encode(v_ptr, v_scales_ptr, edges_ptr + 256, v, place, group, mask, first_mask, EIGHT)


def _triton(parameter: Tensor, grad: Tensor, first: Moment, second: Moment, update: Update) -> None:
    (R, K), eight = parameter.shape, first.scales is not None
    width = min(BLOCK, triton.next_power_of_2(K))
    rows = min(1024 // width, triton.next_power_of_2(R))
    codes = _both(dynamic_codes, parameter.device) if eight else first.values
    edges = _both(midpoints, parameter.device) if eight else first.values
    G, (beta1, beta2) = groups_of(K), update.betas
    scales = [moment.values if moment.scales is None else moment.scales for moment in (first, second)]
    with device_of(parameter):
        _adamw_kernel[(triton.cdiv(R, rows) * G,)](
            parameter, grad, first.values, scales[0], second.values, scales[1], codes, edges,
            R, K, G, update.grad_scale, 1 - beta1, beta2, 1 - update.lr * update.weight_decay, 1 - beta2,
            update.step_size, update.root, update.eps, update.start, update.key or 3,
            WIDTH=width, ROWS=rows, EIGHT=eight, RANDOM=update.key is not None, num_warps=4,
        )  # fmt: skip


_TABLES: dict[tuple[Any, torch.device], Tensor] = {}


def _both(table: Callable[[bool, torch.device], Tensor], device: torch.device) -> Tensor:
    """The signed and the unsigned table [512], made once."""
    if (table, device) not in _TABLES:
        both = [torch.nn.functional.pad(table(s, device), (0, 256 - len(table(s, device)))) for s in (True, False)]
        _TABLES[table, device] = torch.cat(both)
    return _TABLES[table, device]
