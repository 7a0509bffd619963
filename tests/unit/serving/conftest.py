"""Tiny random models of every task, saved once, and endpoints over them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
NEW_TOKENS = 12
LABELS = ["bad", "fair", "good"]


def _model(task: str, common: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Model, and what ingot.json says; None: no such file."""
    import transformers as hf

    if task in ("chat-completion", "text-generation"):
        config = hf.LlamaConfig(**common, num_key_value_heads=2)
        return hf.LlamaForCausalLM(config), {"task": task, "max_new_tokens": NEW_TOKENS}
    if task == "summarization":
        t5 = {k: common[k] for k in ("vocab_size", "pad_token_id", "eos_token_id")}
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        return hf.T5ForConditionalGeneration(hf.T5Config(**t5, **sizes)), {"task": task, "max_new_tokens": NEW_TOKENS}
    bert = hf.BertConfig(**common, id2label=dict(enumerate(LABELS)))
    if task == "embeddings":
        return hf.BertModel(bert, add_pooling_layer=False), None
    kinds = {
        "text-classification": hf.BertForSequenceClassification,
        "multi-label-classification": hf.BertForSequenceClassification,
        "token-classification": hf.BertForTokenClassification,
        "question-answering": hf.BertForQuestionAnswering,
        "fill-mask": hf.BertForMaskedLM,
        "reward": hf.BertForSequenceClassification,
    }
    if task in ("reward", "question-answering"):
        bert = hf.BertConfig(**common, num_labels=1 if task == "reward" else 2)
    about = {"task": task, "pooling": "head"} | ({"labels": LABELS} if task.endswith("classification") else {})
    return kinds[task](bert), about


@pytest.fixture(scope="session")
def folder_of(_trained: Callable[[bool], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder_of(task) -> a complete model folder."""
    import torch
    from transformers import PreTrainedTokenizerFast

    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task in made:
            return made[task]
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "[MASK]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_trained(False), **names)
        if task == "chat-completion":
            from tests.conftest import MARKED_TEMPLATE

            tokenizer.chat_template = MARKED_TEMPLATE
        ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        torch.manual_seed(0)
        common = BASE | {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "initializer_range": 0.3} | ends
        model, about = _model(task, common)
        folder = tmp_path_factory.mktemp(task)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if about is not None:
            (folder / "ingot.json").write_text(json.dumps(about), encoding="utf-8")
        made[task] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def client_of(folder_of: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """client_of(task) -> a client of an endpoint over that model, which is called "tiny"."""
    from fastapi.testclient import TestClient

    from ingot.model.runtime import Runtime
    from ingot.serving.app import create_app
    from ingot.serving.deployments import Deployed, Deployments
    from ingot.serving.engines import start_engine

    made: dict[str, Any] = {}

    def make(task: str) -> Any:
        if task not in made:
            deployments = Deployments(Deployed("tiny", start_engine(Runtime.load(folder_of(task)))))
            made[task] = TestClient(create_app(deployments), raise_server_exceptions=False)
            made[task].__enter__()
        return made[task]

    yield make
    for client in made.values():
        client.__exit__(None, None, None)
