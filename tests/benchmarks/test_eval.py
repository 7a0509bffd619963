"""The evaluation benchmark: what it refuses, and that both contenders agree at a tiny size. No speed is asserted."""

import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    pytest.importorskip("lm_eval")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: loaded(name) for name in ("eval", "eval_contenders", "eval_work")}
    finally:
        sys.path.remove(str(FOLDER))


def ran(speed: float, answers: list[Any], memory: int = 100) -> dict[str, Any]:
    found = {"seconds": {"4": 2 / speed}, "processor": {"4": 2 / speed}, "documents": 2, "answers": answers}
    return found | {"peak_memory": memory, "loaded_memory": 50}


def test_ratios_are_of_a_round_and_goals_are_told(bench: dict[str, ModuleType]) -> None:
    rounds = {
        "ingot": [ran(10.0, [[-1.0, -2.0]]), ran(40.0, []), ran(30.0, [])],
        "harness": [ran(5.0, [[-1.0, -2.00005]], 80), ran(10.0, [], 80), ran(10.0, [], 80)],
    }
    found = bench["eval"].cell("choices_32k", rounds, {"ingot": 2048, "harness": 4})
    assert found["ratio"] == pytest.approx(3.0) and found["spread"] == pytest.approx([2.0, 4.0])
    assert found["largest_difference"] == pytest.approx(5e-5) and found["memory_ratio"] == 1.25
    assert bench["eval"].goals({"cases": {"choices_32k": found}}) == [
        "- choices_32k: 2.5x the harness: reached (3.00x)",
        "- choices_32k: no more memory: missed (1.25x)",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([[-1.0, -2.0]], [[-1.0, -2.0002]]),
        ([[-1.0, float("nan")]], [[-1.0, -2.0]]),
        (["a story", "b"], ["a story", "c"]),
        ([-1.0], [-1.0, -2.0]),
    ],
)
def test_answers_that_differ_are_refused(bench: dict[str, ModuleType], ours: list[Any], theirs: list[Any]) -> None:
    with pytest.raises(bench["eval"].Refused):
        bench["eval"].difference("case", ours, theirs)


def test_metrics_that_differ_are_refused(bench: dict[str, ModuleType]) -> None:
    bench["eval"].same_metrics("task", {"acc": 0.5, "bits_per_byte": 2.0}, {"acc": 0.5, "bits_per_byte": 2.0 + 1e-7})
    for wrong in ({"acc": 0.5 + 1e-9}, {"bits_per_byte": 2.0001}, {}):
        with pytest.raises(bench["eval"].Refused):
            bench["eval"].same_metrics("task", wrong, {"acc": 0.5, "bits_per_byte": 2.0})


def test_both_contenders_agree_on_every_case(
    bench: dict[str, ModuleType], tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which saves the start of many."""
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr(bench["eval"], "run_alone", lambda _script, spec, out, *_rest: alone(bench, spec, out))
    args = bench["eval"].parsed(["--quick", "--rounds", "2"])
    report = bench["eval"].run(args, tmp_path)
    assert set(report["cases"]) == set(bench["eval"].BATCHES) and set(report["tasks"]) == set(bench["eval"].TASKS)
    assert report["largest_difference"] <= 1e-3  # a text's; those of choices are far smaller
    assert report["tasks"]["exact_match_chain"]["metrics"]["ingot"]["exact_match,strict-match"] > 0
    told = bench["eval"].table(report)
    assert "choices_128k" in told and "bits_per_byte" in told and "5.0x the harness" in told


def alone(bench: dict[str, ModuleType], spec: dict[str, Any], out: Path) -> Any:
    bench["eval_contenders"].main([json.dumps(spec), str(out)])
    return json.loads(out.read_text(encoding="utf-8"))


def test_answers_are_short_mostly_and_seldom_long(bench: dict[str, ModuleType]) -> None:
    """What batches that wait for their slowest answer pay for."""
    work = bench["eval_work"]
    found = work.prompts(random.Random(0), work.FULL)
    lengths = sorted(work.CHAIN - int(one["prompt"].split()[-1][1:]) % work.CHAIN - 1 for one in found)
    assert lengths[0] < 20 and lengths[len(lengths) // 2] < 90 and lengths[-1] > 150
