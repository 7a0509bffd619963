"""What an adapter can sit on: linear layers, fused experts, the output head and the embedding of a model.

E experts, N outputs, K inputs of a layer.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

# What peft puts between a base model's names.
WRAPPERS = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.default)(?=\.)")
ADDED = ("lora_", "modules_to_save", "original_module")
EXPERTS = "experts"
# Subclasses of nn.Linear in transformers 5.23 that give something else than x Wᵀ: indices, or a product a group.
OTHERWISE = ("Router", "Grouped")

Kind = Literal["linear", "experts", "head", "embedding", "other"]


class Matrix(NamedTuple):
    """A weight, `key` of `module`. Its `name` is that of the plain model, whatever peft has put around it.

    linear: [N, K], or [K, N] in GPT-2's Conv1D. experts: [E, N, K] or [E, K, N]. other: what no adapter can follow.
    """

    name: str
    module: nn.Module
    key: str
    kind: Kind
    size: int

    @property
    def owner(self) -> str:
        """Name of the module."""
        return self.name.rpartition(".")[0]

    @property
    def fused(self) -> bool:
        """Whether the weight stands for many layers, and is named itself where others name their layer."""
        return self.kind in ("experts", "other")

    @property
    def suffix(self) -> str:
        """The end of `name` that tells it from other layers' weights: `experts.gate_up_proj`."""
        return ".".join(self.name.split(".")[-2:])

    @property
    def called(self) -> tuple[str, ...]:
        """What a recipe may call it, the plainest name first."""
        last = self.owner.rpartition(".")[2]
        if not self.fused:
            return (last,)
        return (last if self.key == "weight" else self.key, self.suffix, EXPERTS)


def matrices(model: nn.Module, whole: Sequence[str] = ()) -> list[Matrix]:
    """Every weight of `model` that a product or a look-up is made of, in its order; adapters themselves left out.

    Not among them: modules that are trained as a `whole` (names; where peft has made copies of them it is known),
    routers (which choose experts, and stay as they are, as biases and norms do) and convolutions.
    """
    inside = tuple(f"{name}." for name in whole)
    return [matrix for matrix in _matrices(model) if not matrix.name.startswith(inside)]


def _matrices(model: nn.Module) -> Iterator[Matrix]:
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    base = unwrap()
    head, embedding = (_plain(base, f"get_{end}_embeddings") for end in ("output", "input"))
    for prefix, module in model.named_modules():
        if any(part in prefix for part in ADDED):
            continue
        for key in _weights(module):
            name = WRAPPERS.sub("", f"{prefix}.{key}").removeprefix(".")
            kind = _kind(name, module, key, head, embedding)
            if kind is not None:
                yield Matrix(name, module, key, kind, _size(module, key))


def _plain(base: nn.Module, getter: str) -> nn.Module | None:
    """The layer itself, without an adapter around it."""
    try:
        found = getattr(base, getter, lambda: None)()
    except NotImplementedError:  # a model that reads no tokens
        return None
    return getattr(found, "base_layer", found)


def _weights(module: nn.Module) -> list[str]:
    if isinstance(module, nn.Linear):
        return ["weight"]  # a quantized one holds other parameters than that
    return [key for key, value in module._parameters.items() if value is not None and value.ndim > 1]


def _kind(name: str, module: nn.Module, key: str, head: nn.Module | None, embedding: nn.Module | None) -> Kind | None:
    kind = type(module).__name__
    if module is head:
        return "head"
    if module is embedding:
        return "embedding"
    if isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and not any(word in kind for word in OTHERWISE)):
        return "linear"
    if "Router" in kind or isinstance(module, nn.Embedding):
        return None
    if isinstance(module, nn.Linear):
        return "other"
    if EXPERTS[:-1] in f"{name} {kind}".lower() and "bias" not in key:
        return "experts" if module._parameters[key].ndim == 3 else "other"  # type: ignore[union-attr]
    return None


def _size(module: nn.Module, key: str) -> int:
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    parameter = module._parameters[key]
    assert parameter is not None
    return parameter.numel()
