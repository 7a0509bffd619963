"""The model card: what Hugging Face's and MLflow's pages show, as a README with a head of YAML."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ingot.packaging.licences import Terms, lookup
from ingot.packaging.notices import in_words
from ingot.packaging.signature import PIPELINE_TAGS

RELATIONS = {"merged": "finetune", "adapter": "adapter", "quantized": "quantized", "gguf": "quantized"}
# Beginning of a metric's name -> the name that Hugging Face's `evaluate` has for it. Others keep their own.
STANDARD = (
    ("f1_", "f1"),
    ("precision_", "precision"),
    ("recall_", "recall"),
    ("AUC_", "roc_auc"),
    ("rouge", "rouge"),
    ("bleu", "bleu"),
    ("chrf", "chrf"),
    ("squad_", "squad"),
    ("entity_", "seqeval"),
    ("brier", "brier_score"),
    ("matthews_correlation", "matthews_correlation"),
)
MOST_FACT = 200


def write_card(
    name: str,
    task: str,
    form: str,
    example: Mapping[str, Any],
    metadata: Mapping[str, Any],
    terms: Terms | None,
    evaluation: Mapping[str, Any] | None,
    notes: str,
) -> str:
    """The whole card. `metadata`: as MLmodel's; `license` of it stands where there are no `terms`. `evaluation`: as
    `evaluation.json` holds it. `notes`: a further part, in Markdown.
    """
    head = _head(name, task, form, metadata, terms, evaluation)
    facts = "".join(
        f"- {key}: {value}\n"
        for key, value in metadata.items()
        if isinstance(value, str | int | float | bool) and len(str(value)) <= MOST_FACT
    )
    stated = terms.licence if terms else metadata.get("license")
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---
# {name}

Task: {task}. Form: {form}. License: {stated or "not stated; the base model's licence applies"}.

{facts}
{_scores(evaluation)}{in_words(terms) if terms else ""}{notes}{_use(form, example, metadata)}"""


def _head(
    name: str,
    task: str,
    form: str,
    metadata: Mapping[str, Any],
    terms: Terms | None,
    evaluation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    stated = terms.licence if terms else metadata.get("license")
    base = str(metadata.get("base_model") or "")
    head: dict[str, Any] = {"license": stated}
    known = lookup(stated)
    if stated is not None and known is None:
        head = {"license": "other", "license_name": stated}
    elif known is not None and known.notice:  # the hub shows custom licences by a link
        head["license_link"] = known.url
    head |= {"base_model": base.removeprefix("hf://") or None, "library_name": "transformers"}
    if base:
        head["base_model_relation"] = RELATIONS[form]
    sets = [part.name.removeprefix("hf://datasets/") for part in terms.parts if part.role == "data"] if terms else []
    head["datasets"] = sets
    head |= {"pipeline_tag": PIPELINE_TAGS.get(task), "tags": ["ingot", "mlflow"]}
    results = list(_results(task, evaluation)) if evaluation else []
    if results:
        head["model-index"] = [{"name": name, "results": results}]
    return {key: value for key, value in head.items() if value}


def _results(task: str, evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A result of the card's `model-index` for each task: of the tuned model, with intervals."""
    confidence = evaluation.get("confidence")
    for title, found in _tasks(evaluation):
        scores = found.get("metrics", {}).get("tuned") or {}
        metrics = []
        for metric, score in scores.items():
            value = score["value"]
            if value is None or not math.isfinite(value):
                continue
            kind = next((standard for begins, standard in STANDARD if metric.startswith(begins)), metric)
            args = {"interval": score["interval"], "confidence": confidence, "rows": score["n"]}
            metrics.append({"type": kind, "name": metric, "value": value, "args": args})
        if metrics:
            yield {
                "task": {"type": PIPELINE_TAGS.get(task, task)},
                "dataset": {"name": title, "type": str(evaluation.get("data", {}).get(title, title)), "split": "test"},
                "metrics": metrics,
            }


def _tasks(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "test rows of the recipe", evaluation
    yield from (evaluation.get("tasks") or {}).items()


def _scores(evaluation: Mapping[str, Any] | None) -> str:
    """A table of scores, as `ingot evaluate` prints it."""
    if not evaluation or not evaluation.get("table"):
        return ""
    columns, rows = evaluation["columns"], evaluation["table"]
    share = evaluation.get("confidence")
    lines = ["## Evaluation", "", f"With {share:.0%} intervals." if share else "With intervals.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(str(row.get(column, "")).replace("|", "\\|") for column in columns) + " |" for row in rows
    ]
    lines += ["", *(f"- {note}" for note in evaluation.get("notes") or ())]
    return "\n".join(lines).rstrip() + "\n\nAll figures: `evaluation.json`.\n\n"


def _use(form: str, example: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    if form == "gguf":
        return """## Use

```sh
llama-cli -m model/model.gguf
```

`manifest.json` holds the SHA-256 of every file, `lineage.json` what the model was made from.
"""
    body = json.dumps({"dataframe_records": [example]}, ensure_ascii=False)
    inside = "`model/` is a complete Hugging Face folder for any other server."
    if form == "adapter":
        base = metadata.get("base_model")
        inside = f"""`model/` is an adapter in peft's layout over {base}. The base is looked for in `INGOT_BASE_MODEL`,
then in a folder `base` in or beside the package, then in the local cache of Hugging Face's hub; its weights must have
the SHA-256 that `model/base.json` names."""
    return f"""## Use

```python
import mlflow
model = mlflow.pyfunc.load_model("PATH/OF/THIS/FOLDER")
print(model.predict({json.dumps([example], ensure_ascii=False)}))
```

`ingot serve FOLDER` answers the OpenAI routes and `/invocations`; so does
`mlflow models serve -m FOLDER --env-manager local` for the latter:

```json
{body}
```

{inside} `azure/` holds the scoring file and the batch driver for Azure ML. `manifest.json` holds the SHA-256 of every
file.
"""
