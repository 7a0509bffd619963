"""One contender of `eval.py` in a process of its own:  python benchmarks/eval_contenders.py SPEC.json-text OUT.json

SPEC: contender (ingot, harness, continuous: Ingot by continuous batching), folder, case, batches (rows of a batch of
the harness, or tokens of one of Ingot), threads; `metrics`: the harness runs as a task by its own evaluator, and both
report metrics. With several batches each is timed once. All read the model in float32 and start from texts.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_contenders import _peak_rss as peak_rss
from eval_work import UNTIL, model_folder

Answers = list[Any]  # log-likelihoods of the choices, or of the text; or what was written

# --- Ingot ---


def ingot(spec: dict[str, Any], case: dict[str, Any]) -> Callable[[list[Any], int], Answers]:
    """(documents, tokens of a batch) -> answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ingot.model.continuations import encode_groups, encode_texts, prefix_id
    from ingot.model.continuous import generate_continuously
    from ingot.model.generate import generate
    from ingot.model.kinds import pad_id
    from ingot.model.score import rolling, score

    folder = model_folder(Path(spec["folder"]), case["model"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def choices(documents: list[Any], tokens: int) -> Answers:
        asked = [(one["context"], [f" {choice}" for choice in one["choices"]]) for one in documents]
        groups = encode_groups(tokenizer, asked)
        found = score(model, groups, pad_id=pad_id(tokenizer), tokens_per_batch=tokens)
        return [[one.logprob for one in row] for row in found]

    def whole(documents: list[Any], tokens: int) -> Answers:
        texts = [one["text"] for one in documents]
        ids = encode_texts(tokenizer, texts)
        rows = [ids[text] for text in texts]
        ends = {"prefix_id": prefix_id(tokenizer), "pad_id": pad_id(tokenizer)}
        return [found for found, _ in rolling(model, rows, tokens_per_batch=tokens, **ends)]

    def written(documents: list[Any], tokens: int) -> Answers:
        longest = model.config.max_position_embeddings - case["new_tokens"]
        texts = [one["prompt"] for one in documents]
        ids = encode_texts(tokenizer, texts)
        write = generate_continuously if spec["contender"] == "continuous" else generate
        found = write(
            model,
            tokenizer,
            [ids[text][-longest:] for text in texts],
            max_new_tokens=case["new_tokens"],
            tokens_per_batch=tokens,
            stop=[*UNTIL, str(tokenizer.eos_token)],
        )
        return [one.text.strip() for one in found]

    return {"choices": choices, "rolling": whole, "generation": written}[case["kind"]]


def metrics_of(case: dict[str, Any], answers: Answers) -> dict[str, float]:
    """By definition, from answers."""
    documents = case["documents"]
    if case["kind"] == "choices":
        right = {"acc": 0, "acc_norm": 0}
        for one, scores in zip(documents, answers, strict=True):
            normed = [found / len(choice) for found, choice in zip(scores, one["choices"], strict=True)]
            right["acc"] += scores.index(max(scores)) == one["gold"]
            right["acc_norm"] += normed.index(max(normed)) == one["gold"]
        return {name: count / len(documents) for name, count in right.items()}
    if case["kind"] == "rolling":
        n_words = sum(len(re.split(r"\s+", one["text"])) for one in documents)
        n_bytes = sum(len(one["text"].encode()) for one in documents)
        per_byte = -sum(answers) / n_bytes
        per_word = math.exp(-sum(answers) / n_words)
        return {
            "word_perplexity": per_word,
            "byte_perplexity": math.exp(per_byte),
            "bits_per_byte": per_byte / math.log(2),
        }
    patterns = {
        "strict-match": (r"#### (\-?[0-9\.\,]+)", 0),
        "flexible-extract": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    }
    found = {}
    for name, (pattern, place) in patterns.items():
        hits = []
        for one, text in zip(documents, answers, strict=True):
            matches = [found for match in re.finditer(pattern, text) for found in match.groups() if found]
            hits.append(_bare(matches[place] if matches else "[invalid]") == _bare(one["target"]))
        found[f"exact_match,{name}"] = sum(hits) / len(hits)
    return found


def _bare(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


# --- lm-evaluation-harness ---


def harness(spec: dict[str, Any], case: dict[str, Any]) -> Callable[[list[Any], int], Answers]:
    """(documents, rows of a batch) -> answers, by its own Hugging Face backend."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(model_folder(Path(spec["folder"]), case["model"]))
    backend = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=spec["batches"][0])

    def asked(kind: str, pairs: list[tuple[Any, ...]]) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]

    def choices(documents: list[Any], rows: int) -> Answers:
        backend.batch_size_per_gpu = rows
        pairs = [(one["context"], f" {choice}") for one in documents for choice in one["choices"]]
        found = iter(backend.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True))
        return [[next(found)[0] for _ in one["choices"]] for one in documents]

    def whole(documents: list[Any], rows: int) -> Answers:
        backend.batch_size_per_gpu = rows
        texts = [(one["text"],) for one in documents]
        return list(backend.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True))

    def written(documents: list[Any], rows: int) -> Answers:
        backend.batch_size_per_gpu = rows
        how = {"until": UNTIL, "max_gen_toks": case["new_tokens"], "do_sample": False}
        requests = asked("generate_until", [(one["prompt"], how) for one in documents])
        return [text.strip() for text in backend.generate_until(requests, disable_tqdm=True)]

    if spec.get("metrics"):
        return lambda _documents, _rows: by_task(backend, spec, case)
    return {"choices": choices, "rolling": whole, "generation": written}[case["kind"]]


def by_task(backend: Any, spec: dict[str, Any], case: dict[str, Any]) -> Answers:
    """Answers and metrics of a task that its evaluator runs."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    path = Path(spec["folder"]) / f"{spec['case']}.jsonl"
    lines = [json.dumps(one) for one in case["documents"]]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    task: dict[str, Any] = {
        "task": spec["case"],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": spec["folder"]},
        "test_split": "test",
        "num_fewshot": 0,
    }
    if case["kind"] == "choices":
        task |= {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "{{gold}}"}
        task |= {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    elif case["kind"] == "rolling":
        names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        task |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
        task |= {"metric_list": [{"metric": name} for name in names]}
    else:
        task |= _exact_match(case["new_tokens"])
    done = simple_evaluate(
        model=backend, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    spec["found"] = {
        name.removesuffix(",none"): value
        for name, value in done["results"][spec["case"]].items()
        if isinstance(value, float) and "stderr" not in name
    }
    samples = {one["doc_id"]: one["resps"] for one in done["samples"][spec["case"]]}
    resps = [samples[place] for place in range(len(case["documents"]))]
    if case["kind"] == "choices":
        return [[float(one[0][0]) for one in row] for row in resps]
    if case["kind"] == "rolling":
        return [float(row[0][0] if isinstance(row[0], list | tuple) else row[0]) for row in resps]
    return [row[0][0].strip() for row in resps]


def _exact_match(new_tokens: int) -> dict[str, Any]:
    """As its GSM8K task asks and scores."""

    def filtered(name: str, **how: Any) -> dict[str, Any]:
        return {"name": name, "filter": [{"function": "regex", **how}, {"function": "take_first"}]}

    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": UNTIL, "do_sample": False, "max_gen_toks": new_tokens},
        "filter_list": [
            filtered("strict-match", regex_pattern=r"#### (\-?[0-9\.\,]+)"),
            filtered("flexible-extract", regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"],
            }
        ],
    }


# --- both ---


def main(words: list[str]) -> None:
    spec, out = json.loads(words[0]), Path(words[1])
    torch.set_num_threads(spec["threads"])
    case = json.loads((Path(spec["folder"]) / f"{spec['case']}.json").read_text(encoding="utf-8"))
    run = {"ingot": ingot, "continuous": ingot, "harness": harness}[spec["contender"]](spec, case)
    documents = case["documents"]
    if not spec.get("metrics"):
        run(documents[:1], spec["batches"][0])  # what is built once, at the first call
    loaded = peak_rss()
    seconds, processor = {}, {}
    answers: Answers = []
    for batch in spec["batches"]:
        started, worked = time.perf_counter(), time.process_time()
        answers = run(documents, batch)
        seconds[batch], processor[batch] = time.perf_counter() - started, time.process_time() - worked
    found = {
        "seconds": seconds,
        "processor": processor,
        "documents": len(documents),
        "answers": answers,
        "loaded_memory": loaded,
    }
    found["peak_memory"] = peak_rss()
    if spec.get("metrics"):
        found["metrics"] = spec["found"] if "found" in spec else metrics_of(case, answers)
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
