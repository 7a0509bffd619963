"""Tiny random models, saved as the complete folders that training leaves behind; a recipe of a run of seconds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ANSWER_TOKENS = 12
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {"source": "ingot://nano"},
    "data": {"train": "rows.jsonl", "test": "rows.jsonl", "max_tokens": 64},
    "objective": {"task": "text-generation"},
    "train": {"max_steps": 1, "tokens_per_step": 128, "tokens_per_microbatch": 128},
    "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 4, "bootstrap_samples": 200},
    "check": {"enabled": False},
    "package": {"verify": False},
    "serve": {"enabled": False},
    "track": {"enabled": False},
}


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    """write_recipe(folder, **sections): rows.jsonl with six rows, and recipe.yaml, whose runs are in folder/runs. A
    section's values are added to those of RECIPE.
    """

    def write(folder: Path, **sections: dict[str, Any]) -> Path:
        folder.mkdir(exist_ok=True)
        rows = [{"prompt": f"say {n} or {n + 1}", "completion": str(n)} for n in range(6)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changed = {name: RECIPE[name] | values for name, values in sections.items()}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | changed | {"output": str(folder / "runs")}))
        return folder / "recipe.yaml"

    return write


def _settings(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,  # random weights of this width give answers that depend on the prompt
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture
def tiny_llama(make_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    """tiny_llama(template...) -> (random Llama of two layers, tokenizer); always the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*args: Any, **kwargs: Any) -> Any:
        tokenizer = make_tokenizer(*args, **kwargs)
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**_settings(tokenizer), num_key_value_heads=2)).eval(), tokenizer

    return make


def _save(model: Any, tokenizer: Any, folder: Path, about: dict[str, Any]) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "ingot.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


@pytest.fixture
def chat_folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    return _save(*tiny_llama(), tmp_path / "chat", {"task": "chat-completion", "max_new_tokens": ANSWER_TOKENS})


@pytest.fixture
def text_folder(tiny_llama: Callable[..., Any], tmp_path: Path) -> Path:
    about = {"task": "text-generation", "max_new_tokens": ANSWER_TOKENS}
    return _save(*tiny_llama(None), tmp_path / "text", about)


@pytest.fixture
def head_folder(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Path:
    """A decoder with its own classification head over three labels."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = make_tokenizer(None)
    torch.manual_seed(0)
    config = LlamaConfig(**_settings(tokenizer), num_labels=3)
    about = {"task": "text-classification", "pooling": "head", "labels": ["bad", "fair", "good"]}
    return _save(LlamaForSequenceClassification(config), tokenizer, tmp_path / "head", about)


@pytest.fixture
def mean_folder(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Path:
    """An encoder under the mean-pooling classifier over three labels."""
    import torch
    from transformers import BertConfig, BertModel

    from ingot.model.pooling import MeanPoolClassifier

    tokenizer = make_tokenizer(None)
    torch.manual_seed(0)
    backbone = BertModel(BertConfig(**_settings(tokenizer)), add_pooling_layer=False)
    about = {"task": "text-classification", "pooling": "mean", "labels": ["bad", "fair", "good"]}
    return _save(MeanPoolClassifier(backbone, 3), tokenizer, tmp_path / "mean", about)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model registry's database that MLflow has set up: it takes seconds, and a copy does not."""
    from ingot.packaging.versions import Registry

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Registry(f"sqlite:///{path}").names()
    return path
