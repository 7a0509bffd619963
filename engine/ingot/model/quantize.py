"""A frozen base in few bits: linear layers whose weight is kept quantized and turned back for each product.

The only file that imports bitsandbytes. NF4's numbers are its own (Dettmers et al. 2023); int8 is a scale a row (the
absmax of Dettmers et al. 2022, for weights only). Its layers are not used: they rewrite their weight when they evaluate
on a CPU, and keep what FSDP and DDP must see outside of parameters. Here every part is a plain frozen parameter, which
any strategy may cut, send or leave.

    N outputs, K inputs, M rows of the activation
"""

from typing import Any

import torch
from torch import Tensor, nn

from ingot.errors import MissingPackage
from ingot.recipe import Quantization

NF4_BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own
HEADS = ("classifier", "pre_classifier", "score", "qa_outputs")


class QuantizedLinear(nn.Linear):
    """y = x Wᵀ + b with W [N, K] kept as `packed` and its scales; the bias stays as it was. W gets no gradient."""

    packed: nn.Parameter
    scales: nn.Parameter

    def __init__(self, linear: nn.Linear, section: Quantization) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a weight of full size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.dtype = section.kind, linear.weight.dtype
        for name, part in quantize(linear.weight.detach(), section).items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.register_parameter("bias", bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] as the product sees it."""
        # By attribute: under ZeRO-3 it is the look-up that gathers a parameter.
        parts = {name: getattr(self, name).detach() for name in self._parameters if name != "bias"}
        return dequantize(parts, self.kind, (self.out_features, self.in_features), dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [N, K], made anew at each reading: for adapters that look at it (DoRA), and for merging."""
        return self.dequantized(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N], computed in the type of autocast, else of the input."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output: Tensor = _FrozenProduct.apply(input, self, dtype)
        return output if self.bias is None else output + self.bias.to(dtype)

    def product(self, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        """x Wᵀ [M, N], added to `out_MN` in place; without the bias."""
        weight_KN = self.dequantized(x_MK.dtype).t()
        return x_MK @ weight_KN if out_MN is None else out_MN.addmm_(x_MK, weight_KN)

    def transposed_product(self, grad_MN: Tensor, out_MK: Tensor | None = None) -> Tensor:
        """grad W [M, K], added to `out_MK` in place."""
        weight = self.dequantized(grad_MN.dtype)
        return grad_MN @ weight if out_MK is None else out_MK.addmm_(grad_MN, weight)

    def extra_repr(self) -> str:
        """As nn.Linear's, with the kind."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ; W is turned back again for the gradient of x instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return x.to(dtype) @ layer.dequantized(dtype).t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(grad.device.type, enabled=False):
            return (grad.to(ctx.dtype) @ ctx.layer.dequantized(ctx.dtype)).to(ctx.x_dtype), None, None


def quantize(weight: Tensor, section: Quantization) -> dict[str, Tensor]:
    """W [N, K] -> its parts by name.

    nf4: `packed` uint8 [N·K/2, 1] and, of each block of 64, `scales` float32; with `double` these are uint8 with
    `scale_scales` float32 of each 256 and `scale_offset` float32 [1]. int8: `packed` int8 [N, K], `scales` float32 [N].
    """
    if section.kind == "int8":
        whole = weight.float()
        scales = whole.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
        return {"packed": (whole * (127.0 / scales).unsqueeze(1)).round().to(torch.int8), "scales": scales}
    packed, state = _bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=section.double
    )
    if not section.double:
        return {"packed": packed, "scales": state.absmax}
    return {
        "packed": packed,
        "scales": state.absmax,
        "scale_scales": state.state2.absmax,
        "scale_offset": state.offset.reshape(1),
    }


def dequantize(parts: dict[str, Tensor], kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The parts of `quantize` -> W [N, K] in `dtype`."""
    packed, scales = parts["packed"], parts["scales"]
    if kind == "int8":
        return (packed.to(torch.float32) * (scales / 127.0).unsqueeze(1)).to(dtype)
    functional = _bitsandbytes()
    if "scale_scales" in parts:
        code = functional.create_dynamic_map().to(packed.device)
        scales = functional.dequantize_blockwise(
            scales, absmax=parts["scale_scales"], code=code, blocksize=SCALE_BLOCK
        ).float()
        scales = scales + parts["scale_offset"]
    state = functional.QuantState(
        absmax=scales, shape=torch.Size(shape), dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4"
    )
    return functional.dequantize_4bit(packed, state).view(shape)


def quantized(model: nn.Module, section: Quantization) -> nn.Module:
    """`model` with its linear layers quantized in place, all but the output head and a classifier; returns it."""
    for name, parent, linear in _linears(model):
        setattr(parent, name, QuantizedLinear(linear, section))
    return model


def rounded(model: nn.Module, section: Quantization) -> nn.Module:
    """`model` with the weights that its quantized form computes with, in full size: what an adapter learned over."""
    with torch.no_grad():
        for _, _, linear in _linears(model):
            weight = linear.weight
            parts = quantize(weight.detach(), section)
            weight.copy_(dequantize(parts, section.kind, (weight.shape[0], weight.shape[1]), weight.dtype))
    return model


def _linears(model: nn.Module) -> list[tuple[str, nn.Module, nn.Linear]]:
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


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingPackage("bitsandbytes", "quantization.kind") from error
    return functional
