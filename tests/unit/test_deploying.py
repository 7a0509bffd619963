"""What `ingot serve` is given: every kind of target, what may not be served, and the rows that prove a model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from ingot import deploying, replaying
from ingot.cli import app
from ingot.deploying import assemble
from ingot.errors import ModelError, NotPromoted, RecipeError, ServeError
from ingot.model.runtime import Runtime
from ingot.replaying import stored_rows
from ingot.serving.app import create_app
from ingot.serving.engine import Limits, Meter
from ingot.serving.fleet import deploy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_recipe: Callable[..., Path]) -> Path:
    """A finished run with its evaluation and package."""
    folder = tmp_path_factory.mktemp("project")
    recipe = write_recipe(folder, evaluate={"max_new_tokens": 8}, package={"verify": True})
    done = CliRunner().invoke(app, ["run", str(recipe), "--json"])
    assert done.exit_code == 0, done.output
    [found] = (folder / "runs").glob("*/run.json")
    return found.parent


def ready(fleet: Any) -> tuple[int, str]:
    deployments, stored = deploy(fleet, Limits(), lambda name: Meter())
    with TestClient(create_app(deployments, stored=stored)) as client:
        answer = client.get("/ready")
        return answer.status_code, answer.text


def test_a_runs_rows_come_out_equal_through_the_endpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (run, run / "package"):
        rows = stored_rows(place, 4)
        assert len(rows) == 4
        assert rows[0].row == {"input_string": "say 0 or 1"}
        assert rows[0].params == {"max_tokens": 8}
    fleet, _ = assemble([f"tiny={run}"], replay=4)
    assert ready(fleet)[0] == 200
    # Another model than was evaluated: as if its weights had been changed since.
    generate = Runtime.prompt_of
    monkeypatch.setattr(Runtime, "prompt_of", lambda self, row: generate(self, row)[:-1])
    status, text = ready(fleet)
    assert status == 503
    assert "differs from character" in text
    assert "say 0" not in text


def test_an_override_of_a_foundation_model_writes_nothing(
    run: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)  # which has nothing to do with what is served
    monkeypatch.setattr(deploying, "require_promotion", lambda *_: pytest.fail("asked of the current folder"))
    with pytest.raises(RecipeError, match=r"nothing to override .*remove it"):
        assemble(["ingot://nano"], override="Jane Doe: customer demo")


def test_a_runs_sentence_is_said_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.promoting import GRANTED, Clearance

    said = {run: "granted"}
    monkeypatch.setattr(deploying, "require_promotion", lambda place: Clearance(GRANTED, said.get(place, "granted")))
    assert [it.sentence for it in assemble([f"tiny={run}"])[1]] == ["granted"]
    said[run] = "granted anew"
    assert [it.sentence for it in assemble([f"tiny={run}"])[1]] == ["granted anew", "granted"]


def test_what_has_no_stored_answers(run: Path, text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match=r"--replay = 3: adapters have no stored answers"):
        assemble([str(run)], adapters=["letters=folder"], replay=3)
    with pytest.raises(ServeError, match=r"--replay = 3: .*holds no stored answers"):
        assemble([str(text_folder)], replay=3)
    assert assemble([str(text_folder)])[0].models[0].folder == text_folder


def test_a_package_elsewhere_answers_its_example_as_stored(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "elsewhere"
    shutil.copytree(run / "package", package)
    fleet, _ = assemble([f"tiny={package}"], replay=3)
    [row] = fleet.models[0].stored
    assert row.row == {"input_string": "say 0 or 1"}
    assert ready(fleet)[0] == 200
    read = Runtime.prompt_of
    monkeypatch.setattr(Runtime, "prompt_of", lambda self, row: read(self, row)[:-1])
    status, text = ready(fleet)
    assert (status, "row example: output_string differs" in text) == (503, True)
    (package / "verification.json").unlink()
    with pytest.raises(ServeError, match=r"--replay = 3: .*no answer to its example"):
        assemble([str(package)], replay=3)


def test_rows_that_are_gone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "choose", lambda rows, recipe: [])
    with pytest.raises(ServeError, match="not in its data any more"):
        stored_rows(run, 2)


def test_targets_of_a_registry_and_names(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(deploying, "fetched", lambda uri: asked.append(uri) or text_folder)
    fleet, _ = assemble(["chat=models:/chat/3"], adapters=["letters=folder"])
    assert asked == ["models:/chat/3"]
    assert (fleet.models[0].name, fleet.models[0].folder) == ("chat", text_folder)
    assert fleet.adapters == {"letters": Path("folder")}
    fleet, _ = assemble(endpoint="chat", versions=["blue=models:/chat@champion:9", "green=models:/chat/4:1"])
    assert asked[1:] == ["models:/chat@champion", "models:/chat/4"]
    assert fleet.weights is None


def test_a_files_decisions_are_kept_beside_it(text_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.yaml"
    path.write_text(yaml.safe_dump({"name": "chat", "versions": {"blue": {"target": str(text_folder), "weight": 1}}}))
    assert assemble(endpoint=str(path))[0].weights == tmp_path / "chat.state.json"
    assert assemble(endpoint=str(path), weights=tmp_path / "w.json")[0].weights == tmp_path / "w.json"


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({}, "name what to serve"),
        ({"versions": ["blue=a:1"]}, "--endpoint NAME"),
        ({"models": ["MODEL"], "adapters": ["folder"]}, "NAME=FOLDER"),
        ({"models": ["MODEL"], "adapters": ["a=b", "a=c"]}, "two adapters"),
        ({"endpoint": "none.yaml"}, "cannot be read"),
        ({"endpoint": "none.yaml", "versions": ["blue=a:1"]}, "leave out"),
    ],
)
def test_contradictions(text_folder: Path, options: dict[str, Any], fix: str) -> None:
    models = [str(text_folder) for _ in options.pop("models", ())]
    with pytest.raises(ServeError, match=fix):
        assemble(models, **options)


def test_one_override_serves_all_that_need_it(text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingot.promoting import NO_POLICY, OVERRIDDEN, Clearance, Override

    who = "Jane Doe: customer demo"

    def require(place: Path, override: str | None = None) -> Clearance:
        if place == text_folder:
            if override is not None:
                raise RecipeError("--override", override, "there is nothing to override")
            return Clearance(NO_POLICY, "")
        if override is None:
            raise NotPromoted(f"{place}: not promoted")
        return Clearance(OVERRIDDEN, "let pass", override=Override("Jane Doe", "customer demo", "", "", ""))

    monkeypatch.setattr(deploying, "require_promotion", require)
    monkeypatch.setattr(deploying, "named_models", lambda fleet: {})
    monkeypatch.setattr(deploying, "servable", lambda place: place)
    with pytest.raises(NotPromoted):
        assemble([text_folder, "a=new"])
    _, cleared = assemble([text_folder, "a=new"], override=who)
    assert [it.status for it in cleared] == [NO_POLICY, OVERRIDDEN]
    with pytest.raises(RecipeError, match="nothing to override"):
        assemble([text_folder], override=who)


def test_a_foundation_model_is_served_by_its_address() -> None:
    fleet, cleared = assemble(["ingot://nano", "base=ingot://nano"])
    assert [(it.name, (it.folder / "config.json").is_file()) for it in fleet.models] == [("nano", True), ("base", True)]
    assert cleared == []
    with pytest.raises(ModelError, match="ingot://nan"):
        assemble(["ingot://nan"])
    with pytest.raises(ServeError, match=r"--replay = 3: ingot://nano has no stored answers"):
        assemble(["ingot://nano"], replay=3)
    with pytest.raises(ModelError, match="use ingot://, hf://"):
        assemble(["http://127.0.0.1/v1#x"])
