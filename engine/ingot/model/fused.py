"""Fused operations (`ingot_kernels`) in the places of a model's own, on this model only.

A module keeps its class, name, parameters and hooks; only the `forward` of the instance is another function. What it
computes is not told by its name: a small instance of the model is made (lines.py), each candidate is tried on it, and
what gives other results stays as it is, with the reason in the report.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ingot.errors import RecipeError
from ingot.model import head
from ingot.model.fused_blocks import (
    GATED,
    adapted_forward,
    attention_forward,
    block_forward,
    fused_by,
    gated_forward,
    method,
    norm_forward,
)
from ingot.model.lines import shrunk
from ingot.model.quantize import QuantizedLinear
from ingot.recipe import Kernels
from ingot_kernels.dispatch import INSTALLED, INTERPRETED, Impl
from ingot_kernels.gated import Act
from ingot_kernels.rms_norm import Mode, rms_norm_reference

OPS = ("rms_norm", "rope", "gated", "lora_linear", "linear_cross_entropy")
LENGTH = 40  # tokens of the trial: more than the windows of `shrunk`
CLOSE = 1e-4  # largest difference of a trial's outputs, as a share of their size; rounding leaves about 1e-6
GAIN = 2.0  # size of what a matrix of the trial gives, for inputs of size 1
ACTS: tuple[Act, ...] = ("silu", "gelu_tanh", "gelu")
MODES: tuple[Mode, ...] = ("llama", "gemma")
EPS = ("variance_epsilon", "eps")  # what families call it


@dataclass
class Report:
    """For each operation the modules that it computes now, and those that were left and why."""

    replaced: dict[str, list[str]] = field(default_factory=lambda: {op: [] for op in OPS})
    left: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {op: {} for op in OPS})

    def leave(self, op: str, why: str, names: Sequence[str] = ()) -> None:
        self.left[op].setdefault(why, []).extend(names)

    def lines(self) -> list[str]:
        """For people: an operation a line."""
        found = []
        for op in OPS:
            if not self.replaced[op] and not self.left[op]:
                continue
            parts = [f"{len(self.replaced[op])} replaced"]
            parts += [f"{len(names) or 'all'} left ({why})" for why, names in self.left[op].items()]
            found.append(f"kernels.{op}: {', '.join(parts)}")
        return found

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return {op: {"replaced": self.replaced[op], "left": self.left[op]} for op in OPS}


def apply(model: nn.Module, section: Kernels, *, hooked: str | None = None, tensor: int = 1) -> Report:
    """Let `ingot_kernels` compute what `section.ops` names, wherever this model has a place for it; with adapters and
    quantization already in it, before it is spread over ranks or compiled.

    `hooked`: who puts hooks on single layers afterwards (zero3, tensor), which calls of several layers at once would
    pass by. `tensor`: ranks that will share each matrix. Raises RecipeError when an operation that a list names finds
    no place, where `tensor` ranks cannot share the model, and as `check` does.
    """
    report = Report()
    if section.ops == "none":
        return report
    check(section)
    wanted = OPS if section.ops == "auto" else tuple(section.ops)
    owner = _owner(model)
    plans = _plans(owner, wanted, report) if owner is not None else {}
    if owner is None:
        report.leave("rms_norm", "not a model of transformers")
    methods = {kind: method(partial(function, impl=section.impl)) for kind, (_, function) in plans.items()}
    for name, module in model.named_modules():
        plan = plans.get(type(module))
        if plan is None:
            continue
        op, function = plan
        if hooked and function.func in (attention_forward, block_forward):
            report.leave(op, f"{hooked} puts hooks on its parts", [name])
            continue
        module.forward = MethodType(methods[type(module)], module)
        report.replaced[op].append(name)
    if "linear_cross_entropy" in wanted:
        count, why = head.attach(model, section.impl, tensor)
        if count:
            report.replaced["linear_cross_entropy"].append("the output head")
        else:
            report.leave("linear_cross_entropy", why or "no output head")
    if "lora_linear" in wanted:
        _replace_adapters(model, section.impl, hooked, report)
    if section.ops != "auto":
        _check_all(wanted, report, owner)
    return report


def check(section: Kernels) -> None:
    """Raise RecipeError for Triton where it cannot run."""
    if section.impl == "triton" and not (INSTALLED and (INTERPRETED or torch.cuda.is_available())):
        lack = "there is no GPU here" if INSTALLED else "the package triton is not installed"
        raise RecipeError("kernels.impl", "triton", f"{lack}; use auto")


def restore(model: nn.Module) -> None:
    """Undo `apply`."""
    head.detach(model)
    for module in model.modules():
        if fused_by(module) is not None:
            del module.forward


def _check_all(wanted: Sequence[str], report: Report, owner: nn.Module | None) -> None:
    for op in wanted:
        if not report.replaced[op]:
            why = "; ".join(report.left[op]) or "nothing in it computes that"
            what = type(owner).__name__ if owner is not None else "this model"
            raise RecipeError("kernels.ops", op, f"{what} has no place for it: {why}; leave it out, or use auto")


def _owner(model: nn.Module) -> Any:
    """The transformers model in what was put around it."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


# --- what a class of modules computes, found out on a small instance

Plan = tuple[str, partial[Any]]  # an operation, and a forward that takes the module first


def _plans(owner: Any, wanted: Sequence[str], report: Report) -> dict[type, Plan]:
    """Class of a module -> what to do with it."""
    twin, why = _twin(owner)
    if twin is None:
        for op in set(wanted) & {"rms_norm", "rope", "gated"}:
            report.leave(op, why)
        return {}
    plans: dict[type, Plan] = {}
    plain = {training: _run(twin, training=training) for training in (False, True)}
    names = {type(module): name for name, module in reversed(list(twin.named_modules()))}
    for kind, candidates in _candidates(twin):
        tried = [(op, function) for op, function in candidates if op in wanted]
        found = _best(twin, kind, tried, plain)
        if found is not None:
            plans[kind] = found
        elif tried:
            same = [name for name, module in owner.named_modules() if type(module) is kind]
            report.leave(tried[0][0], f"{kind.__name__} computes something else", same or [names[kind]])
    return plans


def _twin(owner: Any) -> tuple[Any, str]:
    """A small instance of the model's class in float32, with weights that hide nothing; or why there is none."""
    failure = ""
    for narrow in (True, False):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                torch.manual_seed(0)
                config = shrunk(owner.config, narrow=narrow)
                for part in (config, config.get_text_config()):
                    part.use_cache = False  # with a cache attention is the model's own, and everything would look right
                twin = type(owner)._from_config(config, dtype=torch.float32, attn_implementation="eager")
                for parameter in twin.parameters():
                    if parameter.ndim == 1:  # norms start as ones and zeros, and would look alike
                        parameter.add_(torch.randn_like(parameter) * 0.3)
                    elif parameter.any():  # small ones keep activations and scores where everything is linear
                        parameter.mul_(GAIN / (parameter.square().mean() * parameter.shape[-1]) ** 0.5)
                for training in (False, True):
                    _run(twin, training=training)
        except Exception as error:  # whatever a class of others' raises when it is made small
            failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
            continue
        return twin, ""
    return None, f"{type(owner).__name__} could not be tried out ({failure})"


@torch.no_grad()
def _run(twin: Any, *, training: bool) -> Tensor:
    """What the small instance gives for two rows of tokens, always with the same dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return _outputs(twin.train(training))


def _outputs(twin: Any) -> Tensor:
    ids_BT = torch.randint(3, twin.get_input_embeddings().weight.shape[0], (2, LENGTH))
    inputs: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if twin.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids_BT
    output: Tensor = twin(**inputs, return_dict=False)[0]
    if not output.isfinite().all():
        raise RuntimeError("its outputs are not finite")
    return output


def _best(twin: Any, kind: type, tried: list[Plan], plain: dict[bool, Tensor]) -> Plan | None:
    """What computes the same in all modules of `kind`, if anything. The closest: two kinds of GELU are close, too."""
    errors = [_error(twin, kind, function, plain[False], training=False) for _, function in tried]
    if not errors or min(errors) > CLOSE:
        return None
    found = tried[errors.index(min(errors))]
    # A dropout that is left out shows in training only.
    return found if _error(twin, kind, found[1], plain[True], training=True) <= CLOSE else None


def _error(twin: Any, kind: type, function: Callable[..., Any], plain: Tensor, *, training: bool) -> float:
    """Largest difference that `function` in all modules of `kind` makes, as a share of the outputs' size."""
    modules: list[Any] = [module for module in twin.modules() if type(module) is kind]
    try:
        for module in modules:
            module.forward = partial(function, module, impl="torch")  # on the CPU, whatever the model runs on
        fused = _run(twin, training=training)
    except Exception:  # a forward of another shape; the reason is that it is another one
        return float("inf")
    finally:
        for module in modules:
            vars(module).pop("forward", None)
    return float((plain - fused).abs().max() / plain.abs().max())


def _candidates(twin: Any) -> Iterator[tuple[type, list[Plan]]]:
    """Classes that look like something known, innermost first, each with the forwards to try."""
    kinds = {type(module): module for module in twin.modules()}
    norms = {kind: _norm_of(module) for kind, module in kinds.items()}
    for kind, given in norms.items():
        if given is not None:
            mode, eps = given
            yield kind, [("rms_norm", partial(norm_forward, eps=eps, mode=mode))]
    for kind, module in kinds.items():
        forms = [form for names, form in GATED if _has(module, names)]
        if forms:
            acts = [(form, act) for form in forms for act in ACTS]
            yield kind, [("gated", partial(gated_forward, form=form, act=act)) for form, act in acts]
        elif _has(module, ("q_proj", "k_proj", "v_proj", "o_proj")) and hasattr(module, "head_dim"):
            given = norms.get(type(getattr(module, "q_norm", None)))
            if given is None and _has(module, ("q_norm",)):
                continue
            yield (
                kind,
                [
                    ("rope", partial(attention_forward, norm=given, interleaved=interleaved))
                    for interleaved in (False, True)
                ],
            )
        elif _has(module, ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")):
            given = norms.get(type(module.post_attention_layernorm))
            if given is not None:
                yield kind, [("rms_norm", partial(block_forward, norm=given))]


def _has(module: Any, names: Sequence[str]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _norm_of(module: Any) -> tuple[Mode, str] | None:
    """(mode, the attribute that holds eps) of a module that normalizes as `rms_norm` does."""
    eps = next((name for name in EPS if isinstance(getattr(module, name, None), float)), None)
    weights: list[Tensor] = list(module.parameters())
    if eps is None or len(weights) != 1 or weights[0].ndim != 1 or weights[0] is not getattr(module, "weight", None):
        return None
    x = torch.randn(2, 5, weights[0].numel(), generator=torch.Generator().manual_seed(2))
    x = torch.cat([3 * x, x * getattr(module, eps) ** 0.5])  # small ones show what eps does
    for mode in MODES:
        with torch.no_grad():
            try:
                if torch.allclose(
                    module(x), rms_norm_reference(x, module.weight, getattr(module, eps), mode), rtol=1e-4, atol=1e-5
                ):
                    return mode, eps
            except Exception:  # takes something else than one tensor
                return None
    return None


# --- adapters


def _replace_adapters(model: nn.Module, impl: Impl, hooked: str | None, report: Report) -> None:
    forward = method(partial(adapted_forward, impl=impl))
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or "forward" in vars(module):  # the head may have its own
            continue
        why = f"{hooked} puts hooks on its parts" if hooked else _unfit(module)
        if why is not None:
            report.leave("lora_linear", why, [name])
            continue
        module.forward = MethodType(forward, module)
        report.replaced["lora_linear"].append(name)


def _unfit(layer: Any) -> str | None:
    """Why a layer with adapters is left to peft."""
    base = layer.get_base_layer()
    if not isinstance(layer, LoraLinear):
        return f"adapters over a {type(base).__name__}"
    if type(base) is not nn.Linear and not isinstance(base, QuantizedLinear):
        return f"its base is a {type(base).__name__}"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "its base is trained, too"
    weighed = any(name in layer.lora_magnitude_vector for name in layer.lora_A)
    if weighed and any(getattr(dropout, "p", 0) for dropout in layer.lora_dropout.values()):
        return "dora with dropout"
    if any(getattr(up, "bias", None) is not None for up in layer.lora_B.values()):
        return "its adapter has a bias"
    return None
