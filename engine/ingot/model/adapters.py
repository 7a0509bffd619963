"""Low-rank adapters: attach, save, merge, and proofs that they are alive. The only file that imports peft."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ingot.errors import IngotError, ModelError, RecipeError
from ingot.model.adapted import PREFIX, TENSORS_FILE, UNDER
from ingot.model.kinds import logits_of
from ingot.model.matrices import Matrix, matrices
from ingot.model.modes import make_readable
from ingot.model.quantize import QuantizedLinear
from ingot.recipe import Adapter, Task
from ingot.registry import nearest

HEADS = ("classifier", "score", "qa_outputs")
PEFT_TASKS = {"summarization": "SEQ_2_SEQ_LM", "translation": "SEQ_2_SEQ_LM", "text-classification": "SEQ_CLS"}


def attach_adapter(model: nn.Module, adapter: Adapter, task: Task, seed: int) -> nn.Module:
    """Freeze `model` and add low-rank updates in float32; a classifier's head is trained as a whole.

    An adapter on an output head that is tied to the embedding unties them, and the configuration says so.

    Raises RecipeError when `adapter.targets` names no weight of this model, or one that takes no adapter of this kind.
    `kind: none` returns the model with every weight trainable that architecture and task let move.
    """
    if adapter.kind == "none":
        for name, parameter in model.named_parameters():
            # What the architecture itself holds fixed, such as sinusoidal positions, stays so.
            parameter.requires_grad &= not _cancels_out(name, parameter, task)
        return model
    heads = _heads(model, task)
    chosen = _targets(model, adapter, heads)
    rewritten = {name for name in {m.called[0] for m in chosen if m.kind == "linear"} if _rewritten(model, name)}
    as_tensors = [m for m in chosen if m.kind == "experts" or (m.kind == "linear" and m.called[0] in rewritten)]
    _check_fused(chosen, as_tensors, adapter)
    _untie(model, chosen)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=_module_names(model, [matrix for matrix in chosen if matrix not in as_tensors]),
        target_parameters=sorted({matrix.suffix for matrix in as_tensors}) or None,
        fan_in_fan_out=all(isinstance(matrix.module, Conv1D) for matrix in chosen),
        exclude_modules=heads or None,
        modules_to_save=heads or None,
        task_type=PEFT_TASKS.get(task, "CAUSAL_LM") if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a name that is on its way out; nothing that a user could mend
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set", UserWarning)  # GPT-2's layers beside linear ones
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:  # as of Mamba's out_proj, whose weight is read past its layer
            asked = ", ".join(sorted({matrix.called[0] for matrix in chosen}))
            fix = f"peft refuses some of [{asked}]: {str(error).strip()}"
            raise RecipeError("adapter.targets", str(adapter.targets), fix) from error
    wrong = {(id(matrix.module), matrix.key) for matrix in chosen} ^ _adapted(adapted)
    if wrong:
        names = [m.name for m in matrices(adapted) if (id(m.module), m.key) in wrong]
        fix = f"peft adapts {len(wrong)} weights more or fewer than these: {names[:3]}; name other layers"
        raise RecipeError("adapter.targets", str(adapter.targets), fix)
    for name, parameter in adapted.named_parameters():
        if _cancels_out(name, parameter, task):
            parameter.requires_grad = False
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # float32 master weights also over a bfloat16 base
    return adapted


def _cancels_out(name: str, parameter: Tensor, task: Task) -> bool:
    """Whether a bias is added to everything alike that the task's loss compares, so that nothing ever moves it: to all
    tokens before a softmax over them, to the scores of both answers.
    """
    if task == "reward":
        return name.endswith("bias") and parameter.numel() == 1
    return task == "question-answering" and name.endswith(
        ("qa_outputs.bias", "qa_outputs.modules_to_save.default.bias")
    )


def _heads(model: nn.Module, task: Task) -> list[str]:
    """Names of the modules that are trained as a whole: they may have been drawn anew, and a low-rank update of
    something random would leave most of it so.

    fill-mask: what stands between the encoder and the output embeddings, which are the input's and stay as they are: a
    copy of them would be trained apart and lost in the merge.
    """
    if task != "fill-mask":
        # By the end of the name, as peft does: DistilBERT's pre_classifier is drawn anew too.
        return [name for name, _ in model.named_children() if name.endswith(HEADS)]
    encoder = model.base_model_prefix
    output, tied = model.get_output_embeddings(), model.get_input_embeddings().weight  # type: ignore[operator]
    return [
        name
        for name, module in model.named_modules()
        if name.split(".")[0] not in ("", encoder)
        and module is not output
        and getattr(module, "weight", None) is not tied
        and not list(module.children())
        and list(module.parameters())
    ]


def _targets(model: nn.Module, adapter: Adapter, whole: list[str]) -> list[Matrix]:
    """The weights to adapt: all linear layers and fused experts but the output head, or what the recipe names."""
    found = [matrix for matrix in matrices(model, whole) if matrix.kind != "other"]
    if adapter.targets == "all-linear":
        chosen = [matrix for matrix in found if matrix.kind in ("linear", "experts")]
        if not chosen:
            raise RecipeError("adapter.targets", "all-linear", "this model has no linear layer; use adapter.kind=none")
        return chosen
    names = {name for matrix in found for name in matrix.called}
    for target in adapter.targets:
        if target not in names:
            raise RecipeError(
                "adapter.targets", target, f"no linear layer of this model is called that; {nearest(target, names)}"
            )
    return [matrix for matrix in found if set(matrix.called) & set(adapter.targets)]


def _untie(model: nn.Module, chosen: list[Matrix]) -> None:
    """Give the output head a weight of its own, where an adapter on it or on the embedding would change both at merge.

    The configuration says so, and with it every folder that is saved. Raises RecipeError where more is tied than these.
    """
    model_: Any = model
    ends = [matrix for matrix in chosen if matrix.kind in ("head", "embedding")]
    if not ends or getattr(model_, "config", None) is None:
        return
    weights = {id(getattr(matrix.module, matrix.key)) for matrix in ends}
    places = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in weights]
    tied, keys = tied_head(model), getattr(model_, "all_tied_weights_keys", {})
    if len(places) > 2 or (tied and len(keys) != 1):
        raise RecipeError(
            "adapter.targets",
            ends[0].called[0],
            f"{type(model).__name__} ties this weight to others ({', '.join(sorted({*places, *keys}))}), and a merged "
            "adapter would change all of them; leave it out",
        )
    if tied:
        head = model_.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model_.all_tied_weights_keys = {}
    if not model_.config.is_encoder_decoder:  # also where a folder has two weights and calls them tied
        for config in {id(c): c for c in (model_.config, model_.config.get_text_config())}.values():
            config.tie_word_embeddings = False


def tied_head(model: nn.Module) -> bool:
    """Whether the output head's weight is the embedding's, with or without adapters on them."""
    ends = [getattr(m.module, m.key) for m in matrices(model) if m.kind in ("head", "embedding")]
    return len(ends) == 2 and ends[0] is ends[1]


def _check_fused(chosen: list[Matrix], as_tensors: list[Matrix], adapter: Adapter) -> None:
    """Raise RecipeError for what peft has no way to do with a weight that is adapted as a tensor."""
    if not as_tensors:
        return
    first, others = as_tensors[0], sorted({m.called[0] for m in chosen} - {m.called[0] for m in as_tensors})
    without = f"leave {', '.join(sorted({m.called[0] for m in as_tensors}))} out: [{', '.join(others)}]"
    if isinstance(first.module, QuantizedLinear):
        fix = f"peft adapts this layer of a mixture of experts in full size only; {without}, or quantization.kind=none"
        raise RecipeError("adapter.targets", first.name, fix)
    if adapter.dropout:
        fix = f"the update is added to {first.name} before the product, where no input is to be dropped; use 0, or "
        raise RecipeError("adapter.dropout", adapter.dropout, fix + without)
    if adapter.dora:
        fix = f"peft takes no norms of weights that are adapted as tensors, such as {first.name}; use false, or "
        raise RecipeError("adapter.dora", True, fix + without)


def _rewritten(model: nn.Module, name: str) -> bool:
    """Whether peft takes this name of a layer for that of an expert of transformers 4, and would leave the layer out.

    peft 0.21 does so with dense layers beside fused experts (huggingface/peft#3711).
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # gate_proj without up_proj
        return True
    return set(config.target_modules or ()) != {name}


def _module_names(model: nn.Module, chosen: list[Matrix]) -> list[str]:
    """Last names of the layers, whole ones where something else has the same last name."""
    taken = {matrix.owner for matrix in chosen}
    last = {name.rpartition(".")[2] for name in taken}
    shared = {n.rpartition(".")[2] for n, m in model.named_modules() if n not in taken and list(m.parameters())} & last
    return sorted({name if name.rpartition(".")[2] in shared else name.rpartition(".")[2] for name in taken})


def _adapted(model: nn.Module) -> set[tuple[int, str]]:
    """(id of the module, name of its weight) of everything under an adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return {(id(layer.get_base_layer()), getattr(layer, "parameter_name", "weight")) for layer in layers}


class Coverage(NamedTuple):
    """What an adapter reaches. `covered` of `total` matrices, `share` of their weights; embeddings and the output head
    count only where they have an adapter. `left_out`: names of linear layers and experts without one, `unmatched`:
    targets of the recipe that name nothing here.
    """

    covered: int
    total: int
    share: float
    left_out: list[str]
    unmatched: list[str]


def coverage(model: nn.Module, adapter: Adapter) -> Coverage:
    """What the adapter attached to `model` covers of what `adapter.targets` asks for. Nothing is computed."""
    adapted, found = _adapted(model), matrices(model)
    reached = [matrix for matrix in found if (id(matrix.module), matrix.key) in adapted]
    counted = [matrix for matrix in found if matrix.kind not in ("head", "embedding") or matrix in reached]
    names = {name for matrix in reached for name in matrix.called}
    targets = [] if isinstance(adapter.targets, str) else adapter.targets
    total = sum(matrix.size for matrix in counted)
    return Coverage(
        len(reached),
        len(counted),
        sum(matrix.size for matrix in reached) / total if total else 0.0,
        [matrix.name.removesuffix(".weight") for matrix in counted if matrix not in reached],
        [target for target in targets if target not in names],
    )


def trainable_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of everything that training changes, in a stable order."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def dead_tensors(model: nn.Module, initial: dict[str, Tensor]) -> list[str]:
    """Names of trainable tensors that are empty, not finite, or equal to what they were in `initial`."""
    return [
        name
        for name, p in trainable_tensors(model)
        if p.numel() == 0 or not bool(p.isfinite().all()) or torch.equal(p.detach().cpu(), initial[name])
    ]


def save_adapter(model: PeftModel, folder: Path, base_name: str) -> None:
    """Write peft's own layout (adapter_config.json, adapter_model.safetensors) and read it back.

    `base_name` is what the configuration calls the base: a name that means the same on another machine, not a path of
    this one.
    Raises IngotError when the file holds an empty tensor or fewer tensors than were trained.
    """
    model.save_pretrained(
        folder, save_embedding_layers=False
    )  # "auto" would ask the hub for the base's vocabulary size
    make_readable(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card template holds only blanks
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    # peft keeps names in sets, whose order is another in each process
    names = {key: sorted(config[key]) for key in ("target_modules", "target_parameters") if config.get(key)}
    config |= names | {"base_model_name_or_path": base_name}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    trained = sum(1 for _ in trainable_tensors(model))
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or len(shapes) < trained:
        raise IngotError(
            f"the saved adapter holds {len(shapes)} tensors for {trained} trained ones, "
            f"{len(empty)} of them empty: {empty[:3]}"
        )


@torch.no_grad()
def read_adapter(model: PeftModel, folder: Path) -> int:
    """Put what `save_adapter` wrote to `folder` into `model`, which has an adapter of the same recipe; return how many
    tensors these are. Raises IngotError when names or shapes are others.
    """
    saved = load_file(folder / "adapter_model.safetensors")
    places = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(saved.keys() ^ places.keys()) or [n for n, t in saved.items() if t.shape != places[n].shape]
    if wrong:
        raise IngotError(f"the adapter in {folder} is one of another model: {wrong[:3]}")
    for name, tensor in saved.items():
        places[name].copy_(tensor)
    return len(saved)


@torch.no_grad()
def carry(folder: Path, names: Sequence[str], trained: Callable[[], nn.Module]) -> list[str]:
    """Add the weights called `names` to the adapter in `folder`, whole: peft loads every tensor whose name the model
    knows. `trained`: reads the merged model, which has a tied tensor by all of its names, as no file does.

    Of a layer that the adapter updates, this is what lies under the update: the sum less the update. Where that cannot
    be told (DoRA scales what lies under it, too), return the names of such weights and write nothing.
    """
    if not names:
        return []
    saved, model = load_file(folder / TENSORS_FILE), trained()
    whole = dict(model.state_dict())
    layers = {name.partition(".lora_")[0] for name in saved if ".lora_" in name}
    updated = {layer.removesuffix(UNDER).removeprefix(PREFIX) for layer in layers}
    below = [name for name in names if name.rpartition(".")[0] in updated]
    if below:
        peft: Any = PeftModel.from_pretrained(model, folder)  # type: ignore[arg-type]
        (config,) = peft.peft_config.values()
        if config.use_dora or config.target_parameters:
            return below
        for name in below:
            layer, _, kind = name.rpartition(".")
            if kind == "weight":
                whole[name] = whole[name] - peft.base_model.model.get_submodule(layer).get_delta_weight("default")
    added = {PREFIX + (_under(name) if name in below else name): whole[name].clone() for name in names}
    save_file(saved | added, folder / TENSORS_FILE, {"format": "pt"})
    return []


def _under(name: str) -> str:
    """What peft calls a weight below an update."""
    layer, _, kind = name.rpartition(".")
    return f"{layer}{UNDER}.{kind}"


def with_saved_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """`model` with the adapter in `folder` (peft's layout, safetensors only) folded into its weights.

    Raises ModelError when there is none, or when it is one of another model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError("target", folder.name, "it holds no adapter_model.safetensors; pickle files are never opened")
    try:
        adapted: Any = PeftModel.from_pretrained(model, folder, is_trainable=False)  # type: ignore[arg-type]
        merged: nn.Module = adapted.merge_and_unload()
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:300]
        raise ModelError("target", folder.name, f"the adapter does not fit its base: {reason}; add --base") from error
    return merged


@torch.no_grad()
def answers(model: nn.Module, probes: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Float32 logits of each of `probes`, which are keyword arguments of forward; without dropout."""
    model.eval()
    return [logits_of(model(**probe)) for probe in probes]


def apart(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """max|after - before| / max|before| of the worst of all probes."""
    pairs = zip(before, after, strict=True)
    return max((((new - old).abs().max() / old.abs().max().clamp_min(1e-6)).item() for old, new in pairs), default=0.0)


def merge(model: PeftModel, probes: Sequence[dict[str, Tensor]]) -> tuple[nn.Module, float]:
    """Fold the adapter into the base weights; return the plain model and how far `apart` its logits are on `probes`.

    Over 0.001 (float32) or 0.05 (bfloat16) raises IngotError, because the merged model would not be the one that was
    trained.
    """
    before = answers(model, probes)
    merged: nn.Module = model.merge_and_unload()
    worst = apart(before, answers(merged, probes))
    dtype = next(merged.parameters()).dtype
    limit = 1e-3 if dtype == torch.float32 else 5e-2
    if not worst <= limit:
        raise IngotError(
            f"the merged model's logits differ from the adapter's by {worst:.2g} of their size "
            f"(at most {limit:g} for {dtype})"
        )
    return merged, worst


def merge_onto(base: PeftModel, folder: Path, probes: Sequence[dict[str, Tensor]], tuned: Sequence[Tensor]) -> float:
    """How far `apart` from `tuned`, the logits of what was trained, are those of the adapter in `folder` merged into
    another base than it was trained over. `base` has an untrained adapter of the same recipe, and is used up.
    """
    read_adapter(base, folder)
    merged: nn.Module = base.merge_and_unload()
    return apart(tuned, answers(merged, probes))
