"""Tiny random models, saved as the complete folders that training leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ANSWER_TOKENS = 12


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
