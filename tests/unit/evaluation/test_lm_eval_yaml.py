"""A harness's task file is asked as the harness asks it, byte for byte, and what is not read is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ingot.errors import RecipeError
from ingot.evaluation.definition import Definition, load_definition
from ingot.evaluation.lm_eval_yaml import KEYS
from ingot.evaluation.prompted import DefinedTask

TRAIN = [
    {
        "question": f"What is {n} + {n}?",
        "answer": f"It is\n#### {2 * n}",
        "options": [str(n), str(2 * n), "none"],
        "at": 1,
    }
    for n in range(3, 12)
]
TEST = [
    {"question": "Who wrote it? ", "answer": "Ada\n#### 1", "options": ["Ada", " Bob", "Cé"], "at": 0},
    {"question": "\tWhere {is} it?", "answer": "42", "options": ["here", "there", "nowhere"], "at": 2},
    {"question": "Was ist das?\n", "answer": "[1, 2", "options": ["x", "y\n", "z"], "at": 1},
    *2 * [{"question": "What is 5 + 5?", "answer": "It is\n#### 10", "options": ["5", "10", "none"], "at": 1}],
]
BASE: dict[str, Any] = {
    "task": "sums",
    "dataset_path": "json",
    "training_split": "train",
    "test_split": "test",
    "fewshot_split": "train",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "metadata": {"version": 2.0},
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "options",
    "doc_to_target": "at",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}, {"metric": "acc_norm"}],
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["Question:", "</s>"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 32},
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        }
    ],
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [{"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}, {"function": "take_first"}],
        },
        {
            "name": "flexible-extract",
            "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"},
            ],
        },
    ],
}
ROLLED = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
FIRST = {"fewshot_config": {"sampler": "first_n"}}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    for name, rows in (("train", TRAIN), ("test", TEST)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}

    def written(*parts: dict[str, Any], without: tuple[str, ...] = (), **more: Any) -> Path:
        values = BASE | {"dataset_kwargs": {"data_files": files}}
        for part in (*parts, more):
            values = values | part
        path = tmp_path / "task.yaml"
        kept = {name: value for name, value in values.items() if name not in without}
        path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
        return path

    return written


def asked_by_ingot(path: Path) -> tuple[Definition, list[Any]]:
    made = load_definition(path)
    task = DefinedTask(made, path.parent)
    return made, [item.request for window in task.windows() for item in window]


def asked_by_harness(path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[Any]:
    """The harness's own requests for the same file: arguments of every instance."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    values["dataset_kwargs"] = values["dataset_kwargs"] | {"cache_dir": str(cache)}
    task = ConfigurableTask(config=values)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    task.build_all_requests(rank=0, world_size=1)
    return [instance.arguments for instance in task.instances]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_fewshot": 2, **FIRST},
        {"num_fewshot": 3},  # the harness's own sampler
        {"num_fewshot": 2, "fewshot_split": "test", **FIRST},  # the asked row is left out
        {"num_fewshot": 3, "fewshot_split": "test"},
        {
            "num_fewshot": 1,
            "description": "Choose.\n\n",
            "target_delimiter": "",
            "fewshot_delimiter": "\n---\n",
            **FIRST,
        },
        {"doc_to_text": "question", "doc_to_target": "{{options[at]}}"},
        {"doc_to_text": "", "doc_to_choice": ["yes", "no"], "doc_to_target": 0},
        {"doc_to_choice": "{{options[:2] + [question]}}", "doc_to_target": "{{at - at}}", "num_fewshot": 1, **FIRST},
        {
            "num_fewshot": 2,
            "test_split": None,
            "validation_split": "test",
            "fewshot_split": None,
            "training_split": None,
        },
    ],
)
def test_choices_are_asked_as_the_harness_asks(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: dict[str, Any]
) -> None:
    path = write(CHOICE, more)
    made, requests = asked_by_ingot(path)
    found = [(it.prompt, f"{made.between}{choice}") for it in requests for choice in it.choices]
    assert found == asked_by_harness(path, monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_fewshot": 2, **FIRST},
        {"num_fewshot": 4},
        {"num_fewshot": 2, "description": "{{question}} first. ", "target_delimiter": "\n", **FIRST},
        {"doc_to_text": "{{question|trim}}\n", "num_fewshot": 1, "fewshot_split": "test", **FIRST},
        {"doc_to_text": "{{question | regex_replace('[aeiou]', '_')}}", "doc_to_target": "answer"},
        {"generation_kwargs": None},
        {"generation_kwargs": {"max_gen_toks": 8, "until": "\n"}},
    ],
)
def test_answers_are_asked_for_as_the_harness_asks(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, more: dict[str, Any]
) -> None:
    path = write(WRITTEN, more)
    made, requests = asked_by_ingot(path)
    theirs = asked_by_harness(path, monkeypatch, tmp_path / "cache")
    assert [it.prompt for it in requests] == [prompt for prompt, _ in theirs]
    options = theirs[0][1]
    until = options["until"]
    assert list(made.stop) == ([until] if isinstance(until, str) else until)
    assert made.max_new_tokens == options.get("max_gen_toks", 256)


@pytest.mark.parametrize(
    ("target", "right"), [("{{at}}", 0), ("at", 0), ("{{options[2]}}", 2), ("{{options[at]}}", 1), ("text", 1), (2, 2)]
)
def test_digits_are_read_as_the_harness_reads_them(write: Write, tmp_path: Path, target: Any, right: int) -> None:
    """What a template writes in digits is a place, a column's text never is."""
    row = {"question": "?", "options": ["1", "0", "none"], "at": 0, "text": "0"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    files = {"data_files": {"test": str(tmp_path / "own.jsonl")}}
    _, requests = asked_by_ingot(write(CHOICE, doc_to_target=target, dataset_kwargs=files))
    assert requests[0].answers == (right,)


def test_texts_are_rolled_as_the_harness_rolls(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(ROLLED)
    _, requests = asked_by_ingot(path)
    assert [(it.text,) for it in requests] == asked_by_harness(path, monkeypatch, tmp_path / "cache")


def test_answers_are_scored_as_the_harness_scores(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    texts = ["so #### 1,000. no #### 2", "it is $42.", " 10 ", "#### 10"]
    rows = [{"question": "q", "answer": answer} for answer in ("#### 1000", "42", "10", "It is\n#### 10")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"data_files": {"test": str(tmp_path / "own.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    values = BASE | WRITTEN | {"dataset_kwargs": files, "training_split": None, "fewshot_split": None}
    theirs = ConfigurableTask(config=json.loads(json.dumps(values)))
    theirs.build_all_requests(rank=0, world_size=1)
    for instance, text in zip(theirs.instances, texts, strict=True):
        instance.resps = [text]
    theirs.apply_filters()
    del files["cache_dir"]
    path = write(WRITTEN, dataset_kwargs=files, training_split=None, fewshot_split=None)
    ours = DefinedTask(load_definition(path), path.parent)
    items = [item for window in ours.windows() for item in window]
    compute = ours.compute(items, [{"text": text} for text in texts])
    assert set(compute) == {"exact_match@strict-match", "exact_match@flexible-extract"}
    for name in ("strict-match", "flexible-extract"):
        wanted = [theirs.process_results(it.doc, [it.filtered_resps[name]])["exact_match"] for it in theirs.instances]
        statistic = compute[f"exact_match@{name}"]()
        assert statistic.per_row() == wanted
        assert 0.0 < statistic.value() < 1.0
    plain = load_definition(write(WRITTEN, filter_list=None, metric_list=None, dataset_kwargs=files, num_fewshot=0))
    ours = DefinedTask(plain, tmp_path)
    items = [item for window in ours.windows() for item in window]
    assert ours.compute(items, [{"text": " 42 "}] * 4)["exact_match"]().value() == 0.0  # blanks count there


@pytest.mark.parametrize(
    ("more", "field", "said"),
    [
        ({"process_docs": "x"}, "process_docs", "ingot evaluate --harness sums"),
        ({"gen_prefix": "So"}, "gen_prefix", "is not read"),
        ({"output_type": "loglikelihood"}, "output_type", "multiple_choice"),
        ({"repeats": 4}, "repeats", "greedy"),
        ({"generation_kwargs": {"do_sample": True}}, "generation_kwargs.do_sample", "write false"),
        ({"generation_kwargs": {"temperature": 0.7}}, "generation_kwargs.temperature", "write 0"),
        ({"generation_kwargs": {"penalty": 2}}, "generation_kwargs.penalty", "is not read"),
        ({"fewshot_config": {"sampler": "balanced"}, "num_fewshot": 1}, "fewshot_config.sampler", "first_n"),
        ({"fewshot_config": {"samples": []}, "num_fewshot": 1}, "fewshot_config.samples", "is not read"),
        ({"filter_list": [{"name": "a", "filter": [{"function": "map"}]}]}, "filter_list[0]", "remove_whitespace"),
        ({"metric_list": [{"metric": "exact_match", "aggregation": "median"}]}, "metric_list[0]", "mean only"),
        ({"metric_list": [{"metric": "exact_match", "higher_is_better": False}]}, "metric_list[0]", "is True"),
        ({"metric_list": [{"metric": "acc"}]}, "metric_list[0]", "there are exact_match, bleu, chrf, ter"),
        ({"metric_list": [{"metric": "bleu", "ignore_case": True}]}, "metric_list[0]", "no option of bleu"),
        ({"doc_to_text": 3}, "doc_to_text", "a column or a template"),
        ({"test_split": None, "validation_split": None}, "test_split", "is missing"),
        ({"test_split": "dev"}, "dataset_kwargs.data_files", "no split 'dev'; it has train, test"),
        ({"dataset_kwargs": {"revision": "x"}}, "dataset_kwargs.revision", "leave it out"),
        ({"dataset_path": "org/set"}, "dataset_kwargs", "with dataset_path json"),
        ({"task": ["a", "b"]}, "task", "group"),
        ({"metric_list": "acc"}, "metric_list", "must be a list"),
        ({"filter_list": {"name": "x"}}, "filter_list", "must be a list"),
        ({"generation_kwargs": {"temperature": "hot"}}, "generation_kwargs.temperature", "write 0"),
        ({"generation_kwargs": 3}, "generation_kwargs", "must be a mapping"),
        ({"dataset_kwargs": {"data_files": {"test": 5}}}, "dataset_kwargs.data_files", "one file a split"),
        ({"dataset_path": None}, "dataset_path", "where the rows are"),
    ],
)
def test_what_is_not_read_is_refused_by_name(write: Write, more: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_definition(write(WRITTEN, more))
    assert caught.value.field == field
    assert said in str(caught.value)
    assert "task.yaml" in str(caught.value)
    assert "--harness" in str(caught.value)


def test_a_function_is_refused_with_its_line(write: Write) -> None:
    path = write(WRITTEN)
    path.write_text(path.read_text(encoding="utf-8") + "process_results: !function utils.score\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"task\.yaml:\d+: .*!function utils\.score.*ingot evaluate --harness"):
        load_definition(path)


def test_included_files_lie_below(write: Write, tmp_path: Path) -> None:
    write(WRITTEN, num_fewshot=1).rename(tmp_path / "base.yaml")
    (tmp_path / "top.yaml").write_text("include: base.yaml\ntask: above\nnum_fewshot: 2\n", encoding="utf-8")
    made = load_definition(tmp_path / "top.yaml")
    assert (made.task, made.kind) == ("above", "text-generation")
    assert made.fewshot is not None and made.fewshot.count == 2
    (tmp_path / "base.yaml").write_text("include: top.yaml\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="include each other"):
        load_definition(tmp_path / "top.yaml")


def test_rows_are_found_where_the_harness_finds_them(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "far.jsonl").write_text(json.dumps(TEST[0]) + "\n", encoding="utf-8")
    (tmp_path / "here" / "test.json").write_text(json.dumps(TEST), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    path = write(WRITTEN, dataset_kwargs={"data_files": {"test": "far.jsonl"}})
    made, requests = asked_by_ingot(path)
    assert len(requests) == 1
    assert made.notes == ("far.jsonl is read from the working directory",)
    made, requests = asked_by_ingot(write(WRITTEN, dataset_path="here", without=("dataset_kwargs",)))
    assert (made.data.format, len(requests)) == ("json", len(TEST))
    with pytest.raises(RecipeError, match=r"one file called 'dev'.*it holds far\.jsonl, test\.json"):
        load_definition(write(WRITTEN, dataset_path="here", test_split="dev", without=("dataset_kwargs",)))


def test_what_is_passed_over_is_noted(write: Write) -> None:
    made = load_definition(write(WRITTEN, should_decontaminate=True, doc_to_decontamination_query="question"))
    assert any("should_decontaminate" in note for note in made.notes)
    hub = {"dataset_path": "org/set", "dataset_kwargs": {"trust_remote_code": True}}
    made = load_definition(write(CHOICE, hub, metric_list=[{"metric": "acc", "ignore_case": True}]))
    assert [note.split()[0] for note in made.notes] == ["trust_remote_code", "ignore_case"]
    made = load_definition(write(WRITTEN))
    assert made.version == 2.0


def test_a_hub_s_data_set_becomes_a_source(write: Write) -> None:
    path = write(WRITTEN, dataset_path="openai/gsm8k", dataset_name="main", without=("dataset_kwargs",), num_fewshot=5)
    made = load_definition(path)
    assert (made.data.uri, made.data.config, made.data.split) == ("hf://datasets/openai/gsm8k", "main", "test")
    assert made.fewshot is not None and made.fewshot.data is not None
    assert made.fewshot.data.split == "train"


def test_the_page_lists_every_key(repo_root: Path) -> None:
    page = (repo_root / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {', '.join(f'`{f}`' for f in key.gives.split(', ') if f)} | {key.read} |"
            for name, key in KEYS.items()]  # fmt: skip
    assert [row for row in rows if row not in page.splitlines()] == []
