"""A model's folder without its weights: what reads requests where another engine writes the answers."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ingot.model.folder import describe
from ingot.model.load import described
from ingot.model.runtime import Runtime


def without_weights(folder: Path) -> Runtime:
    """Tokenizer, chat template, limits and ends of a causal model; a pass through it would fail. Raises OSError or
    ValueError for a folder that it cannot read.
    """
    said = described(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(said.config)
    model.generation_config = said.generation_config or model.generation_config
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Runtime(model, tokenizer, describe(folder))
