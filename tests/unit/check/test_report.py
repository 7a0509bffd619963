"""The gate's report as JSON and as files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ingot.check import report as reports
from ingot.check.verdict import Evidence, Report, Shown, Status, Verdict

SEGMENTS = [
    {"text": "Say hi", "trainable": False, "special": False},
    {"text": "hi", "trainable": True, "special": False},
]


def made(*verdicts: Verdict, text: str = "rows: all 3 training rows") -> Report:
    evidence = Evidence([Shown("a.jsonl:1", SEGMENTS, 5, 2, "greeting")], [2, 0, 4], [[5, 7], [12]], 16)
    return Report("small", "abc123", list(verdicts), evidence, [text], {"ingot": "0.1.0"}, 1.5)


ALL_ENDS = (
    Verdict(
        "one-bos", Status.passed, "3 rows begin with one <s>", facts={"rows": 3, "first": ["a", "b"]}, seconds=0.25
    ),
    Verdict("prompt-mask", Status.failed, "1 of 3 rows", "set model.chat_template"),
    Verdict("no-leakage", Status.waived, "2 rows", "take them out"),
    Verdict("stop-token", Status.not_applicable, "no text is written"),
)


def test_comes_back_as_it_was():
    report = made(*ALL_ENDS)
    back = reports.from_dict(json.loads(reports.as_json(report)))
    assert back == report
    assert [verdict.name for verdict in back.failures] == ["prompt-mask"]
    assert all(isinstance(verdict.status, Status) for verdict in back.verdicts)


def test_scripts_read_how_it_ended():
    values = json.loads(reports.as_json(made(*ALL_ENDS)))
    assert values["passed"] is False
    assert values["failed"] == ["prompt-mask"]  # a waived one stops nothing
    assert [verdict["status"] for verdict in values["verdicts"]] == ["passed", "failed", "waived", "not applicable"]
    assert json.loads(reports.as_json(made(ALL_ENDS[0], ALL_ENDS[2])))["passed"] is True


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array([1, 2]), [1, 2]),
        (np.bool_(True), True),
        ((1, Path("a")), [1, "a"]),
        ({1: Status.failed}, {"1": "failed"}),
    ],
    ids=repr,
)
def test_facts_of_any_kind_are_json(fact, expected):
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    report = made(Verdict("right-loss", Status.passed, "equal", facts={"fact": fact}))
    values = json.loads(reports.as_json(report), parse_constant=refuse)
    assert values["verdicts"][0]["facts"] == {"fact": expected}


def test_saves_two_files_and_nothing_else(tmp_path):
    (tmp_path / "check.json").write_text("of an older run")
    paths = reports.save(made(*ALL_ENDS), tmp_path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "check.html", tmp_path / "check.json"]
    assert set(paths) == set(tmp_path.iterdir())
    assert reports.from_dict(json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))) == made(*ALL_ENDS)
    assert "prompt-mask" in (tmp_path / "check.html").read_text(encoding="utf-8")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    reports.save(made(ALL_ENDS[0]), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(source: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(reports.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        reports.save(made(*ALL_ENDS), tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_half_a_surrogate_pair_can_be_saved(tmp_path):
    report = made(ALL_ENDS[0], text="a row with \ud83d in it")
    reports.save(report, tmp_path)
    assert reports.from_dict(json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))) == report
    assert "\\ud83d in it" in (tmp_path / "check.html").read_text(encoding="utf-8")
