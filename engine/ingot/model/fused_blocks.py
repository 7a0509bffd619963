"""Forwards that stand in for those of single modules; each takes the module whose place it stands in first.

fused.py decides which modules get them.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ingot.model.quantize import QuantizedLinear
from ingot_kernels.dispatch import Impl
from ingot_kernels.gated import Act, gated
from ingot_kernels.lora_linear import Adapter, Projection, lora_linear
from ingot_kernels.rms_norm import Mode, add_rms_norm, rms_norm
from ingot_kernels.rope import qk_rope


def method(function: partial[Any]) -> Callable[..., Any]:
    """`function` as something to bind to modules, one for all of a kind: torch.compile knows a function by its
    identity, and would compile every layer anew for a `partial` of its own.
    """

    def forward(module: Any, *args: Any, **options: Any) -> Any:
        return function(module, *args, **options)

    forward.fused = function  # type: ignore[attr-defined]
    return forward


def fused_by(module: Any) -> Any:
    """The function of this file that computes a module; None where it is its own."""
    fused = getattr(vars(module).get("forward"), "fused", None)
    return None if fused is None else fused.func


def norm_forward(module: Any, x: Tensor, *, eps: str, mode: Mode, impl: Impl) -> Tensor:
    """`eps`: its attribute, for not all norms of a class need have the same."""
    return rms_norm(x, module.weight, getattr(module, eps), mode, impl=impl)


def _three(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = _projected(x, module.gate_proj, module.up_proj)
    return gate, up


def _wo(module: Any, h: Tensor) -> Tensor:
    """T5's last product, in the type of its weight: transformers keeps it in float32 in models of half precision."""
    output: Tensor = module.wo(module.dropout(h).to(module.wo.weight.dtype))
    return output


GATED: tuple[tuple[tuple[str, ...], tuple[Callable[..., Any], Callable[..., Any]]], ...] = (
    (("gate_proj", "up_proj", "down_proj"), (_three, lambda module, h: module.down_proj(h))),
    (("gate_up_proj", "down_proj"), (lambda m, x: m.gate_up_proj(x).chunk(2, dim=-1), lambda m, h: m.down_proj(h))),
    (("Wi", "Wo", "drop"), (lambda m, x: m.Wi(x).chunk(2, dim=-1), lambda m, h: m.Wo(m.drop(h)))),
    (("wi_0", "wi_1", "wo", "dropout"), (lambda m, x: (m.wi_0(x), m.wi_1(x)), _wo)),
)


def gated_forward(module: Any, x: Tensor, *, form: Any, act: Act, impl: Impl) -> Tensor:
    parts, last = form
    gate, up = parts(module, x)
    output: Tensor = last(module, gated(gate, up, act, impl=impl))
    return output


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    *,
    norm: tuple[Mode, str] | None,
    interleaved: bool,
    impl: Impl,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Projections, normalization and rotation of heads, whatever attends, and the output's projection."""
    if past_key_values is not None or position_embeddings is None:  # generation
        found: tuple[Tensor, Any] = type(module).forward(
            module,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **options,
        )
        return found
    projections = _projected(hidden_states, module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (part.unflatten(-1, (-1, module.head_dim)) for part in projections)
    weights = None if norm is None else (module.q_norm.weight, module.k_norm.weight)
    mode: Mode = "llama" if norm is None else norm[0]
    eps = 0.0 if norm is None else getattr(module.q_norm, norm[1])
    q, k = qk_rope(q, k, *position_embeddings, weights, eps, mode, interleaved=interleaved, impl=impl)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    output, shares = attend(
        module,
        q,
        k,
        v.transpose(1, 2),
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **_asked_of_attention(module),
        **options,
    )
    return module.o_proj(output.flatten(2)), shares


def _asked_of_attention(module: Any) -> dict[str, Any]:
    """What families hand to attention beside the mask."""
    config, found = module.config, {}
    if hasattr(module, "sliding_window") or getattr(config, "sliding_window", None) is not None:
        found["sliding_window"] = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    if getattr(module, "attn_logit_softcapping", None) is not None:
        found["softcap"] = module.attn_logit_softcapping
    if getattr(module, "sinks", None) is not None:
        found["s_aux"] = module.sinks
    return found


def block_forward(
    module: Any, hidden_states: Tensor, *args: Any, norm: tuple[Mode, str], impl: Impl, **options: Any
) -> Tensor:
    """A block that normalizes before attention and before its MLP: the first addition goes into the second norm."""
    if args:  # never by position in transformers 5
        found: Tensor = type(module).forward(module, hidden_states, *args, **options)
        return found
    attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **options)
    after = module.post_attention_layernorm
    normed, total = add_rms_norm(attended, hidden_states, after.weight, getattr(after, norm[1]), norm[0], impl=impl)
    output: Tensor = total + module.mlp(normed)
    return output


def _ready(layer: Any) -> bool:
    """Whether a layer is one of `_replace_adapters`, with its adapters at work and nothing hooked to it."""
    fused = fused_by(layer) is adapted_forward
    return fused and not (layer.disable_adapters or layer.merged or layer._forward_hooks or layer._forward_pre_hooks)


def _projected(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """x through every layer: in one operation where all have adapters."""
    if not all(_ready(layer) for layer in layers):
        return tuple(layer(x) for layer in layers)
    return lora_linear(x, [_projection(layer) for layer in layers])


def adapted_forward(layer: Any, x: Tensor, *args: Any, impl: Impl, **options: Any) -> Tensor:
    if args or options or layer.disable_adapters or layer.merged:
        found: Tensor = type(layer).forward(layer, x, *args, **options)
        return found
    return lora_linear(x, [_projection(layer)], impl=impl)[0]


def _projection(layer: Any) -> Projection:
    base = layer.get_base_layer()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return Projection(
        base if isinstance(base, QuantizedLinear) else base.weight,
        base.bias,
        tuple(_adapter(layer, name) for name in names),
    )


def _adapter(layer: Any, name: str) -> Adapter:
    dropout, magnitudes = layer.lora_dropout[name], layer.lora_magnitude_vector
    magnitude = magnitudes[name].weight if name in magnitudes else None
    share = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], share, magnitude)
