"""Loads models of many kinds as ranks that cut them; run by several ranks with torch.distributed's variables set.

    python sharded_models.py FOLDER

Rank 0 leaves FOLDER/found.json: a dict for each case of CASES, and what a rank's memory came to (`memory`).
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

from ingot.assembly import build
from ingot.model.adapters import trainable_tensors
from ingot.model.kinds import logits_of
from ingot.parallel.fsdp import blocks_of
from ingot.parallel.layout import local
from ingot.parallel.sharded import Sharded
from ingot.parallel.strategies import parallelize
from ingot.progress import Progress
from ingot.ranks import Ranks, read_ranks
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
BERT = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"} | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
EPS = 1e-4  # AdamW would make steps of the rounding noise in gradients that are zero, as those of keys' biases are
LORA: dict[str, Any] = {"kind": "lora", "rank": 4}
FULL = {"kind": "none"}
# name: (what writes the folder, changes of the recipe, whether it can be read in parts)
CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "tied lora": (("llama", AutoModelForCausalLM, {"tie_word_embeddings": True}), {"adapter": LORA}, True),
    "tied full": (("llama", AutoModelForCausalLM, {"tie_word_embeddings": True}), {"adapter": FULL}, True),
    "untied full": (("llama", AutoModelForCausalLM, {"tie_word_embeddings": False}), {"adapter": FULL}, True),
    "experts full": (("qwen3_moe", AutoModelForCausalLM, EXPERTS), {"adapter": FULL}, True),
    "experts lora": (
        ("qwen3_moe", AutoModelForCausalLM, EXPERTS),
        {"adapter": {**LORA, "targets": ["q_proj", "v_proj"]}},
        True,
    ),
    # Experts, dense layers that peft adapts as tensors beside them; a head that is untied from the embedding.
    "experts all": (
        ("qwen3_moe", AutoModelForCausalLM, {**EXPERTS, "mlp_only_layers": [0]}),
        {"adapter": LORA},
        True,
    ),
    "tied head": (
        ("llama", AutoModelForCausalLM, {"tie_word_embeddings": True}),
        {"adapter": {**LORA, "targets": ["lm_head", "embed_tokens"]}},
        True,
    ),
    "encoder full": (("bert", AutoModelForMaskedLM, {}), {"adapter": FULL, "task": "text-classification"}, True),
    "encoder lora": (("bert", AutoModelForMaskedLM, {}), {"adapter": LORA, "task": "text-classification"}, True),
    "new head": (("llama", AutoModelForCausalLM, {}), {"adapter": LORA, "task": "text-classification"}, True),
    "trained head": (
        ("llama", AutoModelForSequenceClassification, {"num_labels": 3}),
        {"adapter": LORA, "task": "text-classification"},
        True,
    ),
    # Three rows of it would be two and one on two ranks, as five would be three and two: each looks right on one rank.
    "head of other size": (
        ("llama", AutoModelForSequenceClassification, {"num_labels": 4}),
        {"adapter": FULL, "task": "text-classification"},
        True,
    ),
    "random": (("llama", AutoModelForCausalLM, {}), {"adapter": FULL, "initialization": "random"}, False),
    "dora": (("llama", AutoModelForCausalLM, {}), {"adapter": {**LORA, "dora": True}}, False),
    "copies": (("llama", AutoModelForCausalLM, {}), {"adapter": FULL, "shard_ranks": 1}, True),
}


def recipe_of(folder: Path, changes: dict[str, Any]) -> Recipe:
    size = changes.get("shard_ranks")
    return parse_recipe(
        {
            "name": "models",
            "model": {"source": str(folder), "initialization": changes.get("initialization", "pretrained")},
            "data": {"train": "unused"},
            "objective": {"task": changes.get("task", "language-modeling")},
            "adapter": changes["adapter"],
            "optim": {"lr": 1e-2, "eps": EPS},
            "parallel": {"strategy": "hsdp", "shard_ranks": size} if size else {"strategy": "fsdp"},
        }
    )


def write_folder(folder: Path, kind: str, model_class: Any, changes: dict[str, Any]) -> None:
    shape = {**(BERT if kind == "bert" else SMALL), **changes}
    torch.manual_seed(7)
    model = model_class.from_config(AutoConfig.for_model(kind, **shape))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros, where a mix-up has no effect
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference; infinite for other names, shapes or types."""
    if list(one) != list(other):
        return float("inf")
    worst = 0.0
    for name, tensor in one.items():
        if tensor.shape != other[name].shape or tensor.dtype != other[name].dtype:
            return float("inf")
        worst = max(worst, (tensor - other[name]).abs().max().item() if tensor.numel() else 0.0)
    return worst


class Notes(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def compared(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """Load a model both ways, take one step, and say how far they are apart."""
    labels = ("a", "b", "c") if recipe.objective.task == "text-classification" else ()
    home, device = Path(), torch.device("cpu")
    plain, *_ = build(recipe, home, labels, Ranks(), cut=False)
    notes = Notes()
    model, initial, fill, _ = build(recipe, home, labels, ranks, notes)
    sharded = parallelize(model, ranks, recipe, device, torch.float32, fill)
    weights = farthest(dict(plain.named_parameters()), {n: whole(p) for n, p in model.named_parameters()})
    buffers = farthest(dict(plain.named_buffers()), dict(model.named_buffers()))
    trained = [[n for n, p in each.named_parameters() if p.requires_grad] for each in (plain, model)]
    one = torch.optim.AdamW([p for _, p in trainable_tensors(plain)], lr=1e-2, eps=EPS, weight_decay=0.0)
    ids = torch.arange(3, 27).view(2, 12)
    plain.train(), model.train()
    ran_out(sharded, ids)
    gradients = steps = 0.0
    for _ in range(2):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits_of(plain(**inputs)).square().mean().backward()
        with sharded.microbatch(last=True):
            loss = logits_of(sharded.forward(**inputs)).square().mean() / sharded.layout.loss_parts
            sharded.backward(loss)
        found = [{n: whole(p.grad) for n, p in trainable_tensors(m) if p.grad is not None} for m in (plain, model)]
        gradients = max(gradients, farthest(*found))
        one.step()
        one.zero_grad()
        sharded.step(1e-2, None)
        steps = max(steps, farthest(dict(trainable_tensors(plain)), {n: whole(p) for n, p in trainable_tensors(model)}))
    return {
        "weights": weights,
        "buffers": buffers,
        "gradients": gradients,
        "steps": steps,
        "same trained": trained[0] == trained[1],
        "in parts": fill is not None,
        "initial": len(initial),
        "notes": notes.lines,
        "cut": all(isinstance(p, DTensor) for p in model.parameters()),
        "held": sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters()),
    }


def ran_out(sharded: Sharded, ids: Tensor) -> None:
    """A forward pass that ends in the last block, as out of memory it would; the next must not notice."""

    def raises(*_: Any) -> None:
        raise MemoryError

    handle = blocks_of(sharded.plain)[-1].register_forward_pre_hook(raises)
    try:
        with sharded.microbatch(last=False):
            sharded.forward(input_ids=ids, attention_mask=torch.ones_like(ids))
    except MemoryError:
        sharded.drop()
    handle.remove()


class Peak(threading.Thread):
    """The most anonymous memory of this process while it runs, in bytes: what it does not share with a file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._ended = 0, threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.002)

    def end(self) -> int:
        self._ended.set()
        self.join()
        return self.bytes


def anonymous() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


def memory(folder: Path, ranks: Ranks) -> dict[str, float]:
    """Peaks while a model of bfloat16 files becomes one in float32, as shares of its size, on the worst rank."""
    shape = {**SMALL, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 4096}
    config = AutoConfig.for_model("llama", **shape)
    if ranks.main:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="20MB")
        (folder / "tokenizer.json").write_text("{}")
        del model
    dist.barrier()
    recipe, found = recipe_of(folder, {"adapter": FULL}), {}
    for way in ("parts", "whole"):
        before = anonymous()
        peak = Peak()
        peak.start()
        model, _, fill, _ = build(recipe, folder, (), ranks, cut=way == "parts")
        sharded = parallelize(model, ranks, recipe, torch.device("cpu"), torch.float32, fill)
        size = sum(p.numel() * 4 for p in sharded.plain.parameters())
        worst = torch.tensor((peak.end() - before) / size)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        found[way] = worst.item()
        del model, sharded, fill
    return found | {"mib": size / 2**20}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = read_ranks()
    found: dict[str, Any] = {}
    try:
        found["memory"] = memory(folder / "large", ranks)
        for name, (written, changes, _) in CASES.items():
            path = folder / name.replace(" ", "-")
            if ranks.main:
                write_folder(path, *written)
            dist.barrier()
            found[name] = compared(recipe_of(path, changes), ranks)
    except Exception:
        import traceback

        traceback.print_exc()
        print("in", list(found), flush=True)
        os._exit(1)  # the other ranks wait in a collective: they are killed
    if ranks.main:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
