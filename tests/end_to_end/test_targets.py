"""Encoder-decoders from the command line: trained, measured, consolidated, and what users get wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingot.evaluation.samples import Samples

WORDS = "one two three four five six seven eight nine ten".split()


def translations(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "source": f"{WORDS[n % 10]} {WORDS[n % 7]} red boxes",
            "target": f"boxes: {WORDS[n % 10]}, {WORDS[n % 7]}, red",
        }
        for n in range(start, start + count)
    ]


@pytest.fixture
def bart_folder(tmp_path: Path, make_tokenizer: Callable[..., Any]) -> Path:
    """A tiny random BART whose positions reach 64 tokens."""
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer, folder = make_tokenizer(None), tmp_path / "bart"
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def translating(make_project: Callable[[Path, str], Any], bart_folder: Path) -> Any:
    project = make_project(bart_folder, "text-generation")
    project.rows("train", translations(0, 24))
    project.rows("test", translations(30, 6))
    project.write(objective={"task": "translation"}, data={"max_tokens": 48, "max_target_tokens": 48})
    return project


def test_adapter_of_a_bart(ingot, translating, replayed):
    translating.write(package={"enabled": True}, serve={"enabled": True})
    done = ingot("run", translating.recipe, "--json")
    assert done.code == 0, done.err
    summary = done.json()
    assert set(summary["metrics"]["tuned"]) == {"bleu", "chrf"}
    assert summary["stages"]["finetune"]["merge_difference"] < 1e-4
    assert translating.losses()[-1] < translating.losses()[0]
    adapter = json.loads((translating.run / "adapter" / "adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_2_SEQ_LM"
    rows = Samples(translating.run / "evaluation" / "tuned" / "test.parquet")
    assert [row.references for row in rows] == [[row["target"]] for row in translations(30, 6)]
    assert summary["stages"]["package"]["verified"]
    assert summary["question"] == translations(30, 6)[0]["source"]
    assert summary["answer"].strip() == rows[0].prediction
    assert replayed(translating.run)[0] == 200
    status, told = replayed(translating.run, lambda stored: replace(stored, expected={"output_string": "no"}))
    assert (status, "4 of 4 rows" in told) == (503, True)


def test_every_weight_of_the_embedded_t5(ingot, translating):
    translating.write(
        model={"source": "ingot://nano-t5", "initialization": "random"},
        adapter={"kind": "none"},
        train={"activation_checkpointing": "full"},
    )
    done = ingot("finetune", translating.recipe, "check.enabled=false")
    assert done.code == 0, done.err
    assert ingot("consolidate", translating.run, "out").code == 0
    found, exported = (
        load_file(path / "model.safetensors") for path in (translating.folder / "out", translating.run / "model")
    )
    assert found.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in found.items())
    assert (translating.folder / "out" / "generation_config.json").is_file()


def test_inspect_shows_source_and_target(ingot, translating):
    done = ingot("inspect", translating.recipe, "--json")
    assert done.code == 0, done.err
    parts = [(part["text"], part["trainable"]) for part in done.json()["rows"][0]["segments"]]
    assert parts == [("one one red boxes", False), ("boxes: one, one, red", True), ("</s>", True)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"max_tokens": 65}}, "data.max_tokens = 65: the model's positions reach 64"),
        ({"data": {"max_target_tokens": 65}}, "data.max_target_tokens = 65: the model's positions reach 64"),
        ({"evaluate": {"max_new_tokens": 65}}, "evaluate.max_new_tokens = 65: the model's positions reach 64"),
        ({"train": {"tokens_per_microbatch": 95}}, "data.max_target_tokens = 48"),
        ({"data": {"batches": "packed"}}, "a decoder would read every row's source"),
        ({"objective": {"task": "summarization"}}, "the columns are: source, target"),
        ({"evaluate": {"metrics": ["accuracy"]}}, "evaluate.metrics = 'accuracy': translation has"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_named(ingot, translating, change, told):
    translating.write(**change)
    done = ingot("finetune", translating.recipe)
    assert done.code == 2, done.out
    assert told in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not translating.runs


def test_a_model_that_only_continues_text_is_refused(ingot, translating, model_folder):
    translating.write(model={"source": str(model_folder)})
    done = ingot("finetune", translating.recipe)
    assert done.code != 0
    assert "no model of transformers does translation with a LlamaConfig" in " ".join(done.err.split())
