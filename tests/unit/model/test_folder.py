"""What a folder without `ingot.json` is taken for."""

import json
from pathlib import Path
from typing import Any

import pytest

from ingot.model.folder import CLASSIFIER_FILE, describe


def folder(place: Path, config: dict[str, Any], **files: Any) -> Path:
    for name, content in {"config.json": config, **files}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content))
    return place


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["BertForTokenClassification"]}, "token-classification"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "question-answering"),
        ({"architectures": ["RobertaForMaskedLM"]}, "fill-mask"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "summarization"),
        ({"architectures": ["BertForSequenceClassification"]}, "text-classification"),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, "reward"),
        (
            {"architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"},
            "multi-label-classification",
        ),
        ({"architectures": ["BertModel"]}, "embeddings"),
        ({"architectures": ["GPT2LMHeadModel"]}, "text-generation"),
        ({"architectures": ["LlamaForCausalLM"]}, "text-generation"),
        ({}, "text-generation"),
    ],
)
def test_the_architecture_tells_the_task(tmp_path: Path, config: dict[str, Any], task: str) -> None:
    assert describe(folder(tmp_path, config))["task"] == task


def test_a_file_of_the_classifier_tells_it_too(tmp_path: Path) -> None:
    made = folder(tmp_path, {"architectures": ["BertModel"], "problem_type": "multi_label_classification"})
    (made / CLASSIFIER_FILE).touch()
    assert describe(made) == {"task": "multi-label-classification", "pooling": "mean"}


def test_a_template_makes_it_a_chat(tmp_path: Path) -> None:
    made = folder(
        tmp_path, {"architectures": ["LlamaForCausalLM"]}, **{"tokenizer_config.json": {"chat_template": "x"}}
    )
    assert describe(made) == {"task": "chat-completion"}


def test_ingot_json_has_the_last_word(tmp_path: Path) -> None:
    assert describe(folder(tmp_path, {"architectures": ["BertModel"]}, **{"ingot.json": {"task": "x"}})) == {
        "task": "x"
    }


def test_what_sentence_transformers_wrote_is_read(tmp_path: Path) -> None:
    pooling = {"word_embedding_dimension": 8, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    files = {"1_Pooling/config.json": pooling, "sentence_bert_config.json": {"max_seq_length": 256}}
    made = folder(tmp_path, {"architectures": ["BertModel"]}, **files)
    assert describe(made) == {"task": "embeddings", "embedding": "first", "max_tokens": 256}
    folder(tmp_path, {"architectures": ["BertModel"]}, **{"1_Pooling/config.json": {"pooling_mode_max_tokens": True}})
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        describe(tmp_path)
