"""Heads that point things out: read or drawn anew, trained whole over adapters, merged, and asked end to end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    LlamaForQuestionAnswering,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ingot.errors import ModelError, RecipeError
from ingot.model.adapters import attach_adapter, merge, trainable_tensors
from ingot.model.kinds import knows_segments, logits_of
from ingot.model.lines import settle, trial
from ingot.model.load import load_model
from ingot.recipe import Adapter, Model
from ingot.recipe_io import parse_recipe

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODERN = {**SIZES, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
DISTIL = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
IDS = torch.tensor([[3, 5, 7, 9, 11]])
PROBE = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SAVED = ".modules_to_save.default."


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head, whose configuration tells of five classes."""
    torch.manual_seed(0)
    return saved(BertModel(BertConfig(**SIZES, num_labels=5)), tmp_path_factory.mktemp("encoder"))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # has to be there, and is not opened
    return folder


def loaded(folder: Path, task: Any, labels: tuple[str, ...] = ()) -> Any:
    return load_model(Model(source=str(folder)), folder, task, labels)


def test_heads_are_drawn_to_the_task_s_size(encoder: Path) -> None:
    tags = loaded(encoder, "token-classification", ("B-x", "I-x", "O"))
    assert isinstance(tags, BertForTokenClassification)
    assert tags.classifier.weight.shape == (3, 32)
    assert tags.config.id2label == {0: "B-x", 1: "I-x", 2: "O"}
    answers = loaded(encoder, "question-answering")
    assert isinstance(answers, BertForQuestionAnswering)
    assert answers.qa_outputs.weight.shape == (2, 32)
    sets = loaded(encoder, "multi-label-classification", ("a", "b"))
    assert sets.config.problem_type == "multi_label_classification"
    kept = loaded(encoder, "fill-mask")
    assert isinstance(kept, BertForMaskedLM)
    stored = BertModel.from_pretrained(encoder).embeddings.word_embeddings.weight
    assert torch.equal(kept.get_output_embeddings().weight, stored)
    assert torch.equal(loaded(encoder, "question-answering").qa_outputs.weight, answers.qa_outputs.weight)


def test_a_head_of_another_size_is_drawn_anew(tmp_path: Path) -> None:
    saved(BertForSequenceClassification(BertConfig(**SIZES, num_labels=5)), tmp_path)
    assert loaded(tmp_path, "token-classification", ("a", "b")).classifier.weight.shape == (2, 32)


def test_a_decoder_fills_no_gaps(model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no model of transformers does fill-mask with a LlamaConfig"):
        loaded(model_folder, "fill-mask")


def test_only_models_with_segments_are_told_of_them() -> None:
    assert knows_segments(BertForQuestionAnswering(BertConfig(**SIZES)))
    assert not knows_segments(BertForQuestionAnswering(BertConfig(**SIZES, type_vocab_size=1)))
    assert not knows_segments(LlamaForQuestionAnswering(LlamaConfig(**SIZES)))


BERT_HEAD = "cls.predictions.transform"
HEADS = [
    (BertForMaskedLM, BertConfig(**SIZES), "fill-mask", {f"{BERT_HEAD}.dense", f"{BERT_HEAD}.LayerNorm"}),
    (RobertaForMaskedLM, RobertaConfig(**SIZES), "fill-mask", {"lm_head.dense", "lm_head.layer_norm"}),
    (DistilBertForMaskedLM, DistilBertConfig(**DISTIL), "fill-mask", {"vocab_transform", "vocab_layer_norm"}),
    (ModernBertForMaskedLM, ModernBertConfig(**MODERN), "fill-mask", {"head.dense", "head.norm"}),
    (BertForTokenClassification, BertConfig(**SIZES), "token-classification", {"classifier"}),
    (BertForQuestionAnswering, BertConfig(**SIZES), "question-answering", {"qa_outputs"}),
    (LlamaForQuestionAnswering, LlamaConfig(**SIZES), "question-answering", {"qa_outputs"}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "config", "task", "heads"), HEADS, ids=[make.__name__ for make, *_ in HEADS])
def test_a_head_is_trained_whole_and_the_tie_outlives_the_merge(
    make: Any, config: Any, task: Any, heads: set[str]
) -> None:
    torch.manual_seed(0)
    model = attach_adapter(make(config), Adapter(rank=4), task, seed=0)
    names = [name for name, _ in trainable_tensors(model)]
    assert {name.removeprefix("base_model.model.").split(SAVED)[0] for name in names if SAVED in name} == heads
    assert all(SAVED in name or "lora_" in name for name in names)
    assert any("lora_" in name for name in names)
    with torch.no_grad():
        for _, parameter in trainable_tensors(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before = logits_of(model.eval()(**PROBE))
    merged, difference = merge(model, [PROBE])
    assert difference < 1e-5
    torch.testing.assert_close(logits_of(merged(**PROBE)), before)
    if task == "fill-mask":
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight  # type: ignore[operator]


def test_every_trained_tensor_of_an_answer_s_head_can_move() -> None:
    """The bias of `qa_outputs` is added to every token alike: its gradient is zero but for rounding."""
    torch.manual_seed(0)
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = attach_adapter(BertForQuestionAnswering(config), Adapter(rank=4), "question-answering", seed=0)
    bias = model.base_model.model.qa_outputs.modules_to_save["default"].bias
    assert not bias.requires_grad
    bias.requires_grad_(True)
    model(**PROBE, start_positions=torch.tensor([1]), end_positions=torch.tensor([2])).loss.backward()
    assert bias.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", [AutoModelForTokenClassification, AutoModelForMaskedLM], ids=["tags", "gaps"])
def test_bert_takes_rows_end_to_end(kind: Any) -> None:
    assert trial(BertConfig(**SIZES), pooled=False, kind=kind)[0] is None
    assert trial(ModernBertConfig(**MODERN), pooled=False, kind=kind)[0] is None


@pytest.mark.parametrize("kind", [AutoModelForTokenClassification, AutoModelForMaskedLM], ids=["tags", "gaps"])
def test_roberta_counts_positions_otherwise_and_is_padded(kind: Any) -> None:
    reason, _ = trial(RobertaConfig(**SIZES), pooled=False, kind=kind)
    assert reason is not None
    assert "other outputs" in reason


def test_answers_are_looked_for_in_padded_rows(encoder: Path) -> None:
    sections: dict[str, Any] = {
        "name": "x",
        "model": {"source": str(encoder)},
        "data": {"train": "unused"},
        "objective": {"task": "question-answering"},
    }
    found = settle(parse_recipe(sections), encoder, torch.device("cpu"), torch.float32)
    assert found.batches == "padded"
    assert "an answer is looked for" in found.notes[0]
    sections["data"]["batches"] = "packed"
    with pytest.raises(RecipeError, match=r"data\.batches = 'packed'.*use padded"):
        settle(parse_recipe(sections), encoder, torch.device("cpu"), torch.float32)
