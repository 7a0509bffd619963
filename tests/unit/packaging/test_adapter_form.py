"""Adapters of tasks that train a head: their packages carry it, and say so where something else is missing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import CASES, CONTEXT, FOX, folder_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ingot.errors import ModelError, RecipeError
from ingot.model.adapted import PREFIX, TENSORS_FILE
from ingot.model.adapters import attach_adapter, merge, save_adapter
from ingot.model.export import export_model
from ingot.model.kinds import logits_of
from ingot.model.load import load_model, load_tokenizer
from ingot.model.probing import probe
from ingot.model.runtime import Runtime
from ingot.packages import write_package
from ingot.packaging.portability import refusals
from ingot.preparation import QUIET
from ingot.recipe_io import parse_recipe
from ingot.runfolder import Run, create_run
from ingot.subjects import open_target

NO_POLICY = {"status": "no policy", "sentence": ""}
_ASKED = [{"role": "user", "content": "Hello!"}]
# Task -> rows of a file, with as many classes as the case has.
ROWS: dict[str, list[dict[str, Any]]] = {
    "text-classification": [{"text": text, "label": label} for text, label in
                            zip((FOX, "Paris", "Hello!"), ("bad", "fair", "good"), strict=True)],
    "multi-label-classification": [{"text": FOX, "labels": ["late", "broken"]}, {"text": "Paris", "labels": ["good"]}],
    "token-classification": [{"tokens": ["Paris", "and  Rome", "help"], "tags": ["B-city", "I-city", "O"]},
                             {"tokens": ["Maria"], "tags": ["B-person"]}],
    "question-answering": [{"question": "What?", "context": CONTEXT,
                            "answers": {"text": ["quick"], "answer_start": [4]}}],
    "fill-mask": [{"text": FOX}],
    "reward": [{"chosen": [*_ASKED, {"role": "assistant", "content": "How can I help you?"}],
                "rejected": [*_ASKED, {"role": "assistant", "content": "goodbye"}]}],
}  # fmt: skip
HEADS = tuple(ROWS)
# Task -> the case whose model lies under it, which has another head, or none.
BASES = {
    "chat-completion": "chat-completion",
    "summarization": "summarization",
    "text-classification": "fill-mask",
    "multi-label-classification": "fill-mask",
    "token-classification": "question-answering",
    "question-answering": "token-classification",
    "fill-mask": "fill-mask",
    "reward": "text-generation",
    "text-generation": "text-generation",
}
MISSING = {  # case: (how the run is made, names of what its base lacks and nothing trains)
    "bias": (
        {"task": "fill-mask", "over": "token-classification", "drawn": ("cls.predictions.bias",)},
        {"cls.predictions.bias", "cls.predictions.decoder.bias"},
    ),
    "pooler": (
        {
            "task": "text-classification",
            "pooling": "head",
            "drawn": ("bert.pooler.dense.bias",),
            "adapter": {"targets": ["query"]},
        },
        {"bert.pooler.dense.weight", "bert.pooler.dense.bias"},
    ),
    "below an update": (
        {"task": "text-classification", "pooling": "head", "drawn": ("bert.pooler.dense.base_layer.bias",)},
        {"bert.pooler.dense.base_layer.weight", "bert.pooler.dense.base_layer.bias"},
    ),
    "head that was tied": (
        {"task": "text-generation", "tied": True, "adapter": {"targets": ["q_proj", "lm_head"]}},
        {"lm_head.base_layer.weight"},
    ),
}


@pytest.fixture
def tuned(make_tokenizer: Callable[..., Any], tmp_path: Path) -> Callable[..., Run]:
    """tuned(task, **model) -> a run over the base of `task` whose adapter and head are drawn. `over`: the case of
    another base; `drawn`: weights that it lacks, and that are not trained; `tied`: its output head is its embedding;
    `adapter`: more of the recipe's section.
    """

    def make(
        task: str, over: str = "", drawn: tuple[str, ...] = (), tied: bool = False,
        adapter: dict[str, Any] | None = None, **model_section: Any,
    ) -> Run:  # fmt: skip
        base = folder_of(over or BASES[task], make_tokenizer(mask_token="<|im_start|>"), tmp_path / "base")
        if tied:
            config = AutoConfig.from_pretrained(base, tie_word_embeddings=True)
            AutoModelForCausalLM.from_config(config).save_pretrained(base)
        (base / "ingot.json").unlink()
        rows = ROWS.get(task, [{}])
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = parse_recipe({
            "name": "tiny",
            "output": str(tmp_path / "runs"),
            "model": {"source": "base", "dtype": "float32", **model_section},
            "data": {"train": "rows.jsonl", "test": "rows.jsonl", "validation_share": 0, "max_tokens": 24},
            "objective": {"task": task},
            "adapter": {"rank": 8, "targets": "all-linear", **(adapter or {})},
            "package": {"verify": False, "forms": ["merged", "adapter"]},
        })  # fmt: skip
        case, run = CASES[task], create_run(recipe, tmp_path)
        labels = tuple(case.about.get("labels", ()))
        model: Any = attach_adapter(load_model(recipe.model, tmp_path, recipe.objective.task, labels),
                                    recipe.adapter, recipe.objective.task, 0)  # fmt: skip
        torch.manual_seed(1)
        assert set(drawn) <= dict(model.get_base_model().named_parameters()).keys()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name.removeprefix("base_model.model.") in drawn:
                parameter.data.normal_(0, 0.3)
        save_adapter(model, run.adapter, recipe.model.source)
        about = {"task": task, "max_tokens": 24, "max_new_tokens": 6, "example": case.rows[0], **case.about}
        export_model(merge(model, [])[0], load_tokenizer(recipe.model, tmp_path), run.model, torch.float32, about)
        return run

    return make


def _same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list | dict):
        for key in wanted if isinstance(wanted, dict) else range(len(wanted)):
            _same(found[key], wanted[key])
    else:
        assert found == (pytest.approx(wanted, rel=1e-4, abs=1e-5) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize("task", BASES)
def test_an_adapter_s_package_answers_as_the_merged_model(
    task: str, tuned: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = tuned(task), CASES[task].rows
    write_package(run, NO_POLICY, "", QUIET)
    monkeypatch.setenv("INGOT_BASE_MODEL", str(tmp_path / "base"))
    import mlflow.pyfunc  # after packaging, which silences what this import warns of

    wanted = Runtime.load(run.model).answer(rows)
    package = run.form("adapter")
    for folder in (run.model, run.adapter, run.package, package):  # weights are read by whoever reads the rest
        assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1, folder
    _same(Runtime.load(package / "model").answer(rows), wanted)
    columns = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    _same(mlflow.pyfunc.load_model(str(package)).predict(columns).to_dict("records"), wanted)
    assert not list((package / "model").glob("model*.safetensors"))
    for found, expected in zip(*(probe(Runtime.load(it), rows) for it in (package / "model", run.model)), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    config = json.loads((package / "model" / "adapter_config.json").read_text())
    assert any("trained as a whole" in it.why for it in refusals(config)) is (task in HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("task", HEADS)
def test_it_is_proved_in_a_clean_process(task: str, tuned: Callable[..., Run]) -> None:
    run = tuned(task)
    proved = run.recipe.model_copy(update={"package": run.recipe.package.model_copy(update={"verify": True})})
    write_package(Run(run.folder, proved, run.home), NO_POLICY, "", QUIET, ["adapter"])
    found = run.record()["stages"]["package"]["forms"]["adapter"]
    assert 0 <= found["difference"] <= found["tolerance"] == 1e-3


@pytest.mark.parametrize(
    "made",
    [*({"task": task} for task in ("token-classification", "question-answering", "reward")), MISSING["bias"][0]],
    ids=lambda made: made["task"],
)
def test_evaluation_measures_what_the_package_answers(
    made: dict[str, Any], tuned: Callable[..., Run], tmp_path: Path
) -> None:
    run, task = tuned(**made), made["task"]
    (tmp_path / "base/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    write_package(run, NO_POLICY, "", QUIET, ["adapter"])
    target = open_target(str(run.form("adapter")), base=str(tmp_path / "base"))
    whole = Runtime.load(run.model, "cpu")
    assert target.labels() == tuple(whole.about.get("labels", ()))
    loaded = target.load(task, target.labels(), torch.device("cpu"), 64)
    assert loaded.tokenizer.pad_token == whole.tokenizer.pad_token == "<pad>"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        outputs = [logits_of(it(ids, torch.ones_like(ids))) for it in (loaded.model, whole.model)]
    assert torch.allclose(*outputs, atol=1e-4)
    with pytest.raises(ModelError, match=f"was trained for {task}"):
        target.load("summarization", (), torch.device("cpu"), 64)


@pytest.mark.parametrize("case", MISSING)
def test_what_neither_base_nor_adapter_holds_is_carried_whole(
    case: str, tuned: Callable[..., Run], tmp_path: Path
) -> None:
    made, names = MISSING[case]
    run, rows = tuned(**made), CASES[made["task"]].rows
    write_package(run, NO_POLICY, "", QUIET)
    package = run.form("adapter") / "model"
    saved, trained = load_file(package / TENSORS_FILE), load_file(run.adapter / TENSORS_FILE)
    assert saved.keys() - trained.keys() == {PREFIX + name for name in names}
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())
    merged, base = Runtime.load(run.model, "cpu"), tmp_path / "base"
    whole = merged.model.state_dict()
    for name in names:
        own = name.replace(".base_layer", "")
        assert whole[own].any()
        # What lies under an update is another tensor than the sum.
        assert torch.equal(saved[PREFIX + name], whole[own]) == (own == name or own.endswith("bias"))
    loaded = Runtime.load(package, "cpu", base)
    for found, expected in zip(*(probe(it, rows) for it in (loaded, merged)), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    config = json.loads((package / "adapter_config.json").read_text())
    # As where the base has them.
    assert any("trained as a whole" in it.why or "the output head (lm_head)" in it.why for it in refusals(config))


def test_weights_that_an_adapter_does_not_hold_are_named_before_anything_is_written(tuned: Callable[..., Run]) -> None:
    # The base lacks the pooler, and of a layer that DoRA updates it cannot be told what lies under the update.
    run = tuned("text-classification", pooling="head", adapter={"dora": True})
    with pytest.raises(RecipeError, match=r"package\.forms.*adapter.*pooler.*use merged"):
        write_package(run, NO_POLICY, "", QUIET)
    assert not run.package.exists()
    assert not list(run.folder.glob(".form-*"))
    assert write_package(run, NO_POLICY, "", QUIET, ["merged"]) == run.package
