"""Pairs of answers and teachers through the verbs: trained, resumed, exported, measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingot.errors import CheckpointError, DataError, Interrupted, RecipeError, ServeError
from ingot.recipe import Recipe
from ingot.recipe_io import parse_recipe
from ingot.runfolder import Run
from ingot.track import read_metrics
from ingot.verbs import evaluate, finetune, package

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"task": "chat-completion", "method": "dpo", "beta": 0.5},
    "orpo": {"task": "chat-completion", "method": "orpo", "beta": 0.5},
    "reward": {"task": "reward"},
    "distillation": {"task": "chat-completion", "method": "distillation"},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of rows with a question, its answer, and a wrong one."""
    lines = []
    for number in range(60):
        asked = [{"role": "user", "content": f"What is {number % 10} and {number // 10}?"}]
        good, bad = (
            [{"role": "assistant", "content": text}] for text in (f"It is {number % 10}.", f"Thank you {number // 10}!")
        )
        lines.append({"prompt": asked, "chosen": good, "rejected": bad, "messages": asked + good})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def encoder_folder(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer), **shape)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def recipe_for(name: str, model: Path, home: Path, **train: Any) -> Recipe:
    objective = OBJECTIVES[name] | ({"teacher": str(model)} if name == "distillation" else {})
    if name == "distillation":  # else it would begin with its teacher's weights
        train["seed"] = 3
    start = {"initialization": "random"} if name == "distillation" else {}
    return parse_recipe(
        {
            "name": name,
            "model": {"source": str(model), "dtype": "float32", **start},
            "data": {"train": "rows.jsonl", "max_tokens": 64},
            "objective": objective,
            "optim": {"lr": 0.01},
            "train": {"max_steps": 8, "tokens_per_step": 700, "tokens_per_microbatch": 400, "threads": 1, **train},
            "evaluate": {"max_new_tokens": 4},
            "package": {"enabled": False},
            "serve": {"enabled": False},
            "track": {"enabled": False},
            "output": str(home / "runs"),
        }
    )


def losses(run: Run) -> list[float]:
    return [point["metrics"]["train_loss"] for point in read_metrics(run.metrics) if "train_loss" in point["metrics"]]


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("orpo", "reward", "distillation"))]
)
def test_an_objective_goes_all_the_way(name: str, home: Path, model_folder: Path, replayed: Any) -> None:
    run = finetune(recipe_for(name, model_folder, home), home=home)
    assert losses(run)[-1] < losses(run)[0]
    base, tuned, comparison = evaluate(run)
    assert comparison is not None
    if name != "distillation":
        assert tuned.scores["preference_margin"].value > base.scores["preference_margin"].value + 0.1
        assert set(tuned.scores) == {"preference_accuracy", "preference_margin"}
    if name == "dpo":
        assert losses(run)[0] == pytest.approx(0.693147, abs=1e-4)
        assert set(load_file(run.folder / "reference.safetensors")) == {"train", "validation"}
    if name in ("dpo", "orpo"):
        with pytest.raises(ServeError, match=r"--replay = 4: .*likelihoods of two answers"):
            replayed(run.folder)
    else:
        assert replayed(run.folder)[0] == 200
    if name == "reward":
        more = replayed(run.folder, lambda stored: replace(stored, expected={"score": stored.expected["score"] + 0.01}))
        assert (more[0], "4 of 4 rows" in more[1]) == (503, True)


@pytest.mark.slow
def test_an_encoder_scores_by_the_mean_of_its_tokens(home: Path, encoder_folder: Path) -> None:
    run = finetune(recipe_for("reward", encoder_folder, home), home=home)
    assert run.recipe.model.pooling == "mean"
    assert run.recipe.data.batches == "padding-free"
    base, tuned, _ = evaluate(run)
    assert tuned.scores["preference_margin"].value > base.scores["preference_margin"].value + 0.1
    assert (package(run) / "MLmodel").is_file()  # verified: it answers as the run's model does


@pytest.mark.slow
def test_dpo_goes_on_with_the_reference_that_it_began_with(
    home: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingot import stages

    recipe = recipe_for("dpo", model_folder, home, checkpoint_every_steps=2)
    whole = losses(finetune(recipe, home=home))
    fit = stages.fit

    def stopped(*args: Any, on_step: Any, **options: Any) -> Any:
        def stop(info: Any) -> None:
            if info.step == 4:
                raise Interrupted("stop")

        return fit(*args, on_step=(*on_step, stop), **options)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", stopped)
        with pytest.raises(Interrupted):
            finetune(recipe, home=home)
    folder = max((home / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    assert losses(finetune(recipe, home=home, resume=folder))[-4:] == pytest.approx(whole[-4:], abs=1e-6)

    run = finetune(recipe, home=home)
    (run.folder / "reference.safetensors").unlink()
    record = json.loads((run.folder / "run.json").read_text())
    record["stages"] = {}
    (run.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="dpo cannot go on"):
        finetune(recipe, home=home, resume=run.folder)


def test_what_is_wrong_is_said_before_training(home: Path, model_folder: Path) -> None:
    recipe = recipe_for("distillation", model_folder, home)
    section = recipe.objective.model_copy(update={"teacher": "ingot://nano"})
    with pytest.raises(RecipeError, match=r"objective\.teacher.*its tokens are not those of"):
        finetune(recipe.model_copy(update={"objective": section}), home=home)
    recipe = recipe_for("dpo", model_folder, home)
    data = recipe.data.model_copy(update={"streaming": True, "validation_share": 0.0, "test_share": 0.0})
    with pytest.raises(RecipeError, match="streaming"):
        finetune(recipe.model_copy(update={"data": data}), home=home)
    (home / "rows.jsonl").write_text('{"prompt": "a", "chosen": "same", "rejected": "same"}\n')
    with pytest.raises(DataError, match="are the same"):
        finetune(recipe, home=home)
