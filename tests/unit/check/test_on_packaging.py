"""What the gate says of licences, forms and the adapter, without a model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig

from ingot.check.on_packaging import licence_terms, package_forms, portable_adapter
from ingot.check.verdict import Report, Status
from ingot.recipe_io import parse_recipe


@pytest.fixture
def subject(tmp_path: Path) -> Callable[..., Any]:
    def make(**sections: Any) -> Any:
        data = {"train": {"uri": "ingot://tool-calls", "split": "train"}, "max_tokens": 64} | sections.pop("data", {})
        recipe = parse_recipe({"name": "t", "model": {"source": "ingot://nano"}, "data": data, **sections})
        return SimpleNamespace(recipe=recipe, home=tmp_path, tokenizer=range(90))

    return make


def test_known_licences_pass(subject: Callable[..., Any]) -> None:
    found = licence_terms(subject())
    assert found.status is Status.passed
    assert found.facts["license"] == "apache-2.0"


def test_an_unknown_licence_warns(subject: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    found = licence_terms(subject(data={"train": "rows.jsonl"}))
    assert found.status is Status.warned
    assert "rows.jsonl" in found.because
    assert not Report("t", "", [found], None, [], {}, 0.0).failures  # type: ignore[arg-type]


def test_a_conflict_fails_with_the_field(subject: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    rows = {"train": {"uri": "rows.jsonl", "license": "cc-by-nc-4.0"}}
    found = licence_terms(subject(data=rows, package={"license": "apache-2.0"}))
    assert found.status is Status.failed
    assert "package.license" in found.because


def test_a_form_without_its_program_fails(subject: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert package_forms(subject()).status is Status.passed
    found = package_forms(subject(package={"forms": ["gguf"]}))
    assert found.status is Status.failed
    assert "convert_hf_to_gguf.py" in found.because


def test_a_package_that_is_off_asks_nothing(subject: Callable[..., Any]) -> None:
    off = subject(package={"enabled": False})
    assert {licence_terms(off).status, package_forms(off).status} == {Status.not_applicable}


def _trial(subject: Any, **config: Any) -> Any:
    embedding = SimpleNamespace(weight=SimpleNamespace(shape=(96, 8)))
    config = {"r": 16, "target_modules": ["q_proj"]} | config
    model = SimpleNamespace(peft_config={"default": LoraConfig(**config)}, get_input_embeddings=lambda: embedding)
    return SimpleNamespace(subject=subject, sharded=SimpleNamespace(plain=model))


def test_an_adapter_that_engines_refuse_warns(subject: Callable[..., Any]) -> None:
    assert portable_adapter(_trial(subject())).status is Status.passed
    found = portable_adapter(_trial(subject(), use_dora=True, r=12))
    assert found.status is Status.warned
    assert "DoRA" in found.because
    assert "rank 12" in found.because
    assert found.fix.startswith("adapter.dora")
    assert portable_adapter(_trial(subject(adapter={"kind": "none"}))).status is Status.not_applicable
