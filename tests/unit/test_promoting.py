"""The promotion policy on a tiny run: what is refused until it is met, what lets it pass, and what is noticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ingot import verbs
from ingot.cli import app
from ingot.errors import IngotError, NotPromoted, PackageError, RecipeError
from ingot.promoting import GRANTED, NO_POLICY, OVERRIDDEN, parse_override, require_promotion
from ingot.runfolder import open_run
from ingot.track import Tracker

BETTER = {"metric": "exact_match", "min_rows": 6}
ANY = BETTER | {"require": "at_least", "value": 0}
WHO = "Jane Doe: customer demo, ticket 123"


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def promotion(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"promotion": {"rules": list(rules)}}


def run_in(folder: Path) -> Path:
    [found] = (folder / "runs").glob("*/run.json")
    return found.parent


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> tuple[Path, Any]:
    """A run that stopped because its policy is not met, and how the command ended."""
    folder = tmp_path_factory.mktemp("project")
    recipe = write_recipe(folder, evaluate=promotion(ANY, BETTER))
    done = ingot("run", recipe, "--json", "--summary", folder / "summary.json")
    return run_in(folder), done


@pytest.fixture
def refused(trained: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def promoted(trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as if it had begun with a policy that is met."""
    run = tmp_path_factory.mktemp("promoted") / "run"
    shutil.copytree(trained[0], run)
    change_policy(run, [ANY])
    content = record(run)
    content["promotion"]["policy"] = open_run(run).recipe.evaluate.promotion.model_dump(mode="json")
    (run / "run.json").write_text(json.dumps(content))
    verbs.evaluate(run)
    return run


@pytest.fixture
def met(promoted: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(promoted, tmp_path / "run")
    return tmp_path / "run"


def change_policy(run: Path, rules: list[dict[str, Any]]) -> None:
    recipe = yaml.safe_load((run / "resolved.yaml").read_text())
    recipe["evaluate"]["promotion"] = {"rules": rules} if rules else None
    (run / "resolved.yaml").write_text(yaml.safe_dump(recipe))


def served(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was served from now on."""
    found: list[Path] = []
    monkeypatch.setattr(verbs, "serve_forever", lambda fleet, **_: found.extend(one.folder for one in fleet.models))
    return found


def test_a_run_that_is_not_met_ends_before_its_package(trained: tuple[Path, Any]) -> None:
    run, done = trained
    assert done.exit_code == 3
    assert done.stderr.count("error: ") == 1
    for part in (
        "evaluate.promotion: The policy is not met: 1 of 2",
        f"ingot package {run} --override",
        "difference above 0",
    ):
        assert part in done.stderr
    assert not (run / "package").exists()
    assert record(run)["status"] == "not promoted"
    assert list(record(run)["stages"]) == ["finetune", "evaluate"]
    summary = json.loads(done.stdout)
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary == json.loads((run.parents[1] / "summary.json").read_text())
    assert summary["promotion"]["granted"] is False
    assert [it["state"] for it in summary["promotion"]["conditions"]] == ["holds", "does not hold"]
    assert record(run)["promotion"]["sentence"] == summary["promotion"]["sentence"]
    page = (run / "evaluation" / "report.html").read_text()
    assert "✗ not promoted" in page
    assert "difference above 0" in page
    again = ingot("run", run.parents[1] / "recipe.yaml", "--resume", run)
    assert again.exit_code == 3
    assert "does not hold" in again.stdout


def test_neither_package_nor_serve_takes_it(refused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = served(monkeypatch)
    for arguments in (
        ("package", refused),
        ("serve", "--no-supervise", refused),
        ("serve", "--no-supervise", refused / "model"),
    ):
        done = ingot(*arguments)
        assert done.exit_code == 3, done.output
        assert "evaluate.promotion: The policy is not met" in done.stderr
    with pytest.raises(NotPromoted):
        require_promotion(refused)
    assert found == []
    assert not (refused / "package").exists()


def test_an_override_is_recorded_everywhere(
    trained: tuple[Path, Any], refused: Path, monkeypatch: pytest.MonkeyPatch, tags: dict[str, str]
) -> None:
    found = served(monkeypatch)
    done = ingot("package", refused, "--override", WHO)
    assert done.exit_code == 0, done.output
    [kept] = record(refused)["overrides"]
    assert tags["promotion"] == OVERRIDDEN
    assert tags["promotion.override"].endswith(": customer demo, ticket 123.")
    assert (kept["name"], kept["reason"]) == ("Jane Doe", "customer demo, ticket 123")
    assert "1 of 2 conditions does not hold" in kept["missing"]
    said = "Overridden by Jane Doe on "
    assert said in (refused / "package" / "README.md").read_text()
    assert said in (refused / "evaluation" / "report.html").read_text()
    stamp = yaml.safe_load((refused / "package" / "MLmodel").read_text())["metadata"]["promotion"]
    assert (stamp["status"], stamp["granted"], stamp["override"]) == (OVERRIDDEN, False, kept)
    assert stamp["verdict"] == record(refused)["promotion"]["verdict"] == kept["verdict"]
    assert record(refused)["stages"]["package"]["promotion"] == OVERRIDDEN
    assert json.loads(ingot("evaluate", refused, "--json").stdout)["promotion"]["overrides"] == [kept]
    for target in (refused, refused / "package"):
        shown = ingot("serve", "--no-supervise", target)
        assert shown.exit_code == 0, shown.output
        assert said in shown.stdout
    assert found == [refused / "package"] * 2
    shown = ingot("serve", "--no-supervise", refused / "package", "--override", "John Roe: another reason")
    assert shown.exit_code == 2
    assert "there is nothing to override (The policy is not met" in shown.stderr
    assert ingot("run", trained[0].parents[1] / "recipe.yaml", "--resume", refused).exit_code == 0
    assert record(refused)["status"] == "finished"
    # It speaks of this model and this finding only.
    change_policy(refused, [BETTER])
    assert ingot("serve", "--no-supervise", refused).exit_code == 3


def test_serving_in_spite_of_it_is_recorded_too(refused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = served(monkeypatch)
    done = ingot("serve", "--no-supervise", refused / "model", "--override", "Jane <b>Doe</b>: a [red]demo[/]")
    assert done.exit_code == 0, done.output
    assert "a [red]demo[/]" in done.stdout
    assert record(refused)["overrides"][0]["name"] == "Jane <b>Doe</b>"
    page = (refused / "evaluation" / "report.html").read_text()
    assert "Overridden by Jane &lt;b&gt;Doe&lt;/b&gt; on " in page
    assert ingot("serve", "--no-supervise", refused).exit_code == 0
    assert found == [refused / "model"] * 2


def test_what_is_met_passes_and_says_so(met: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = served(monkeypatch)
    assert require_promotion(met).status == GRANTED
    done = ingot("package", met)
    assert done.exit_code == 0, done.output
    stamp = yaml.safe_load((met / "package" / "MLmodel").read_text())["metadata"]["promotion"]
    assert (stamp["status"], stamp["granted"]) == (GRANTED, True)
    assert len(stamp["evidence"]) == 2
    assert "The policy is met: its condition holds." in (met / "package" / "README.md").read_text()
    assert "✓ may be promoted" in (met / "evaluation" / "report.html").read_text()
    assert "The policy is met" in ingot("serve", "--no-supervise", met / "package").stdout
    assert found == [met / "package"]
    for target in (met, met / "package"):
        with pytest.raises(RecipeError, match=r"there is nothing to override \(the policy is met\)"):
            require_promotion(target, WHO)
    assert "overrides" not in record(met)


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Those that MLflow is given from now on."""
    found: dict[str, str] = {}
    monkeypatch.setattr(Tracker, "tag", lambda self, values: found.update(values))
    return found


def test_a_policy_is_not_chosen_after_the_result(refused: Path, tags: dict[str, str]) -> None:
    change_policy(refused, [ANY])
    verbs.evaluate(refused)
    assert tags == {"promotion": "granted", "promotion.verdict": record(refused)["promotion"]["verdict"]}
    with pytest.raises(NotPromoted, match="The policy that the run began with was changed"):
        verbs.package(refused)


def damage(run: Path, what: str) -> None:
    evaluation = run / "evaluation"
    verdict = json.loads((evaluation / "verdict.json").read_text())
    if what == "verdict edited":
        (evaluation / "verdict.json").write_text(json.dumps(verdict | {"alpha": 0.2}))
    elif what == "verdict of another run":
        (evaluation / "verdict.json").write_text(json.dumps(verdict | {"model": "of another"}))
    elif what == "verdict gone":
        (evaluation / "verdict.json").unlink()
    elif what == "verdict torn":
        (evaluation / "verdict.json").write_text("{")
    elif what == "scores edited":
        path = evaluation / "tuned" / "test.json"
        path.write_text(path.read_text().replace('"rows": 6', '"rows": 7'))
    elif what == "rows gone":
        (evaluation / "tuned" / "test.parquet").unlink()
    elif what == "model changed":
        path = run / "model" / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_length": 7}))
    elif what == "policy changed":
        change_policy(run, [ANY | {"value": 0.1}])
    elif what == "policy gone":
        change_policy(run, [])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("verdict edited", "verdict.json is not what this run's evaluation wrote"),
        ("verdict of another run", "verdict.json is not what this run's evaluation wrote"),
        ("verdict gone", "the run was not evaluated"),
        ("verdict torn", "verdict.json is damaged"),
        ("scores edited", "evaluation/tuned/test.json is not what the verdict was drawn from"),
        ("rows gone", "evaluation/tuned/test.parquet is not what the verdict was drawn from"),
        ("model changed", "The model was changed after the verdict"),
        ("policy changed", "The policy that the run began with was changed in resolved.yaml"),
        ("policy gone", "was taken out of resolved.yaml"),
    ],
)
def test_a_verdict_that_speaks_of_something_else_is_noticed(met: Path, what: str, said: str) -> None:
    assert require_promotion(met).status == GRANTED
    damage(met, what)
    done = ingot("package", met)
    assert done.exit_code == 3, done.output
    assert said in done.stderr
    assert (f"restore {met}/resolved.yaml" if "policy" in what else f"ingot evaluate {met}") in done.stderr
    cleared = require_promotion(met, WHO)
    assert cleared.status == OVERRIDDEN
    assert said in cleared.sentence
    assert said in record(met)["overrides"][0]["missing"]


def test_a_package_without_a_verdict_that_is_met_is_not_served(met: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = served(monkeypatch)
    package = verbs.package(met).rename(met.parent / "elsewhere")
    assert require_promotion(package / "model").status == GRANTED
    about = package / "model" / "ingot.json"
    written = about.read_text()
    about.write_text(written + " ")
    with pytest.raises(PackageError, match=r"model/ingot\.json changed after packaging"):
        require_promotion(package)
    about.write_text(written)
    path = package / "MLmodel"
    content = yaml.safe_load(path.read_text())
    stamp = content["metadata"].pop("promotion")
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PackageError, match="MLmodel changed after packaging"):
        require_promotion(package)
    content["metadata"]["promotion"] = stamp | {"granted": False}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PackageError, match="MLmodel changed after packaging"):
        require_promotion(package)
    manifest = json.loads((package / "manifest.json").read_text())
    del manifest["sha256"]["MLmodel"]
    (package / "manifest.json").write_text(json.dumps(manifest))
    assert ingot("serve", "--no-supervise", package).exit_code == 3
    done = ingot("serve", "--no-supervise", package, "--override", WHO)
    assert done.exit_code == 0, done.output
    assert json.loads((package / "overrides.jsonl").read_text())["name"] == "Jane Doe"
    assert ingot("serve", "--no-supervise", package / "model").exit_code == 0
    assert found == [package, package / "model"]


def test_models_without_a_policy_pass(tmp_path: Path, refused: Path) -> None:
    content = record(refused)
    del content["promotion"]
    (refused / "run.json").write_text(json.dumps(content))
    change_policy(refused, [])
    assert require_promotion(refused).status == NO_POLICY
    stamp = yaml.safe_load((verbs.package(refused) / "MLmodel").read_text())["metadata"]["promotion"]
    assert stamp == {"status": NO_POLICY, "sentence": ""}
    assert "Promotion" not in (refused / "package" / "README.md").read_text()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "MLmodel").write_text("flavors: {}\n")
    for target in (refused / "package", tmp_path / "foreign", tmp_path):
        assert require_promotion(target).status == NO_POLICY
        with pytest.raises(RecipeError, match="there is no policy"):
            require_promotion(target, WHO)


@pytest.mark.parametrize(
    "text", ["", "Jane Doe", "Jane Doe:", ": demo", "12: demo", "Jane: 34", "Jane: de\nmo", f"Jane: {'x' * 500}"]
)
def test_an_override_needs_a_name_and_a_reason(text: str) -> None:
    with pytest.raises(RecipeError, match="--override"):
        parse_override(text)


def test_names_and_reasons_are_taken_apart() -> None:
    assert parse_override(" Zoë O'Neil :  ticket 9: see https://x.org ") == (
        "Zoë O'Neil",
        "ticket 9: see https://x.org",
    )


def test_a_policy_that_cannot_be_met_stops_before_training(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    done = ingot("run", write_recipe(tmp_path / "project", evaluate=promotion(BETTER | {"min_rows": 7})))
    assert done.exit_code == 2
    assert "evaluate.promotion.rules[0].min_rows = 7: test has 6 rows" in done.stderr
    assert not (tmp_path / "project" / "runs").exists()


def test_a_run_must_be_trained_before_it_is_packaged(refused: Path) -> None:
    content = record(refused)
    content["stages"] = {}
    (refused / "run.json").write_text(json.dumps(content))
    with pytest.raises(IngotError, match="holds no finished model"):
        verbs.package(refused, override=WHO)
