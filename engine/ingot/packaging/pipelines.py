"""The `transformers` flavour of MLmodel, for the tasks and forms whose pipeline answers as the package itself does."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingot.packaging.shards import link

# Task -> (pipeline, its class in transformers 5). The other tasks' pipelines were removed there, or read weights only
# that have no place of ours (mean pooling, sigmoid per label, a reward).
PIPELINES = {
    "chat-completion": ("text-generation", "TextGenerationPipeline"),
    "text-generation": ("text-generation", "TextGenerationPipeline"),
    "language-modeling": ("text-generation", "TextGenerationPipeline"),
    "text-classification": ("text-classification", "TextClassificationPipeline"),
    "token-classification": ("token-classification", "TokenClassificationPipeline"),
    "fill-mask": ("fill-mask", "FillMaskPipeline"),
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
)


def add_transformers(package: Path, task: str, form: str) -> dict[str, Any] | None:
    """The flavour's block for the package that is being written in `package`, None where there is none to add.

    mlflow looks for the tokenizer in a folder of its own, so its files are linked there too.
    """
    folder = package / "model"
    if form != "merged" or task not in PIPELINES or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architectures = config.get("architectures") or []
    own_head = any("ForSequenceClassification" in name for name in architectures)
    # Remote code would be run by the flavour's loader.
    if not architectures or "auto_map" in config or "quantization_config" in config:
        return None
    if task == "text-classification" and not own_head:
        return None
    pipeline, instance = PIPELINES[task]
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            link(folder / name, package / "components" / "tokenizer" / name)
    return {
        "task": pipeline,
        "instance_type": instance,
        "pipeline_model_type": architectures[0],
        "model_binary": "model",
        "components": ["tokenizer"],
        "tokenizer_type": "AutoTokenizer",
        "transformers_version": version("transformers"),
    }
