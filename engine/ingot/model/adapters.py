"""Low-rank adapters: attach, save, merge, and proofs that they are alive. The only file that imports peft."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn

from ingot.errors import IngotError, RecipeError
from ingot.model.load import logits_of
from ingot.recipe import Adapter, Task
from ingot.registry import nearest

HEADS = ("classifier", "score")
PEFT_TASKS = {"text-classification": "SEQ_CLS"}


def attach_adapter(model: nn.Module, adapter: Adapter, task: Task, seed: int) -> nn.Module:
    """Freeze `model` and add low-rank updates in float32; a classifier's head is trained as a whole.

    Raises RecipeError when `adapter.targets` names no linear layer of this model. `kind: none` returns the model with
    every
    weight trainable.
    """
    if adapter.kind == "none":
        return model.requires_grad_(True)
    heads = [name for name, _ in model.named_children() if name in HEADS]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=_targets(model, adapter),
        modules_to_save=heads or None,
        task_type=PEFT_TASKS.get(task, "CAUSAL_LM") if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a name that is on its way out; nothing that a user could mend
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # float32 master weights also over a bfloat16 base
    return adapted


def _targets(model: nn.Module, adapter: Adapter) -> list[str]:
    """Last names of the linear layers to adapt: all but output heads, or those that the recipe names."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name.split(".")[0] not in HEADS
    }
    if adapter.targets == "all-linear":
        _refuse_fused_experts(model, names)
        return sorted(names)
    for target in adapter.targets:
        if target not in names:
            raise RecipeError(
                "adapter.targets", target, f"no linear layer of this model is called that; {nearest(target, names)}"
            )
    return list(adapter.targets)


def _refuse_fused_experts(model: nn.Module, names: set[str]) -> None:
    """transformers 5 keeps the experts of a layer in one tensor each, which are no linear layers: an adapter on "all
    linear layers" would leave out most of the model without a word.
    """
    fused = [(name, p.numel()) for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name]
    if fused:
        share = sum(n for _, n in fused) / sum(p.numel() for p in model.parameters())
        raise RecipeError(
            "adapter.targets",
            "all-linear",
            f"{share:.0%} of this model are experts in fused tensors such as {fused[0][0]}, which no adapter would "
            f"reach; name the layers to adapt: [{', '.join(sorted(names))}]",
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
    (folder / "README.md").unlink(missing_ok=True)  # peft's card template holds only blanks
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": base_name}, indent=2) + "\n", encoding="utf-8"
    )
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
def merge(model: PeftModel, probes: Sequence[dict[str, Tensor]]) -> tuple[nn.Module, float]:
    """Fold the adapter into the base weights; return the plain model and the largest relative difference of logits.

    `probes` are keyword arguments of forward. The difference is max|merged - unmerged| / max|unmerged| over all of
    them; over
    0.001 (float32) or 0.05 (bfloat16) raises IngotError, because the merged model would not be the one that was
    trained.
    """
    model.eval()
    before = [logits_of(model(**probe)) for probe in probes]
    merged = model.merge_and_unload()
    merged.eval()
    worst = 0.0
    for probe, old in zip(probes, before, strict=True):
        new = logits_of(merged(**probe))
        worst = max(worst, ((new - old).abs().max() / old.abs().max().clamp_min(1e-6)).item())
    dtype = next(merged.parameters()).dtype
    limit = 1e-3 if dtype == torch.float32 else 5e-2
    if not worst <= limit:
        raise IngotError(
            f"the merged model's logits differ from the adapter's by {worst:.2g} of their size "
            f"(at most {limit:g} for {dtype})"
        )
    return merged, worst
