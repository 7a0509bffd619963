"""Loads models as ranks that share their matrices; run by several ranks with torch.distributed's variables set.

    python tensor_models.py - FOLDER

Rank 0 leaves FOLDER/found.json: what `sharded_models.compared` found, for each case of CASES that has so many ranks.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_models import EXPERTS, FULL, LORA, compared, recipe_of, write_folder
from transformers import AutoModelForCausalLM

from ingot.errors import RecipeError
from ingot.ranks import read_ranks
from ingot.recipe import Parallel

UNEVEN = {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 48}
# name: (ranks, strategy, kind and shape of the model, adapter)
CASES: dict[str, tuple[int, str, str, dict[str, Any], dict[str, Any]]] = {
    "lora": (2, "ddp", "llama", {"tie_word_embeddings": True}, LORA),
    "lora on the head": (2, "ddp", "llama", {"tie_word_embeddings": True}, {**LORA, "targets": ["lm_head", "q_proj"]}),
    "full": (2, "none", "llama", {}, FULL),
    "norms of heads": (2, "ddp", "qwen3", {"head_dim": 8}, FULL),
    "biases": (2, "ddp", "phi", {}, LORA),
    "experts": (2, "ddp", "qwen3_moe", EXPERTS, {**LORA, "targets": ["q_proj", "v_proj"]}),
    "tied to what is whole": (2, "ddp", "gpt_neox", {"tie_word_embeddings": True}, FULL),
    "no plan": (2, "ddp", "gpt2", {}, FULL),
    "three heads": (2, "ddp", "llama", UNEVEN, FULL),
    "rows and lora": (4, "ddp", "llama", {"tie_word_embeddings": True}, LORA),
    "rows and full": (4, "ddp", "qwen3", {"head_dim": 8}, FULL),
    "cut and lora": (4, "fsdp", "llama", {"tie_word_embeddings": True}, LORA),
    "cut and full": (4, "fsdp", "qwen3", {"head_dim": 8}, FULL),
    "cut and experts": (4, "fsdp", "qwen3_moe", EXPERTS, {**LORA, "targets": ["q_proj", "v_proj"]}),
}


def main() -> None:
    out = Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    ranks, found = read_ranks(), {}
    for name, (world, strategy, kind, shape, adapter) in CASES.items():
        if world != ranks.world:
            continue
        if ranks.main:
            write_folder(out / name, kind, AutoModelForCausalLM, shape)
        dist.barrier()
        recipe = recipe_of(out / name, {"adapter": adapter})
        recipe = recipe.model_copy(update={"parallel": Parallel(strategy=strategy, tensor=2)})
        try:
            found[name] = compared(recipe, ranks)
        except RecipeError as error:
            found[name] = {"error": str(error)}
    if ranks.main:
        (out / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
