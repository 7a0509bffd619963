"""What a model folder says of itself: `ingot.json`, or what its configuration implies.

Self-contained (standard library): the MLflow package holds a copy.
"""

import json
import re
from pathlib import Path
from typing import Any

RUNTIME_FILE = "ingot.json"
CLASSIFIER_FILE = "classifier.safetensors"
# What the name of an architecture ends in -> its task.
HEADS = {
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "summarization",
    "ForSequenceClassification": "text-classification",
}
# How sentence-transformers writes the ways of pooling in a folder's 1_Pooling/config.json.
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def describe(folder: Path) -> dict[str, Any]:
    """What `ingot.json` says about a model folder; for a folder without one, what its configuration implies."""
    if (folder / RUNTIME_FILE).is_file():
        return _read(folder / RUNTIME_FILE)
    config, settings = _read(folder / "config.json"), folder / "tokenizer_config.json"
    several = "multi-label-classification" if config.get("problem_type") == "multi_label_classification" else None
    if (folder / CLASSIFIER_FILE).is_file():
        return {"task": several or "text-classification", "pooling": "mean"}
    names = config.get("architectures") or []
    task = next((task for head, task in HEADS.items() if any(name.endswith(head) for name in names)), None)
    if task == "text-classification":
        single = len(config.get("id2label") or (0, 1)) == 1
        return {"task": "reward" if single else several or task, "pooling": "head"}
    if task is not None:
        return {"task": task}
    if names and all(re.search("Model$", name) and not re.search("LM|For", name) for name in names):
        return {"task": "embeddings"} | embedding_facts(folder)
    chat = (folder / "chat_template.jinja").is_file() or (settings.is_file() and "chat_template" in _read(settings))
    return {"task": "chat-completion" if chat else "text-generation"}


def embedding_facts(folder: Path) -> dict[str, Any]:
    """`embedding` (which hidden states make a vector) and `max_tokens`, as far as sentence-transformers wrote them into
    a folder. Raises ValueError for a way of pooling that no runtime here has.
    """
    found: dict[str, Any] = {}
    pooling, sentence = folder / "1_Pooling" / "config.json", folder / "sentence_bert_config.json"
    if pooling.is_file():
        said = _read(pooling)
        ways = [key for key, on in said.items() if key.startswith("pooling_mode_") and on]
        if len(ways) != 1 or ways[0] not in _POOLING:
            raise ValueError(f"{pooling} pools by {', '.join(ways) or 'nothing'}; Ingot has {', '.join(_POOLING)}")
        found["embedding"] = _POOLING[ways[0]]
    if sentence.is_file() and (longest := _read(sentence).get("max_seq_length")):
        found["max_tokens"] = longest
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is no JSON object: {error}") from error
