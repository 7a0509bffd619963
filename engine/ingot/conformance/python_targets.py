"""Targets that load the package in another Python process: pyfunc, a fresh environment, transformers, a batch, Spark,
Ray.
"""

import json
import shutil
from dataclasses import replace

from ingot.model.pooling import CLASSIFIER_FILE
from ingot.packaging.verify import CHILD as CLEAN_PROCESS

from .case import Answers, Case, Record, Unavailable
from .processes import CHILDREN, OURS, ask_child, clean, free_port, ingot, run
from .venvs import environment

WRITES = {"chat-completion": "chat", "text-generation": "text", "language-modeling": "text"}
SPARK = ("pyspark>=3.5",)
RAY = ("ray[serve]>=2.40",)


def pyfunc(case: Case) -> Answers:
    """MLflow in a clean process that may import only the packaged requirements."""
    found: list[Record] = [{} for _ in case.rows]
    for columns in dict.fromkeys(map(tuple, case.rows)):  # a frame has the same columns in every row
        places = [place for place, row in enumerate(case.rows) if tuple(row) == columns]
        asked = [case.rows[place] for place in places]
        answers = ask_child(replace(case, rows=asked), CLEAN_PROCESS, example=None, logits=False)["rows"]
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    yield "rows", found


def pyfunc_environment(case: Case) -> Answers:
    """MLflow in a fresh environment that pip makes of requirements.txt alone."""
    lines = (case.package / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    python = environment("pyfunc", wanted, install=case.install, beside=False)
    yield "rows", ask_child(case, CHILDREN / "pyfunc_child.py", python)


def huggingface(case: Case) -> Answers:
    """The inner folder by plain transformers, in a process without Ingot."""
    if case.base is not None:
        raise Unavailable("the package holds an adapter: a complete folder is in its merged form")
    kind = WRITES.get(case.task)
    if case.task == "text-classification":
        if (case.model / CLASSIFIER_FILE).is_file():
            raise Unavailable(
                "transformers has no class for a classifier over mean-pooled states: only Ingot's runtime"
            )
        kind = "classifier"
    elif case.task in ("summarization", "translation"):
        kind = "sequence-to-sequence"
    if kind is None:
        raise Unavailable(f"what a {case.task} model says of a row is made by Ingot's runtime from its raw outputs")
    about = {"new_tokens": case.about.get("new_tokens", 128), "longest": case.about.get("longest")}
    yield "rows", ask_child(case, CHILDREN / "huggingface_child.py", kind=kind, **about)


def batch(case: Case) -> Answers:
    """`ingot batch` on a file of the rows: JSON lines in, JSON lines out."""
    rows, out = case.scratch / "rows.jsonl", case.scratch / "answers"
    rows.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
    run(case, "batch", ingot("batch", str(case.package), str(rows), str(out), "--json"), clean(case, OURS))
    answers = [
        json.loads(line)
        for part in sorted(out.glob("part-*.jsonl"))
        for line in part.read_text(encoding="utf-8").split("\n")  # splitlines also cuts within JSON's strings
        if line
    ]
    names = list(case.expected[0])
    yield "jsonl", [{name: answer[name] for name in names if name in answer} for answer in answers]


def spark_udf(case: Case) -> Answers:
    """mlflow.pyfunc.spark_udf in local mode."""
    if shutil.which("java") is None:
        raise Unavailable("Spark needs Java: install a JRE (version 17 or later) and put java on PATH")
    python = environment("spark", SPARK, install=case.install)
    yield "rows", ask_child(case, CHILDREN / "spark_child.py", python, outputs=list(case.expected[0]))


def ray_serve(case: Case) -> Answers:
    """One replica of a Ray Serve deployment."""
    python = environment("ray", RAY, install=case.install)
    yield "rows", ask_child(case, CHILDREN / "ray_child.py", python, port=free_port())
