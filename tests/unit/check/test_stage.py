"""The gate's report stays with the run: in its folder, in its record, and with the tracker."""

import json

from ingot.check.stage import keep_proofs
from ingot.check.verdict import Evidence, Report, Status, Verdict
from ingot.recipe_io import parse_recipe
from ingot.runfolder import create_run


class Tracker:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def artifact(self, path) -> None:
        assert path.is_file()
        self.names.append(path.name)


def test_the_report_is_saved_noted_and_tracked(tmp_path):
    recipe = parse_recipe(
        {"name": "kept", "model": {"source": "x"}, "data": {"train": "y"}, "output": str(tmp_path / "runs")}
    )
    run, tracker = create_run(recipe, tmp_path), Tracker()
    verdicts = [
        Verdict("one-bos", Status.passed, "one"),
        Verdict("whole-answers", Status.waived, "3 are cut", "raise it"),
    ]
    report = Report("kept", "hash", verdicts, Evidence(), ["rows: all"], {"ingot": "0"}, 1.5)
    keep_proofs(report, run, tracker)  # type: ignore[arg-type]
    assert tracker.names == ["check.json", "check.html"]
    assert run.record()["stages"]["check"] == {"seconds": 1.5, "one-bos": "passed", "whole-answers": "waived"}
    saved = json.loads((run.folder / "check.json").read_text(encoding="utf-8"))
    assert [verdict["status"] for verdict in saved["verdicts"]] == ["passed", "waived"]
