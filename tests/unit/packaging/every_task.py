"""A tiny random model of every task, as training exports it, and its package; rows to ask, and the same rows as
evaluation has them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from ingot.data.conversation import Conversation, Document, Message, PromptCompletion, SourceTarget
from ingot.data.labeled import Asked, Labeled, MultiLabeled, Tagged
from ingot.data.preference import Preference
from ingot.model.pooling import MeanPoolClassifier
from ingot.packaging.bundle import package_model

LONGEST = 24
FOX = "The quick brown fox jumps over the lazy dog."
CONTEXT = " ".join([FOX] * 3 + ["Paris is the capital of France."])
TEXTS = ["Hello! How can I help you today?", FOX, "Paris is the capital of France. " * 4]
TAGS = ("B-city", "I-city", "O", "B-person")
Model = Callable[[dict[str, Any]], Any]


class Case(NamedTuple):
    """`model`: of settings that all share. `about`: what training adds to ingot.json. `examples`: evaluation's rows."""

    model: Model
    about: dict[str, Any]
    rows: list[dict[str, Any]]
    examples: list[Any]


def _bert(kind: Any, **more: Any) -> Model:
    return lambda settings: kind(BertConfig(**settings, **more))


def _named(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}


def _t5(settings: dict[str, Any]) -> Any:
    return T5ForConditionalGeneration(
        T5Config(
            **{key: settings[key] for key in ("vocab_size", "pad_token_id", "eos_token_id")},
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )


def _bart(settings: dict[str, Any]) -> Any:
    half = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
            {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()}  # fmt: skip
    return BartForConditionalGeneration(
        BartConfig(
            **{key: settings[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
            **half,
            d_model=32,
            init_std=0.3,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            tie_word_embeddings=False,
        )
    )


def _chat(question: str, answer: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), where=f"f:{answer}")


_BEST, _WORST = _chat("Hello!", "How can I help you?"), _chat("Hello!", "goodbye")
_CHATS = [_BEST, _chat("What is the capital of France?", "Paris")]
_SOURCES = [SourceTarget(text, "dog", f"f:{n}") for n, text in enumerate(TEXTS)]
_TAGGED = [Tagged(tuple(text.split()), ("O",) * len(text.split()), f"f:{n}") for n, text in enumerate(TEXTS)]
_ASKED = [Asked("What?", context, (("fox", 16),), f"f:{n}") for n, context in enumerate((CONTEXT, FOX))]
CASES: dict[str, Case] = {
    "chat-completion": Case(
        lambda s: LlamaForCausalLM(LlamaConfig(**s, num_key_value_heads=2)),
        {},
        [{"messages": [turn.as_dict() for turn in chat.messages[:1]]} for chat in _CHATS],
        _CHATS,
    ),
    "text-generation": Case(
        lambda s: LlamaForCausalLM(LlamaConfig(**s, num_key_value_heads=2)),
        {},
        [{"input_string": text} for text in TEXTS],
        [PromptCompletion(text, "dog", f"f:{n}") for n, text in enumerate(TEXTS)],
    ),
    "summarization": Case(_t5, {}, [{"input_string": text} for text in TEXTS], _SOURCES),
    "translation": Case(_bart, {}, [{"input_string": text} for text in TEXTS], _SOURCES),
    "text-classification": Case(
        lambda s: MeanPoolClassifier(BertModel(BertConfig(**s), add_pooling_layer=False), 3),
        {"labels": ["bad", "fair", "good"]},
        [{"text": text} for text in TEXTS],
        [Labeled(text, "bad", f"f:{n}") for n, text in enumerate(TEXTS)],
    ),
    "multi-label-classification": Case(
        _bert(
            BertForSequenceClassification,
            problem_type="multi_label_classification",
            **_named(("late", "broken", "good")),
        ),
        {"labels": ["late", "broken", "good"]},
        [{"text": text} for text in TEXTS],
        [MultiLabeled(text, ("late",), f"f:{n}") for n, text in enumerate(TEXTS)],
    ),
    "token-classification": Case(
        _bert(BertForTokenClassification, **_named(TAGS)),
        {"labels": list(TAGS)},
        [{"text": row.text} for row in _TAGGED],
        _TAGGED,
    ),
    "question-answering": Case(
        _bert(BertForQuestionAnswering),
        {"overlap_tokens": 4},
        [{"question": row.question, "context": row.context} for row in _ASKED],
        _ASKED,
    ),
    "fill-mask": Case(
        _bert(BertForMaskedLM),
        {},
        [{"text": "The quick <|im_start|> fox"}, {"text": "<|im_start|> is the <|im_start|> of France."}],
        [Document(FOX, "f:0")],
    ),
    "reward": Case(
        lambda s: LlamaForSequenceClassification(LlamaConfig(**s, num_labels=1)),
        {},
        [{"messages": [turn.as_dict() for turn in chat.messages]} for chat in (_BEST, _WORST)],
        [Preference(_BEST, _WORST, "f:0")],
    ),
    "embeddings": Case(_bert(BertModel), {}, [{"text": text} for text in TEXTS], []),
}


def folder_of(task: str, tokenizer: Any, folder: Path) -> Path:
    """The case's model with its tokenizer, whose mask token is `<|im_start|>`, in a folder."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    case = CASES[task]
    case.model(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    about = {"task": task, "max_tokens": LONGEST, "max_new_tokens": 6, "example": case.rows[0], **case.about}
    if task in ("chat-completion", "text-generation"):
        del about["max_tokens"]
    (folder / "ingot.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def packaged(folder: Path, out: Path, **changes: Any) -> Path:
    """A package of `folder`, of a model that writes text where `changes` do not say otherwise."""
    wanted: dict[str, Any] = {
        "name": "tiny",
        "task": "text-generation",
        "example_input": {"input_string": "Hello!"},
        "metadata": {},
        "license": None,
    }
    return package_model(folder, out, **(wanted | changes))
