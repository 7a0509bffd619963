"""Losses made inside the output head, so that its logits are never held.

While something is `asked` of a model, its head hands the hidden states and its weights to what was asked and returns a
zero in place of the logits. Because this happens in the head's own forward, whatever wraps the model (FSDP2, ZeRO-3,
DistributedDataParallel, hooks) sees the head run as always and has its weight whole there. When nothing is asked,
logits come out.

What a model does to its logits afterwards (a cap, a scale, a bias) is read from its configuration and proven on a small
instance of its class.
"""

# B rows, T tokens, N = B*T hidden states, H hidden size, V vocabulary

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers.initialization import no_init_weights

from ingot.model.lines import shrunk
from ingot.model.split import style_of
from ingot_kernels.dispatch import Impl
from ingot_kernels.linear_cross_entropy import Head, LowRank, linear_cross_entropy_reference

Group = torch.distributed.ProcessGroup | None
Compute = Callable[[Tensor, Head], Tensor]  # (hidden states [N, H], the head) -> what is asked, connected to both

SCALES = {"logit_scale": 1.0, "lm_head_multiplier": 1.0, "logits_scaling": -1.0}  # name in a configuration -> exponent
SHIFT = "final_logits_bias"  # a buffer [1, V] of BART and its kin
LENGTH = 11  # tokens of the trial
CLOSE = 1e-4  # largest difference of loss or a gradient, as a share of the largest value; rounding leaves about 1e-6


class Form(NamedTuple):
    """What follows the head's product: softcap(scale * (logits + the model's final_logits_bias)) where it has one."""

    scale: float = 1.0
    softcap: float | None = None


class Asked:
    """A question to a head, and its answer."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._answer: Tensor | None = None

    def put(self, hidden: Tensor, head: Head) -> Tensor:
        """Answer it for `hidden` [B, T, H]; return zeros [B, T, 1] that a gradient passes through to the answer.

        They must be part of the loss: hooks that gather weights for the backward pass sit on the head's output.
        """
        if self._answer is not None:
            raise RuntimeError("the output head ran twice in one forward pass")
        self._answer = self._compute(hidden.flatten(0, -2), head)
        return (self._answer.sum() * 0).to(hidden.dtype).expand(*hidden.shape[:-1], 1)

    def answer(self, output: Any) -> Tensor:
        """What was asked for. `output`: what the model's forward returned."""
        if self._answer is None:
            raise RuntimeError("the output head did not run")
        zeros = output if isinstance(output, Tensor) else output.logits
        return self._answer + 0 * zeros.sum()


class FusedHead:
    """Stands in for the forward of a head's module."""

    def __init__(self, module: nn.Module, owner: nn.Module, form: Form, impl: Impl, group: Group = None) -> None:
        self.module, self.owner, self.form, self.impl = module, owner, form, impl
        self.group = group  # whose ranks share the vocabulary
        self.before: Any = vars(module).get("forward")  # another stand-in
        self.own: Any = module.forward
        self.asked: Asked | None = None
        self.shift: Tensor | None = None  # [1, V], while something is asked

    def __call__(self, hidden: Tensor, *rest: Any, **named: Any) -> Tensor:
        """hidden [B, T, H] -> logits [B, T, V], or while something is asked zeros [B, T, 1]."""
        if self.asked is None:
            logits: Tensor = self.own(hidden, *rest, **named)
            return logits
        return self.asked.put(hidden, self.head())

    def head(self) -> Head:
        """Its tensors as they are now. By attribute: under ZeRO-3 it is the look-up that gathers a parameter."""
        layer: Any = self.module
        adapter = None
        if hasattr(layer, "lora_A"):
            adapter, layer = _adapter(layer), layer.get_base_layer()
        bias = _local(layer.bias)
        if self.shift is not None:
            bias = self.shift.flatten() if bias is None else bias + self.shift.flatten()
        return Head(_local(layer.weight), bias, adapter, self.form.scale, self.form.softcap)


def attach(model: nn.Module, impl: Impl, tensor: int = 1) -> tuple[int, str | None]:
    """Let the model's output head answer what is `asked`: (1, None), or (0, why it cannot).

    Before ranks share the model, `tensor` of them each matrix; its weights may lie on the meta device. Adapters come
    before, compilation after. Raises RecipeError where `tensor` ranks cannot share the model at all.
    """
    owner = _owner(model)
    module = _head_of(owner)
    if module is None:
        return 0, "the model has no output head over a vocabulary"
    if isinstance(vars(module).get("forward"), FusedHead):
        return 1, None
    reason = _unfit(module)
    if reason is None and tensor > 1:
        style = style_of(model, module, tensor)  # None: it is tied to what stays whole
        reason = None if style is None else _unshared(owner, module, style.startswith("colwise"), tensor)
    if reason is not None:
        return 0, reason
    form = trial(type(owner), owner.config)
    if isinstance(form, str):
        return 0, form
    _install(module, owner, form, impl)
    return 1, None


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    fused = fused_head(model)
    if fused is not None:
        del fused.module.forward
        if fused.before is not None:
            fused.module.forward = fused.before


def split_over(model: nn.Module, fused: FusedHead, group: torch.distributed.ProcessGroup) -> None:
    """Attach `fused` again, detached while ranks of `group` cut the model: they share the vocabulary where it was cut.

    A head that `attach` would not have taken for so many ranks is left without: logits come out.
    """
    module: Any = _head_of(fused.owner)
    if not isinstance(module.weight, DTensor):  # tied to what stays whole
        _install(module, fused.owner, fused.form, fused.impl)
    elif _unshared(fused.owner, module, module.weight.placements == (Shard(0),), group.size()) is None:
        _install(module, fused.owner, fused.form, fused.impl, group)


def fused_head(model: nn.Module) -> FusedHead | None:
    """What `attach` put there, if anything."""
    module = _head_of(_owner(model))
    found = None if module is None else vars(module).get("forward")
    return found if isinstance(found, FusedHead) else None


@contextmanager
def asked(fused: FusedHead, compute: Compute) -> Iterator[Asked]:
    """Inside, the next forward pass of the head's model answers `compute`."""
    question = fused.asked = Asked(compute)
    fused.shift = getattr(fused.owner, SHIFT, None)
    if fused.shift is not None:  # added to zeros [B, T, 1], all of it would make them [B, T, V]
        setattr(fused.owner, SHIFT, fused.shift[:, :1])
    try:
        yield question
    finally:
        if fused.shift is not None:
            setattr(fused.owner, SHIFT, fused.shift)
        fused.asked = fused.shift = None


def _owner(model: nn.Module) -> Any:
    """The transformers model under peft's wrapper."""
    unwrap: Any = getattr(model, "get_base_model", lambda: model)
    return unwrap()


def _head_of(owner: Any) -> nn.Module | None:
    found: nn.Module | None = getattr(owner, "get_output_embeddings", lambda: None)()
    return found


def _install(module: nn.Module, owner: nn.Module, form: Form, impl: Impl, group: Group = None) -> None:
    module.forward = FusedHead(module, owner, form, impl, group)


def _local(tensor: Any) -> Any:
    """What this rank holds of it; the others of its tensor group hold the rest."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _adapter(layer: Any) -> LowRank | None:
    """The active adapter of one of peft's layers."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return None
    [name] = names
    a, b = layer.lora_A[name].weight, _local(layer.lora_B[name].weight)
    return LowRank(a, b, float(layer.scaling[name]))


def _unfit(module: Any) -> str | None:
    """Why a head of this kind is left as it is, or None."""
    layer = module
    if hasattr(module, "lora_A"):
        layer = module.get_base_layer()
        if len(module.lora_A) > 1:
            return "the output head has several adapters"
        if len(module.lora_magnitude_vector):
            return "the output head's adapter is weight-decomposed (adapter.dora), over norms of all its rows"
        if any(getattr(dropout, "p", 0) for dropout in module.lora_dropout.values()):
            return "the output head's adapter drops inputs (adapter.dropout)"
    if type(layer) is not nn.Linear:
        return f"the output head is a {type(layer).__name__}, not a linear layer"
    return None


def _unshared(owner: Any, module: Any, by_words: bool, ranks: int) -> str | None:
    """Why `ranks` that each hold a part of a head (`by_words`: of its vocabulary) cannot make a loss of it, or None."""
    vocabulary = module.weight.shape[0]
    if not by_words:
        return f"parallel.tensor = {ranks} cuts the output head along hidden states"
    if vocabulary % ranks:
        return f"parallel.tensor = {ranks} does not divide its vocabulary of {vocabulary:,}"
    if getattr(owner, SHIFT, None) is not None:
        return f"parallel.tensor = {ranks} cuts the output head and leaves {SHIFT} whole"
    return None


def trial(kind: Any, config: Any) -> Form | str:
    """What `kind`, a class of models, does to its logits; or why its head cannot answer.

    A small instance is asked for its loss: it and the gradient of what goes into the head must equal those of its own
    logits. Only its head has weights: drawing those of a layer of 4,096 took a second.
    """
    text = config.get_text_config()
    scales = [getattr(text, name) ** power for name, power in SCALES.items() if getattr(text, name, None)]
    forms = [Form(scale, getattr(text, "final_logit_softcapping", None)) for scale in (*scales, 1.0)]
    failure = ""
    for narrow in (True, False):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad(), no_init_weights():
                torch.manual_seed(0)
                model = kind._from_config(
                    shrunk(config, narrow=narrow), dtype=torch.float32, attn_implementation="eager"
                ).eval()
                found = next((form for form in forms if _same(model, form)), None)
        except Exception as error:  # whatever a class of others' raises when made small or asked without logits
            failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        return found or f"{kind.__name__} changes its logits in a way that is not known here"
    return f"{kind.__name__} could not be tried out without logits ({failure[:200]})"


def _same(model: Any, form: Form) -> bool:
    """Whether the loss and the hidden gradient of a head of this form are those of the model's own logits."""
    module = model.requires_grad_(False).get_output_embeddings()
    if module is None or _unfit(module) is not None:
        return False
    vocabulary, hidden = module.weight.shape
    module.weight.normal_(std=10 / hidden**0.5)  # logits so large that a cap shows
    for bias in (module.bias, getattr(model, SHIFT, None)):  # they start at zero
        if bias is not None:
            bias.normal_()
    ids_1T, targets_T = torch.randint(3, vocabulary, (1, LENGTH)), torch.randint(vocabulary, (LENGTH,))
    inputs = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_1T
    seen: list[Tensor] = []
    states_1TH = torch.randn(1, LENGTH, hidden)  # in place of what comes from layers without weights

    def instead(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(states_1TH.expand_as(given[0]).clone().requires_grad_())
        return (seen[-1], *given[1:])

    module.register_forward_pre_hook(instead)
    plain = F.cross_entropy(model(**inputs).logits[0].float(), targets_T, reduction="sum")
    _install(module, model, form, "torch")
    try:
        compute = lambda hidden, head: linear_cross_entropy_reference(hidden, head, targets_T)  # noqa: E731
        with asked(module.forward, compute) as question:
            output = model(**inputs)
            fused = question.answer(output)
    finally:
        del module.forward
        module._forward_pre_hooks.clear()
    [before], [after] = torch.autograd.grad(plain, seen[:1]), torch.autograd.grad(fused, seen[1:])
    narrow = output.logits.shape[-1] == 1  # something else of the vocabulary's size may have been added
    return narrow and all(
        bool((one - other).abs().max() <= CLOSE * one.abs().max()) for one, other in ((plain, fused), (before, after))
    )
