"""Tasks of lm-evaluation-harness on our engine: its own backend's scores."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ingot.errors import MissingPackage, RecipeError
from ingot.evaluation.harness import run_harness
from ingot.evaluation.subject import Local
from ingot.model.load import load_model, load_tokenizer
from ingot.recipe import Model

ROWS = [
    {"q": f"{a} + {b} =", "wrong": str(a + b + 1), "right": str(a + b), "text": f"There were {a} birds and {b} cats."}
    for a, b in ((1, 2), (3, 4), (5, 2), (2, 2), (6, 1), (9, 4))
]
TASKS = {
    "sums_choice": """
output_type: multiple_choice
doc_to_text: "Sum: {{q}}"
doc_to_choice: ["{{wrong}}", "{{right}}"]
doc_to_target: 1
num_fewshot: 2
fewshot_split: train
fewshot_config: {sampler: first_n}
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "sums_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "sums_written": """
output_type: generate_until
doc_to_text: "Once {{q}} "
doc_to_target: "{{right}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {rows}, test: {rows}}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}metadata: {{version: 1}}\n")
    return tmp_path


@pytest.fixture
def local() -> Local:
    section = Model(source="ingot://nano")
    return Local(load_model(section, Path(), "text-generation"), load_tokenizer(section, Path()))


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_its_own_backend(local: Local, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    ours = run_harness(local, list(TASKS), include=folder)
    peer = huggingface.HFLM(pretrained=local.model, tokenizer=local.tokenizer, batch_size=4)
    manager = TaskManager(include_path=str(folder))
    theirs: Any = evaluator.simple_evaluate(peer, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    for task in TASKS:
        numbers = {name: it for name, it in theirs["results"][task].items() if isinstance(it, int | float)}
        assert ours[task]["metrics"] == pytest.approx(numbers, rel=1e-5)
        assert ours[task]["rows"] == len(ROWS)
    assert ours["sums_text"]["metrics"]["bits_per_byte,none"] > 0


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_has_a_near_name(local: Local, folder: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(RecipeError, match="sums_choice"):
        run_harness(local, ["sums_choise"], include=folder)


def test_without_the_library_its_installation_is_told(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(MissingPackage, match=r"ingot\[harness\]"):
        run_harness(local, ["arc_easy"])
