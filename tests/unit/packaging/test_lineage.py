"""The lineage names its makings by hash, is the same for the same makings, and gives nothing of this machine away."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from every_task import packaged

from ingot.model import adapted
from ingot.packaging.bundle import Origin, add_file, check_manifest
from ingot.packaging.environment import pins, verified_with, write_environment
from ingot.packaging.lineage import hashes, lineage_id, public, public_name, public_recipe, weights_digest


def test_the_identity_is_of_the_content() -> None:
    first = {"base": {"weights": "a"}, "seeds": {"train": 0}}
    assert lineage_id(first) == lineage_id({"seeds": {"train": 0}, "base": {"weights": "a"}})
    assert lineage_id(first) != lineage_id({"base": {"weights": "a"}, "seeds": {"train": 1}})
    assert len(lineage_id(first)) == 32


def test_weights_have_one_digest_whatever_their_files_are_called(tmp_path: Path) -> None:
    for folder, names in (("a", ("x", "y")), ("b", ("second", "first"))):
        (tmp_path / folder).mkdir()
        for name, data in zip(names, (b"1", b"2"), strict=True):
            (tmp_path / folder / f"{name}.safetensors").write_bytes(data)
        (tmp_path / folder / "config.json").write_text(folder)
    ours, theirs = hashes(tmp_path / "a"), hashes(tmp_path / "b")
    assert weights_digest(ours) == weights_digest(theirs)
    assert adapted.digest_of(ours.values()) != adapted.digest_of(theirs.values())
    assert adapted.weights_digest(tmp_path / "a") == weights_digest(ours)  # what a package compares with
    (tmp_path / "b/first.safetensors").write_bytes(b"3")
    assert weights_digest(hashes(tmp_path / "b")) != weights_digest(ours)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/models/base", "base"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("C:\\data\\rows.csv", "rows.csv"),
        ("hf://org/name", "hf://org/name"),
        ("ingot://nano", "ingot://nano"),
        ("https://me:secret@host/v1#m", "https://host/v1#m"),
        ("postgresql://user@host/db", "postgresql://host/db"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("/no_think {prompt}", "/no_think {prompt}"),
    ],
)
def test_names_give_no_place_and_no_password_away(text: str, shown: str) -> None:
    assert public_name(text) == shown
    assert public({"a": [text, 3]}) == {"a": [shown, 3]}


def test_a_recipe_loses_what_is_local() -> None:
    found = public_recipe(
        {"output": "/x", "track": {"uri": "http://u:p@h"}, "data": {"cache": "/y/cache"}, "name": "n"}
    )
    assert found == {"data": {"cache": "cache"}, "name": "n"}


def test_pins_are_of_what_trained_it() -> None:
    found = pins({"torch": "2.9.1+cu128", "transformers": "5.1.0", "python": "3.12.1"}, ("peft",))
    assert "torch==2.9.1" in found
    assert "transformers==5.1.0" in found
    assert found[-1].startswith("peft==")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_package_says_where_its_answer_was_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    write_environment(tmp_path, {})
    assert verified_with(tmp_path)["device"] == device


def test_a_package_says_which_versions_it_was_not_verified_with(tmp_path: Path) -> None:
    write_environment(tmp_path, {"torch": "2.0.1+cu118"}, ("peft",))
    found = verified_with(tmp_path)
    assert found["versions"]["torch"] == version("torch").partition("+")[0]
    assert found["versions"].keys() >= {"python", "peft", "transformers"}
    assert found["pinned_otherwise"] == {"torch": "2.0.1"}
    write_environment(tmp_path, {"python": "3.1.4"})
    assert verified_with(tmp_path)["pinned_otherwise"] == {"python": "3.1.4"}


def test_a_package_accounts_for_its_origin(text_folder: Path, tmp_path: Path) -> None:
    lineage = {"base": {"source": "hf://org/base"}, "seeds": {"train": 0}}
    score = {"value": 0.5, "interval": [0.4, 0.6], "n": 10}
    evaluation = {
        "confidence": 0.95,
        "metrics": {"tuned": {"f1_macro": score, "perplexity": score | {"value": None}}},
        "comparison": {},
        "tasks": {"gsm8k": {"metrics": {"tuned": {"exact_match": score}}}},
        "table": [{"metric": "f1_macro", "tuned": "0.5 [0.4, 0.6]"}],
        "columns": ["metric", "tuned"],
        "notes": ["a note"],
    }
    origin = Origin(lineage=lineage, evaluation=evaluation, locked={"torch": "2.9.0", "python": "3.12.1"})
    out = packaged(
        text_folder,
        tmp_path / "package",
        metadata={"base_model": "hf://org/base"},
        license="mit",
        origin=origin,
    )
    assert json.loads((out / "lineage.json").read_text()) == lineage
    assert json.loads((out / "evaluation.json").read_text()) == evaluation
    assert yaml.safe_load((out / "MLmodel").read_text())["metadata"]["lineage"] == lineage_id(lineage)
    assert "torch==2.9.0" in (out / "requirements.txt").read_text()
    assert yaml.safe_load((out / "conda.yaml").read_text())["dependencies"][0] == "python=3.12.1"
    card = (out / "README.md").read_text()
    assert "| f1_macro | 0.5 [0.4, 0.6] |" in card
    head = yaml.safe_load(card.split("---")[1])
    first, second = head["model-index"][0]["results"]
    assert first["metrics"] == [
        {
            "type": "f1",
            "name": "f1_macro",
            "value": 0.5,
            "args": {"interval": [0.4, 0.6], "confidence": 0.95, "rows": 10},
        }
    ]
    assert second["dataset"]["name"] == "gsm8k"
    assert head["base_model"] == "org/base"


def test_the_hub_reads_the_card_s_results(text_folder: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    score = {"value": 0.5, "interval": [0.4, 0.6], "n": 10}
    evaluation = {"confidence": 0.95, "metrics": {"tuned": {"rougeL": score}}, "tasks": {}}
    out = packaged(
        text_folder,
        tmp_path / "package",
        metadata={"base_model": "org/base"},
        license="mit",
        origin=Origin(evaluation=evaluation),
    )
    data = ModelCard.load(out / "README.md").data
    [result] = data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("rouge", "rougeL", 0.5)
    assert result.metric_args["interval"] == [0.4, 0.6]
    assert (data.license, data.base_model, data.pipeline_tag) == ("mit", "org/base", "text-generation")


def test_a_file_is_added_with_its_hash(text_folder: Path, tmp_path: Path) -> None:
    out = packaged(text_folder, tmp_path / "package")
    add_file(out, "verification.json", {"examples": 3})
    check_manifest(out)
    assert "verification.json" in json.loads((out / "manifest.json").read_text())["sha256"]
