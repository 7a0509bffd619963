"""Rows are cut before their answer, or half precision overflows: the loss is 0.0 or NaN, and the run "succeeds"
(trl#6668, #3927; LlamaFactory#4278, QwenLM/Qwen3#670).
"""

import json
import math
from dataclasses import replace

import pytest
import torch

from ingot import finetune
from ingot.data.plan import PlannedFeed
from ingot.data.rows import ListRows
from ingot.errors import DataError, IngotError, NotFinite
from ingot.parallel.strategies import parallelize
from ingot.ranks import Ranks
from ingot.recipe_io import load_recipe, parse_recipe
from ingot.train.checkpoint import Checkpoints
from ingot.train.loop import Rows, fit


def rows_file(folder, words):
    rows = [{"prompt": f"{n} " + "word " * words(n), "completion": f" {n}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_for(folder, model_folder):
    return parse_recipe(
        {
            "name": "cut",
            "output": str(folder / "runs"),
            "model": {"source": str(model_folder)},
            "data": {"train": "rows.jsonl", "max_tokens": 32},
            "objective": {"task": "text-generation"},
            "train": {"max_steps": 3, "tokens_per_step": 64, "tokens_per_microbatch": 32},
            "evaluate": {"enabled": False},
            "track": {"enabled": False},
        }
    )


def test_rows_that_all_lose_their_answer_stop_before_training(model_folder, tmp_path):
    rows_file(tmp_path, lambda n: 60)
    with pytest.raises(DataError, match=r"data\.max_tokens = 32: .*trainable token"):
        finetune(recipe_for(tmp_path, model_folder), home=tmp_path)
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_rows_that_lose_their_answer_are_left_out_and_counted(model_folder, tmp_path):
    rows_file(tmp_path, lambda n: 60 if n % 2 else 2)
    run = finetune(recipe_for(tmp_path, model_folder), home=tmp_path)
    lines = [json.loads(line)["metrics"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(point["train_loss"] > 0 for point in lines)
    facts = run.record()["stages"]["finetune"]
    cut = facts["data"]["truncation"]
    assert cut["dropped"] == cut["truncated"] > 10
    assert facts["rows"] == cut["total"] - cut["dropped"]


def trained(cells, tmp_path, rows, model=None, **train):
    recipe = cells.recipe_of({"train": train})
    model = model or cells.small_model("llama")
    sharded = parallelize(model, Ranks(), recipe, torch.device("cpu"), torch.float32)
    losses = []
    feed = Rows(PlannedFeed(ListRows(rows), recipe.data, recipe.train), ListRows([]), pad_id=0)
    checkpoints = Checkpoints(tmp_path, Ranks(), "hash", 2)
    fit(sharded, feed, recipe, checkpoints, on_step=(lambda info: losses.append(info.loss),))
    return losses


def test_step_without_a_target_is_an_error_wherever_its_rows_come_from(cells, tmp_path):
    rows = [replace(row, trainable=[False] * len(row.ids)) for row in cells.random_rows(60, 1)]
    with pytest.raises(DataError, match=r"data\.train = 'row:\d+': none of the rows of step 1 has a trainable token"):
        trained(cells, tmp_path, rows)


def test_row_without_a_target_beside_others_does_no_harm(cells, tmp_path):
    rows = cells.random_rows(60, 1)
    rows = [replace(row, trainable=[False] * len(row.ids)) if n % 3 else row for n, row in enumerate(rows)]
    losses = trained(cells, tmp_path, rows, tokens_per_step=300)
    assert all(math.isfinite(loss) and loss > 1 for loss in losses)


def test_loss_that_is_not_a_number_never_ends_well(cells, tmp_path):
    model = cells.small_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NotFinite, match="up_proj"):
        trained(cells, tmp_path, cells.random_rows(60, 1), model)


@pytest.mark.parametrize("dtype", ["float16", "fp16", "half"])
def test_half_precision_without_bfloat16s_range_is_not_offered(tmp_path, dtype):
    """Weights born in bfloat16 reach values that float16 cannot hold (largest: 65,504)."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: half\nmodel: {{source: x, dtype: {dtype}}}\ndata: {{train: rows.jsonl}}\n")
    with pytest.raises(IngotError, match=r"model\.dtype.*bfloat16"):
        load_recipe(path)
