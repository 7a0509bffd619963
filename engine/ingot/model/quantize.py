"""A frozen base in few bits: linear layers whose weight is kept quantized and turned back for each product.

The only file that imports bitsandbytes, which is faster at NF4 (Dettmers et al. 2023) where it is installed;
`ingot_kernels.nf4` gives the same bytes, but for about one quantized scale in a thousand, where it is not. int8 and fp8
are a scale a row, for weights only. bitsandbytes' layers are not used: they rewrite their weight when they evaluate on
a CPU, and keep what FSDP and DDP must see outside of parameters. Here every part is a plain frozen parameter, which any
strategy may cut, send or leave.

    N outputs, K inputs, M rows of the activation
"""

import threading
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ingot.errors import ModelError
from ingot.recipe import Quantization
from ingot_kernels import fp8, int8, nf4
from ingot_kernels.lora_linear import Projection, lora_linear
from ingot_kernels.quantized import PARTS, Quantized, product, transposed_product

HEADS = ("classifier", "pre_classifier", "score", "qa_outputs")
_memory = threading.local()  # what a weight is turned back into, one a device and type, used again by the next layer


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with W [N, K] kept as `packed` and its scales; the bias stays as it was. W gets no gradient."""

    packed: nn.Parameter
    scales: nn.Parameter

    def __init__(self, linear: nn.Linear, section: Quantization) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a weight of full size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        held = parts_of_checkpoint(linear)
        weight: Any = linear.weight
        self.kind, self.dtype = section.kind, weight.dtype if held is None else weight.quant_state.dtype
        for name, part in (held or quantize(linear.weight.detach(), section)).items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def dequantized(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W [N, K] as the product sees it; in the memory of `out` where it is given."""
        # By attribute: under ZeRO-3 it is the look-up that gathers a parameter.
        parts = {name: getattr(self, name).detach() for name in self._parameters if name != "bias"}
        return dequantize(parts, self.kind, (self.out_features, self.in_features), dtype, out)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [N, K], made anew at each reading: for adapters that look at it (DoRA), and for merging."""
        return self.dequantized(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N], computed in the type of autocast, else of the input."""
        if torch.compiler.is_compiling():  # it cannot be shown a layer as an argument
            return lora_linear(input, [Projection(self, self.bias)])[0]
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output: Tensor = _FrozenProduct.apply(input, self, dtype)
        return output if self.bias is None else output + self.bias.to(dtype)

    def product(self, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """x Wᵀ [M, N], added to `out_MN` in place; without the bias."""
        return product(self, x_MK, out_MN)

    def transposed_product(self, grad_MN: Tensor, out_MK: Tensor | None = None) -> Tensor:
        """grad W [M, K], added to `out_MK` in place."""
        return transposed_product(self, grad_MN, out_MK)

    def turned_back(self, like: Tensor) -> Tensor:
        """W in the type of `like`, in memory that the next layer's W will take: for a product that is made at once."""
        shape = (self.out_features, self.in_features)
        return self.dequantized(like.dtype, memory(shape, like.dtype, like.device))

    @property
    def tensors(self) -> list[Tensor]:
        """The parts of W, in the order of `ingot_kernels`."""
        names = ("packed", "scales", "scale_scales", "scale_offset")
        return [getattr(self, name).detach() for name in names if name in self._parameters]

    def parts(self) -> Quantized:
        """The same as plain values. On a CPU too they are turned back by `ingot_kernels`, not by bitsandbytes."""
        tensors = self.tensors
        kind = "nf4_double" if self.kind == "nf4" and len(tensors) == PARTS["nf4_double"] else self.kind
        return Quantized(kind, (self.out_features, self.in_features), tensors)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the kind."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def memory(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of `shape`, the same at every call of a thread: nothing may keep what is written to it."""
    blocks: dict[tuple[torch.device, torch.dtype], Tensor] = _memory.__dict__.setdefault("blocks", {})
    size, held = shape[0] * shape[1], blocks.get((device, dtype))
    if held is None or held.numel() < size:
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            held = blocks[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return held[:size].view(shape)


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ; W is turned back again for the gradient of x instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x_MK = x.to(dtype).reshape(-1, x.shape[-1])
            return layer.product(x_MK).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(grad.device.type, enabled=False):
            grad_MN = grad.to(ctx.dtype).reshape(-1, grad.shape[-1])
            dx_MK = ctx.layer.transposed_product(grad_MN).to(ctx.x_dtype)
            return dx_MK.view(*grad.shape[:-1], ctx.layer.in_features), None, None


def quantize(weight: Tensor, section: Quantization) -> dict[str, Tensor]:
    """W [N, K] -> its parts by name.

    nf4: `packed` uint8 [N·K/2, 1] and, of each block of 64, `scales` float32; with `double` these are uint8 with
    `scale_scales` float32 of each 256 and `scale_offset` float32 [1]. int8: `packed` int8 [N, K], fp8: uint8 [N, K],
    the bytes of float8; both `scales` float32 [N].
    """
    if section.kind in ("int8", "fp8"):
        packed, scales = (int8 if section.kind == "int8" else fp8).quantize(weight)
        return {"packed": packed, "scales": scales}
    functional = bitsandbytes_functional()
    if functional is None:
        return _named(*nf4.quantize(weight, section.double))
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=nf4.BLOCK, quant_type="nf4", compress_statistics=section.double
    )
    return _of_state(packed, state)


def _named(
    packed: Tensor, scales: Tensor, scale_scales: Tensor | None = None, offset: Tensor | None = None
) -> dict[str, Tensor]:
    parts = {"packed": packed, "scales": scales, "scale_scales": scale_scales, "scale_offset": offset}
    return {name: part for name, part in parts.items() if part is not None}


def _of_state(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """What bitsandbytes keeps beside the packed weights, by our names."""
    if not state.nested:
        return _named(packed, state.absmax)
    return _named(packed, state.absmax, state.state2.absmax, state.offset.reshape(1))


def parts_of_checkpoint(linear: nn.Linear) -> dict[str, Tensor] | None:
    """The parts of a layer that came from a 4-bit checkpoint of bitsandbytes; None for any other."""
    state: Any = getattr(linear.weight, "quant_state", None)
    if state is None:
        return None
    if state.quant_type != "nf4" or state.blocksize != nf4.BLOCK:
        raise ModelError(
            "model.source",
            f"{state.quant_type}, blocks of {state.blocksize}",
            f"only nf4 in blocks of {nf4.BLOCK} is read of 4-bit checkpoints; use the weights in full size",
        )
    return _of_state(linear.weight.detach(), state)


def dequantize(
    parts: dict[str, Tensor], kind: str, shape: tuple[int, int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The parts of `quantize` -> W [N, K] in `dtype`, in the memory of `out` where that can be."""
    packed, scales = parts["packed"], parts["scales"]
    if kind in ("int8", "fp8"):
        return (int8 if kind == "int8" else fp8).dequantize(packed, scales, dtype, out)
    nested, offset = parts.get("scale_scales"), parts.get("scale_offset")
    # bitsandbytes 0.50 begins a block at every row: with rows of 96 half of the weights get another block's scale.
    functional = None if packed.is_cuda or shape[1] % nf4.BLOCK else bitsandbytes_functional()
    if functional is None:
        return nf4.dequantize(packed, scales, nested, offset, shape, dtype, out)
    # On a CPU bitsandbytes takes a fifth of the time: 0.25 ms for 3 M weights in float32, ours 1.24 (2 Zen 4 cores).
    if nested is not None and offset is not None:
        code = functional.create_dynamic_map().to(packed.device)
        scales = functional.dequantize_blockwise(scales, absmax=nested, code=code, blocksize=nf4.SCALE_BLOCK).float()
        scales = scales + offset
    state = functional.QuantState(
        absmax=scales, shape=torch.Size(shape), dtype=dtype, blocksize=nf4.BLOCK, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).view(shape)  # takes no `out` on a CPU


def quantized(model: nn.Module, section: Quantization) -> nn.Module:
    """`model` with its linear layers quantized in place, all but the output head and a classifier; returns it."""
    _own(model)
    for name, parent, linear in linears(model):
        setattr(parent, name, QuantizedLinear(linear, section))
    return model


def _own(model: nn.Module) -> None:
    """Make a 4-bit checkpoint of bitsandbytes forget who quantized it, so that it is moved and saved as any model."""
    if not any(getattr(m.weight, "quant_state", None) is not None for m in model.modules() if isinstance(m, nn.Linear)):
        return
    # Inside of a classifier on the mean, which is no model of transformers'.
    held: Any = next(m for m in model.modules() if getattr(m, "hf_quantizer", None) is not None)
    del held.config.quantization_config
    held.hf_quantizer, held.is_loaded_in_4bit, held.quantization_method = None, False, None
    # How 4-bit weights were read; transformers 5.23 would have to undo it when it saves, and cannot.
    read = [part for part in held._weight_conversions or () if not _reads_four_bits(part)]
    held._weight_conversions = read or None


def _reads_four_bits(conversion: Any) -> bool:
    return any("4bit" in type(operation).__name__ for operation in getattr(conversion, "operations", ()))


def rounded(model: nn.Module, section: Quantization) -> nn.Module:
    """`model` with the weights that its quantized form computes with, in full size: what an adapter learned over."""
    _own(model)
    with torch.no_grad():
        for name, parent, linear in linears(model):
            held = parts_of_checkpoint(linear)
            if held is not None:
                setattr(parent, name, _plain(linear, held))
                continue
            weight = linear.weight
            parts = quantize(weight.detach(), section)
            weight.copy_(dequantize(parts, section.kind, (weight.shape[0], weight.shape[1]), weight.dtype))
    return model


def linears(model: nn.Module) -> list[tuple[str, nn.Module, nn.Linear]]:
    """(name, parent, layer) of every linear layer that is quantized."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        (name, parent, child)
        for parent_name, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
        and child is not head
        and f"{parent_name}.{name}".split(".")[0] not in HEADS
        and not (parent_name == "" and name in HEADS)
    ]


def _plain(linear: nn.Linear, parts: dict[str, Tensor]) -> nn.Linear:
    """A layer of a 4-bit checkpoint in full size."""
    weight: Any = linear.weight
    with torch.device("meta"):
        plain = nn.Linear(linear.in_features, linear.out_features, bias=False)
    shape = (linear.out_features, linear.in_features)
    plain.weight = nn.Parameter(dequantize(parts, "nf4", shape, weight.quant_state.dtype))
    plain.register_parameter("bias", linear.bias)
    return plain


def bitsandbytes_functional() -> Any:
    """Its functions, or None where it is not installed."""
    if find_spec("bitsandbytes") is None:
        return None
    from bitsandbytes import functional

    return functional
