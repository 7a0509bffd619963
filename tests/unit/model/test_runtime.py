"""What a model folder must hold to be answered with."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from ingot.model.answers import Answering
from ingot.model.pooling import MeanPoolClassifier
from ingot.model.runtime import Runtime

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def config(tokenizer) -> BertConfig:
    return BertConfig(vocab_size=len(tokenizer), id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}, **TINY)


def test_mean_pooled_classifier_is_known_by_its_file_alone(folder, tiny_tokenizer):
    """ingot.json may not say how the states are pooled; a head drawn at random must never answer instead."""
    torch.manual_seed(0)
    model = MeanPoolClassifier(BertModel(config(tiny_tokenizer), add_pooling_layer=False), 2).eval()
    model.save_pretrained(folder)
    (folder / "ingot.json").write_text('{"task": "text-classification", "labels": ["no", "yes"]}')
    ids = tiny_tokenizer("How can I help you?")["input_ids"]
    wanted = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)).softmax(-1)[0].tolist()
    [(_, found)] = Runtime.load(folder).classify(["How can I help you?"])
    assert list(found.values()) == pytest.approx(wanted, abs=1e-6)


def test_classifier_without_its_head_is_refused(folder, tiny_tokenizer):
    BertModel(config(tiny_tokenizer)).save_pretrained(folder)
    (folder / "ingot.json").write_text('{"task": "text-classification", "labels": ["no", "yes"]}')
    with pytest.raises(ValueError, match=r"lacks weights of the classifier \(classifier"):
        Runtime.load(folder)


def test_weights_that_are_cut_short_or_of_another_model_are_refused(folder, tiny_tokenizer):
    BertForSequenceClassification(config(tiny_tokenizer)).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"intermediate_size": 2 * said["intermediate_size"]}))
    with pytest.raises(ValueError, match=r"\(bert\.encoder.*or has them in other shapes than config.json says"):
        Runtime.load(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"the weights cannot be read: .*incomplete"):
        Runtime.load(folder)


def test_classifier_with_its_head_loads(folder, tiny_tokenizer):
    BertForSequenceClassification(config(tiny_tokenizer)).save_pretrained(folder)
    assert Runtime.load(folder).labels == ("no", "yes")


@pytest.mark.parametrize(
    ("positions", "trained", "reach"), [(None, 1280, 1280), (None, 64, 512), (None, None, 512), (256, 1280, 256)]
)
def test_a_model_without_positions_reaches_what_it_was_trained_on(
    positions: int | None, trained: int | None, reach: int
) -> None:
    config = SimpleNamespace(max_position_embeddings=positions)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    tokenizer: Any = SimpleNamespace(model_max_length=512)
    assert Answering("summarization", model, tokenizer, (), {"max_tokens": trained}).limit == reach
