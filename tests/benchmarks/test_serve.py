"""The serving benchmark: what it refuses, that all contenders answer rightly at a tiny size, and what an overload is
held to. No speed is asserted.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("serve", "serve_soak", "serve_work")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))


def ran(speed: float, said: list[str]) -> dict[str, Any]:
    return {"requests_per_second": speed, "p50": 1 / speed, "p95": 2 / speed, "peak_memory": 5, "said": said}


def test_ratios_are_within_a_round(bench: dict[str, ModuleType]) -> None:
    found = bench["serve"].cell(
        "questions_16",
        {"ingot": [ran(8, ["glad"]), ran(20, ["glad"])], "mlflow": [ran(2, ["glad"]), ran(2, ["glad"])]},
    )
    assert found["ratio"] == {"mlflow": 7.0}
    assert found["spread"] == {"mlflow": [4.0, 10.0]}
    assert found["p95"] == {"ingot": pytest.approx((0.25 + 0.1) / 2), "mlflow": 1.0}


def test_another_answer_is_refused(bench: dict[str, ModuleType]) -> None:
    with pytest.raises(bench["serve"].Refused, match="request 1 is answered 'sad'"):
        bench["serve"].cell("questions_16", {"ingot": [ran(1, ["a", "sad"])], "mlflow": [ran(1, ["a", "glad"])]})


def test_the_chain_goes_on_behind_the_prompt(bench: dict[str, ModuleType]) -> None:
    work = bench["serve_work"]
    assert work.expected({"prompt": "w9 w254", "max_tokens": 3}) == "w255 Question:256 w257"
    for request in work.writing(work.QUICK, 50):
        assert int(request["prompt"].split()[-1].removeprefix("w")) + request["max_tokens"] < work.QUICK.vocabulary


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"told": {"right": 9, "wrong": 1}}, "1 requests: wrong"),
        ({"told": {"right": 8, "status 500": 2}}, "2 requests: status 500"),
        ({"told": {"right": 8, "ReadError": 2}}, "2 requests: ReadError"),
        ({"told": {"right": 9}}, "10 requests were sent and 9 ended"),
        ({"memory": {"growth": 1.101}}, "memory grows to 1.101 of itself while requests are sent to a full batch"),
        (
            {"memory": {"growth": None}},
            "the running batch was not full long enough to tell whether memory grows",
        ),
    ],
)
def test_faults_of_an_overload(bench: dict[str, ModuleType], change: dict[str, Any], words: str) -> None:
    over = {"sent": 10, "told": {"right": 6, "refused 503": 4}, "memory": {"growth": 1.1}}
    assert bench["serve_soak"].faults({"overload": over, "ready": 200}) == []
    assert bench["serve_soak"].faults({"overload": over | change, "ready": 200}) == [words]


def memory_of(kept_a_minute: float) -> list[dict[str, Any]]:
    """Ten minutes: 60 at rest, before and after; 100 while 64 rows run, a tenth more or less for a moment."""
    found = []
    for place in range(123):
        rows = min(64, 4 * place) if place < 122 else 0
        size = 60 + 40 * rows / 64 + 10 * (-1) ** place * (rows == 64 and place % 7 == 3)
        found.append({"at": 5.0 * place, "rows": rows, "bytes": size * (1 + kept_a_minute) ** (place / 12)})
    return found


@pytest.mark.parametrize(("kept_a_minute", "faults"), [(0.0, 0), (0.005, 0), (0.01, 1), (0.02, 1)])
def test_memory_that_is_kept_is_seen(bench: dict[str, ModuleType], kept_a_minute: float, faults: int) -> None:
    memory = bench["serve_soak"].kept(memory_of(kept_a_minute), 600.0)
    over = {"sent": 1, "told": {"right": 1}, "memory": memory}
    found = bench["serve_soak"].faults({"overload": over, "ready": 200})
    assert len(found) == faults
    assert all(words.startswith("memory") for words in found)


def test_memory_counts_from_when_the_batch_is_full(bench: dict[str, ModuleType]) -> None:
    found = bench["serve_soak"].kept(memory_of(0.0), 600.0)
    sizes = {"before": 60, "full": 100, "last": 100, "peak": 110, "at_rest": 60}
    assert found == sizes | {"full_at": 75.0, "growth": 1.0}
    late = [one | {"rows": one["rows"] // 2 if one["at"] < 500 else one["rows"]} for one in memory_of(0.0)]
    assert bench["serve_soak"].kept(late, 600.0)["growth"] is None


@pytest.mark.slow
def test_every_contender_answers_rightly(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    out = tmp_path / "serve.json"
    assert bench["serve"].main(["--quick", "--rounds", "1", "--work", str(tmp_path), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert set(report["ratio"]) == {"causal_16", "causal_64", "questions_16", "questions_64", "texts_64"}
    assert set(report["ratio"]["causal_64"]) == {"mlflow", "transformers"}
    assert "causal_16" in out.with_suffix(".md").read_text()


@pytest.mark.slow
def test_an_overload_is_survived(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    words = ["--quick", "--minutes", "0.2", "--leavers", "60", "--work", str(tmp_path)]
    out = tmp_path / "soak.json"
    assert bench["serve_soak"].main([*words, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["overload"]["told"]["right"] > 0
