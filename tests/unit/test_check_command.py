"""`ingot check` on the command line: what it prints, writes and exits with. The proofs have their own tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot import verbs
from ingot.check.gate import PROOFS
from ingot.check.verdict import Evidence, Report, Status, Verdict
from ingot.check_command import MARKS
from ingot.cli import app
from ingot.errors import DataError
from ingot.recipe import Recipe

PASSED = Verdict("one-bos", Status.passed, "3 rows begin with one [bold]<s>[/bold]")
FAILED = Verdict("prompt-mask", Status.failed, "2 of 3 rows; the first is a.jsonl:1", "set model.chat_template")
WAIVED = Verdict("no-leakage", Status.waived, "2 test rows stand in train", "take the two rows out")
APART = Verdict("stop-token", Status.not_applicable, "no text is written")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("name: small\nmodel: {source: ingot://nano}\ndata: {train: rows.jsonl}\n")
    return path


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """finds(verdict...) -> list that takes up what `verbs.check` is asked, which answers with these verdicts."""

    def use(*verdicts: Verdict) -> list[tuple[Recipe, Path]]:
        asked: list[tuple[Recipe, Path]] = []

        def check(recipe: Recipe, *, home: Path, progress: Any) -> Report:
            asked.append((recipe, home))
            with progress.stage("check", total=1, unit="proofs") as bar:
                bar.advance()
            sampled = ["rows: 2,000 of 18,342 training rows, drawn with data.split_seed = 7"]
            return Report(recipe.name, "abc", list(verdicts), Evidence(), sampled, {}, 12.3)

        monkeypatch.setattr(verbs, "check", check)
        return asked

    return use


def ingot(*arguments: object, **env: str) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120", **env})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [((PASSED, APART), 0), ((PASSED, WAIVED), 0), ((PASSED, FAILED, WAIVED), 2)],
    ids=["passed", "waived", "failed"],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_exit_code(verdicts, code, as_json, recipe_file, finds):
    finds(*verdicts)
    assert ingot("check", recipe_file, *(["--json"] if as_json else [])).exit_code == code


def test_a_line_for_each_proof_then_the_fixes(recipe_file, finds):
    finds(PASSED, FAILED, WAIVED, APART)
    lines = ingot("check", recipe_file).stdout.splitlines()
    proofs = {
        verdict.name: line
        for verdict in (PASSED, FAILED, WAIVED, APART)
        for line in lines
        if f" {verdict.name} " in line and line.rstrip().endswith(verdict.because)
    }
    assert proofs["one-bos"].startswith("✓ passed")  # and its reason as it is, though it looks like markup
    assert proofs["prompt-mask"].startswith("✗ FAILED")
    assert proofs["no-leakage"].startswith("! waived")
    assert proofs["stop-token"].startswith("– n/a")
    lines = [line.rstrip() for line in lines]
    fix = lines.index("mend prompt-mask  set model.chat_template")
    assert fix > max(lines.index(line.rstrip()) for line in proofs.values())
    assert not any("take the two rows out" in line for line in lines)  # waived: nothing to be done
    assert "sampled           rows: 2,000 of 18,342 training rows, drawn with data.split_seed = 7" in lines[fix:]
    assert "✗ FAILED  small: 1 passed, 1 failed, 1 waived, 1 not applicable, in 12 s" in lines[fix:]


def test_json_is_alone_on_standard_output(recipe_file, finds):
    finds(PASSED, FAILED)
    result = ingot("check", recipe_file, "--json")
    assert json.loads(result.stdout)["failed"] == ["prompt-mask"]
    assert result.stderr == ""


def test_progress_is_on_standard_error(recipe_file, finds):
    finds(PASSED)
    result = ingot("check", recipe_file)
    assert "check: 1 proofs" in result.stderr
    assert "check: 1 proofs" not in result.stdout


def test_writes_the_page_and_nothing_else(recipe_file, finds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finds(PASSED, FAILED)
    result = ingot("check", recipe_file)
    assert f"ingot check {recipe_file} --html check.html" in " ".join(result.stdout.split())
    assert list(tmp_path.iterdir()) == [recipe_file]
    result = ingot("check", recipe_file, "--html", "page.html")
    assert result.exit_code == 2
    assert "report: page.html" in result.stdout
    assert sorted(tmp_path.iterdir()) == [tmp_path / "page.html", recipe_file]
    assert "1 proof failed" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("place", "reason"), [("missing/page.html", "does not exist"), (".", "is a folder")])
def test_a_bad_place_is_said_before_any_proof(place, reason, recipe_file, finds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = finds(PASSED)
    result = ingot("check", recipe_file, "--html", place)
    assert result.exit_code == 2
    assert "--html" in result.stderr and reason in result.stderr
    assert asked == []


def test_overrides_and_home_arrive(recipe_file, finds):
    asked = finds(PASSED)
    ingot("check", recipe_file, "data.max_tokens=64", "check.waive=[no-leakage]")
    [(recipe, home)] = asked
    assert recipe.data.max_tokens == 64
    assert recipe.check.waive == ["no-leakage"]
    assert home == recipe_file.parent


def test_only_the_first_rank_speaks(recipe_file, finds, tmp_path):
    finds(PASSED, FAILED)
    others = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    result = ingot(
        "check", recipe_file, "--json", "--html", tmp_path / "page.html", MASTER_ADDR="a", MASTER_PORT="1", **others
    )
    assert result.exit_code == 2
    assert result.stdout == ""
    assert not (tmp_path / "page.html").exists()


def test_errors_end_as_those_of_other_verbs(recipe_file, monkeypatch):
    def check(recipe: Recipe, *, home: Path, progress: Any) -> Report:
        raise DataError("data.train", "rows.jsonl", "no such file")

    monkeypatch.setattr(verbs, "check", check)
    result = ingot("check", recipe_file)
    assert result.exit_code == 2
    assert "error: data.train = 'rows.jsonl': no such file" in result.stderr
    assert result.stdout == ""
    result = CliRunner().invoke(app, ["check", str(recipe_file), "--debug"])
    assert isinstance(result.exception, DataError)


def test_every_status_has_its_word():
    assert set(MARKS) == {status.value for status in Status}


def test_the_manual_explains_every_proof():
    manual = (Path(__file__).resolve().parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    assert [name for name in PROOFS if f"| `{name}` |" not in manual] == []
