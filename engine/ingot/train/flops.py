"""Floating-point operations of an optimizer step, counted from the model's shapes, and what a GPU could do at most.

Two conventions, never mixed:

- `6n`: 2 forward and 4 backward per weight and token, as if every weight were trained and the head were applied to
  every token (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B). Compares runs with published figures.
- `lora_aware`: what this step needs. A frozen weight has no gradient of its own (4 instead of 6), and the head is
  applied to targets only.

Both count attention's two products over the tokens that a token sees: half of a row's pairs where it is causal.
Neither counts padding, nor what gradient checkpointing computes again: that is in `hardware` alone.

An encoder-decoder's rows are a source and a target. How many targets all rows have together is known, so a row's are
taken for the same share of it: exact for matrices, near for attention.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# Dense bfloat16 FLOP/s with float32 sums, from the makers' data sheets. Matched by words of the device's name; the
# first row of which every word is there counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ("b300", 2.25e15),
    ("b200", 2.25e15),
    ("h200 nvl", 835e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h800", 989e12),
    ("h20", 148e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("a30", 165e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("a40", 150e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("rtx a6000", 155e12),
    ("rtx 4090", 165e12),
    ("rtx 3090", 71e12),
    ("mi300x", 1307e12),
    ("mi325x", 1307e12),
    ("mi250x", 383e12),
)
HEADS = {"classifier", "score"}
# What a decoder looks at its source with, and what of it reads the source.
CROSS = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"}
KEYS = {"k", "v", "k_proj", "v_proj", "key", "value"}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Most FLOP/s of one GPU in `dtype`; None where that is not known: other types, other devices, slices of a GPU."""
    words = device_name.lower().replace("-", " ").split()
    if dtype != torch.bfloat16 or "mig" in words:
        return None
    return next((peak for name, peak in PEAKS if set(name.split()) <= set(words)), None)


@dataclass(frozen=True)
class AttentionShape:
    """`width`: heads x head size. `window`: the most tokens that a token sees, None for all. `reads`: of an
    encoder-decoder the source, the target, or the source from the target (cross).
    """

    width: int
    causal: bool
    window: int | None
    reads: Literal["row", "source", "target", "cross"] = "row"

    def forward(self, lengths: NDArray[np.int64], share: float = 1.0) -> float:
        """Operations of both products, for rows of `lengths` tokens; `share` of each is its target."""
        if self.reads == "cross":
            return float(4 * self.width * share * (1 - share) * (lengths.astype(np.float64) ** 2).sum())
        tokens = {"row": 1.0, "source": 1 - share, "target": share}[self.reads] * lengths.astype(np.float64)
        seen = tokens if self.window is None else np.minimum(tokens, self.window)
        pairs = seen * tokens - seen**2 / 2 if self.causal else seen * tokens
        return float(4 * self.width * pairs.sum())


@dataclass(frozen=True)
class Flops:
    """Sizes of what tokens are multiplied with. `body`: by every token; `head`: by targets. Counted once for all ranks.

    A mixture's experts count as far as one token meets them. Of an encoder-decoder `source` is multiplied with the
    source, and `body` with the target; None for other models.
    """

    frozen_body: float
    trained_body: float
    frozen_head: float
    trained_head: float
    attention: tuple[AttentionShape, ...]
    source: tuple[float, float] | None = None  # frozen, trained

    @classmethod
    def of(cls, model: nn.Module) -> "Flops":
        """Read a model's matrices; layers that are only looked up (embeddings) do not count."""
        unwrap: Any = getattr(model, "get_base_model", lambda: model)
        head = getattr(unwrap(), "get_output_embeddings", lambda: None)()
        two = bool(getattr(getattr(unwrap(), "config", None), "is_encoder_decoder", False))
        sizes = {(trained, where): 0.0 for trained in (False, True) for where in ("body", "head", "source")}
        for name, module in model.named_modules():
            parts = set(name.split("."))
            if "original_module" in parts or isinstance(module, nn.Embedding):
                continue  # peft keeps what it made a trainable copy of
            where = "head" if module is head or HEADS & parts else "body"
            if two and ("encoder" in parts or (CROSS & parts and KEYS & parts)):
                where = "source"
            for weight, size in _matrices(module, model):
                sizes[weight.requires_grad, where] += size
        attention = tuple(
            _attention(module, set(name.split(".")), two)
            for name, module in model.named_modules()
            if hasattr(module, "is_causal")
        )
        body, heads = (sizes[False, "body"], sizes[True, "body"]), (sizes[False, "head"], sizes[True, "head"])
        return cls(*body, *heads, attention, (sizes[False, "source"], sizes[True, "source"]) if two else None)

    def step(self, lengths: NDArray[np.int64], targets: int) -> dict[str, float]:
        """Operations of a step over rows of `lengths` tokens with `targets` targets in all, by convention."""
        total = float(lengths.sum())
        tokens = total if self.source is None else float(targets)
        frozen, trained = self.source or (0.0, 0.0)
        attention = sum(shape.forward(lengths, targets / total) for shape in self.attention)
        read = (frozen + trained) * (total - tokens)  # multiplications with the source
        body, head = self.frozen_body + self.trained_body, self.frozen_head + self.trained_head
        needed = (4 * self.frozen_body + 6 * self.trained_body) * tokens
        needed += (4 * frozen + 6 * trained) * (total - tokens)
        needed += (4 * self.frozen_head + 6 * self.trained_head) * targets + 3 * attention
        return {
            "6n": 6 * (body + head) * tokens + 6 * read + 3 * attention,
            "lora_aware": needed,
            # The blocks' forward pass once more; the head is outside of them. (torch leaves out a block's last product,
            # as nothing in the backward pass needs its result.)
            "hardware": needed + 2 * body * tokens + 2 * read + attention,
        }


def _matrices(module: nn.Module, model: nn.Module) -> list[tuple[Tensor, float]]:
    """(weight, elements that one token is multiplied with) of what this module itself holds."""
    if isinstance(module, nn.Linear):  # also where the weight is packed into bits or lies on other ranks
        # Not `module.weight`: a quantized layer would make it anew.
        return [(next(module.parameters(recurse=False)), module.in_features * module.out_features)]
    found: list[tuple[Tensor, float]] = []
    for weight in module.parameters(recurse=False):
        shape = getattr(weight, "ds_shape", weight.shape)  # ZeRO-3 leaves an empty tensor behind
        if len(shape) == 2:
            found.append((weight, prod(shape)))
        elif len(shape) == 3:  # experts of one layer, fused
            active = getattr(getattr(model, "config", None), "num_experts_per_tok", None) or shape[0]
            found.append((weight, prod(shape) * min(1.0, active / shape[0])))
    return found


def _attention(module: Any, parts: set[str], two: bool) -> AttentionShape:
    """`parts` of the module's name; `two`: it is in an encoder-decoder."""
    config = module.config
    size = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = getattr(module, "inner_dim", None) or size * config.num_attention_heads  # T5 says how wide it is
    window = getattr(module, "sliding_window", None)
    if not two:
        return AttentionShape(width, bool(module.is_causal), window)
    if CROSS & parts:
        return AttentionShape(width, False, window, "cross")
    return AttentionShape(width, bool(module.is_causal), window, "source" if "encoder" in parts else "target")
