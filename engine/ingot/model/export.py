"""A trained model -> a complete Hugging Face folder that any engine can load: weights, configuration, tokenizer,
template.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ingot.errors import CheckpointError
from ingot.model.generate import context_limit
from ingot.model.modes import make_readable


def export_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, facts: dict[str, Any]
) -> Path:
    """Write `model` (already merged) in `dtype` with its tokenizer and `facts` (ingot.json) to `folder`, in one step.

    An older folder of that name is replaced only when the new one is complete. Raises CheckpointError when the disk
    fails.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.to(dtype)
        # transformers imports deepspeed to save, where it is installed, and that tells stdout about a missing GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        save: Any = model.save_pretrained  # nn.Module knows nothing of it; both of our kinds of model have it
        save(partial)
        save_tokenizer(tokenizer, partial)
        _state_reach(model, partial / "tokenizer_config.json")
        (partial / "ingot.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        make_readable(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the model could not be written to {folder} ({getattr(error, 'strerror', None) or error}); "
            "its checkpoints are untouched: free some disk, then --resume"
        ) from error
    return folder


def _state_reach(model: Any, file: Path) -> None:
    """Let the saved tokenizer's own `truncation=True` cut where the model's positions end."""
    settings, positions = json.loads(file.read_text(encoding="utf-8")), context_limit(model)
    # Rotary positions go on behind that number, and servers reach further where they scale them.
    rotary = getattr(model.config.get_text_config(), "rope_parameters", None)
    if positions is not None and not rotary and positions < settings.get("model_max_length", math.inf):
        settings["model_max_length"] = positions
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer with the chat template that it was trained with."""
    tokenizer.save_pretrained(folder)


def probes(rows: Sequence[Any], device: torch.device, *, decoder: bool = False) -> list[dict[str, Tensor]]:
    """Single rows (`ids` each; of several parts the first) as forward arguments, for comparing a model before and after
    merging. No padding: ids_1T. `decoder`: the second part is what an encoder-decoder's decoder reads.
    """
    texts = [row.ids[: row.parts[0]] if row.parts else row.ids for row in rows]
    found = [
        {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
        }
        for ids in texts
    ]
    if decoder:
        for probe, row in zip(found, rows, strict=True):
            probe["decoder_input_ids"] = torch.tensor([row.ids[row.parts[0] :]], device=device)
    return found
