"""What the backward pass finds again: computed anew, kept, or in CPU memory; and blocks as compiled code.

`selective` keeps results of matrix products and of attention, and computes the rest of a block again: norms,
activations, rotations, casts. Korthikanti et al. 2022 (arXiv 2205.05198) do the reverse for attention that holds its
whole matrix of scores; fused attention does not, so here products and attention are the dear ones.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ingot.errors import RecipeError
from ingot.parallel.fsdp import blocks_of
from ingot.parallel.offload import Cuda, Offload
from ingot.recipe import Train

# Operations (without namespace and overload) whose results `selective` keeps.
# Products with the place of their first factor.
PRODUCTS = {
    "mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1, "linear": 0, "_grouped_mm": 0,
    "_int_mm": 0, "_scaled_mm": 0,
}  # fmt: skip
# A product over no more than so many numbers costs about what it takes to read its result. Kept, those of rank 16 made
# `selective` hold more than `none` (358 and 324 MiB; 8 layers of 512, 1,024 tokens, float32).
NARROW = 128
COMPILERS = ("g++", "clang++", "c++")
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_varlen_attn",  # torch.nn.attention.varlen
    "_flash_attn_varlen_forward",  # flash-attn
}


def apply_activations(model: nn.Module, train: Train, device: torch.device) -> None:
    """Do to `model` in place what `train` says about activations, and compile its blocks; adapters and fused
    operations come before. Raises RecipeError as `check` does.
    """
    check(train, device)
    if train.activation_checkpointing != "none":
        recompute_blocks(model, selective=train.activation_checkpointing == "selective")
    if train.offload_activations:
        Offload(Cuda(device)).attach(blocks_of(model))
    if train.compile:
        compile_blocks(model)


def check(train: Train, device: torch.device) -> None:
    """Raise RecipeError for `offload_activations` where there is no other memory to move to, and for `compile` without
    the compiler that torch.compile writes code for.
    """
    if train.compile and device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise RecipeError(
            "train.compile", True, f"needs a C++ compiler on a CPU: install one of {', '.join(COMPILERS)}"
        )
    if train.offload_activations and device.type != "cuda":
        raise RecipeError(
            "train.offload_activations",
            True,
            f"on {device.type} activations are in CPU memory already; remove it, or use "
            "train.activation_checkpointing=full",
        )


def recompute_blocks(model: nn.Module, *, selective: bool = False) -> None:
    """Recompute each block's activations in the backward pass (Chen et al. 2016) instead of keeping them.

    The non-reentrant kind: with the reentrant one and frozen embeddings adapters get no gradient and stay at zero.
    """
    inner: Any = getattr(model, "backbone", model)
    # transformers 5.23 renamed it; the old name warns there, the new one is missing before.
    word = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    enable = getattr(inner, f"{word}_checkpointing_enable")
    given: dict[str, Any] = {"use_reentrant": False}
    enable(**{f"{word}_checkpointing_kwargs": given | ({"context_fn": keep_products} if selective else {})})


def keep_products() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """(context of the forward pass, context of its repetition), as torch.utils.checkpoint takes them."""
    kept: list[_Kept] = []
    return _Keep(kept), _Replay(kept)


class _Kept:
    """A result, or None where it is computed again."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _name(operation: Any) -> str:
    return str(operation._schema.name).rpartition("::")[2]


def _is_kept(operation: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Attention that drops weights is computed again: left out, it would not draw the numbers that it drew before, and
    whatever draws after it would draw others. So is a product over few numbers, such as an adapter's second.
    """
    name = _name(operation)
    if name in PRODUCTS:
        return bool(args[PRODUCTS[name]].shape[-1] > NARROW)
    if name not in ATTENTION:
        return False
    values = dict(zip((argument.name for argument in operation._schema.arguments), args, strict=False)) | named
    return not values.get("dropout_p")


def _places(values: Any) -> Iterator[int]:
    """Where the tensors in `values` lie."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter) and value.numel():
            yield value.untyped_storage().data_ptr()


def _changed(operation: Any, args: tuple[Any, ...], named: dict[str, Any]) -> set[int]:
    """Places that the operation writes to."""
    if not operation._schema.is_mutable:
        return set()
    arguments = operation._schema.arguments
    values = [(argument, named.get(argument.name)) for argument in arguments[len(args) :]]
    values += zip(arguments, args, strict=False)
    written = [value for argument, value in values if argument.alias_info is not None and argument.alias_info.is_write]
    return set(_places(written))


class _Keep(TorchDispatchMode):
    """Fills `kept` with results of the forward pass, in their order.

    A kept result that is written to later is not what the repetition must begin with: it is forgotten and computed
    again. (torch's own selective contexts raise there.)
    """

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self.kept, self.places = kept, dict[int, _Kept]()  # by where the result lies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        for place in _changed(func, args, named):
            if place in self.places:
                self.places.pop(place).value = None
        out = func(*args, **named)
        if _is_kept(func, args, named):
            entry = _Kept(tree_map_only(Tensor, Tensor.detach, out))  # autograd will put its history on `out` itself
            self.kept.append(entry)
            self.places.update((place, entry) for place in _places(out))
        return out

    def __exit__(self, *error: Any) -> None:
        # A block ends with a product that is added to what came in: nothing in the backward pass asks for its result.
        last = self.kept[-1].value if self.kept else None
        if isinstance(last, Tensor) and last.shape[-1] > NARROW:
            self.kept[-1].value = None
        super().__exit__(*error)


class _Replay(TorchDispatchMode):
    """Gives results out in the order in which they were kept."""

    def __init__(self, kept: list[_Kept]) -> None:
        super().__init__()
        self.kept, self.next = kept, 0

    def __enter__(self) -> Any:
        self.next = 0  # with retain_graph there are several repetitions
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if not _is_kept(func, args, named):
            return func(*args, **named)
        entry = self.kept[self.next]
        self.next += 1
        if entry.value is None:
            return func(*args, **named)
        if func._schema.is_mutable:  # a product added in place: the caller goes on with what it was added to
            return args[0].copy_(entry.value)
        return tree_map_only(Tensor, Tensor.detach, entry.value)


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """torch.compile each block as a module, so that its name, its hooks and its parameters stay; return how many.

    Sizes are dynamic: a line has another number of tokens in every step. `backend`: torch.compile's.
    """
    blocks = blocks_of(model)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)
