"""`ingot serve`'s options and the recipe's `serve`: one source, and which of the two wins."""

import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from ingot.cli import app
from ingot.errors import RecipeError, ServeError
from ingot.recipe_io import load_recipe
from ingot.recipe_serve import Serve
from ingot.runfolder import create_run
from ingot.serve_command import serve
from ingot.serve_options import NAMES, port_of, settings
from ingot.serving.keys import add_key
from ingot.serving.server import Endpoint, Options, check_address

SAID = {"port": 9000, "max_rows": 8, "deadline": 20.0, "keys": "keys.json", "enabled": False}


@pytest.fixture
def run(tmp_path: Path, write_recipe: Callable[..., Path]) -> Path:
    """A run's folder, whose recipe says how it is served."""
    return create_run(load_recipe(write_recipe(tmp_path, serve=SAID)), tmp_path).folder


@pytest.mark.parametrize("of", ["{}", "{}/package", "{}/model", "letters={}"])
def test_a_runs_recipe_says_how_it_is_served(run: Path, of: str) -> None:
    section, told = settings([of.format(run)], {"deadline": None, "port": None})
    assert (section.port, section.max_rows, section.deadline, section.keys) == (9000, 8, 20.0, "keys.json")
    assert told == f"as the recipe of {run.name} says: port=9000, keys=keys.json, deadline=20.0, max_rows=8"
    assert section.max_waiting == Serve().max_waiting


def test_what_is_given_wins(run: Path) -> None:
    section, told = settings([str(run)], {"deadline": 5.0, "keys": Path("others.json"), "port": 0})
    assert (section.port, section.max_rows, section.deadline, section.keys) == (0, 8, 5.0, "others.json")
    assert told.endswith("says: max_rows=8")


def test_without_one_run_the_defaults_hold(run: Path, text_folder: Path) -> None:
    for models in ([str(text_folder)], [str(run), str(text_folder)], [], ["ingot://nano"]):
        assert settings(models, {"max_rows": 4}) == (Serve(max_rows=4), "")
    assert port_of(Serve()) == 8000
    assert port_of(Serve(port=0)) == 0


def test_the_command_line_has_every_setting_with_its_bounds() -> None:
    hints = typing.get_type_hints(serve, include_extras=True)
    schema = Serve.model_json_schema()["properties"]
    for name in NAMES:
        assert inspect.signature(serve).parameters[name].default is None
        [option] = hints[name].__metadata__ if hasattr(hints[name], "__metadata__") else [None]
        said = schema[name] | next((it for it in schema[name].get("anyOf", ()) if it["type"] != "null"), {})
        assert option.help == said["description"]
        low = said.get("minimum", said["exclusiveMinimum"] + 1 if "exclusiveMinimum" in said else None)
        assert (option.min, option.max) == (low, said.get("maximum")), name


def test_defaults_are_the_servers_own() -> None:
    assert Options.of(Serve()) == Options()
    options = Options.of(Serve(max_rows=3, max_tokens=9, body_timeout=2.5, keys="keys.json", drain=1.0), "secret")
    assert (options.limits.rows, options.limits.answer_tokens, options.body_s) == (3, 9, 2.5)
    assert (options.keys, options.drain_s, options.admin_key) == (Path("keys.json"), 1.0, "secret")


@pytest.mark.parametrize(("field", "value"), [("max_rows", 0), ("port", 70000), ("log_format", "xml"), ("max_row", 3)])
def test_wrong_settings_of_a_recipe(tmp_path: Path, write_recipe: Callable[..., Path], field: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"serve\.{field}"):
        load_recipe(write_recipe(tmp_path, serve={field: value}))


def test_the_question_of_a_run_passes_the_same_rules(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INGOT_API_KEY", raising=False)
    keys = tmp_path / "keys.json"
    with pytest.raises(ServeError, match="no such file"):
        check_address(Serve(keys=str(keys)))
    add_key(keys, "ann")
    check_address(Serve(keys=str(keys), host="0.0.0.0"))
    options = Options.of(Serve(keys=str(keys), max_tokens=3))
    with Endpoint(text_folder, options=options) as endpoint:
        assert endpoint.ask("Hello!")  # nothing tells the key of the file
        with pytest.raises(ServeError, match="400: 4 new tokens"):
            endpoint.ask("Hello!", max_tokens=4)
        assert httpx.get(f"{endpoint.url}/v1/models", trust_env=False).status_code == 401


def test_the_port_of_a_recipe_is_taken(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.chdir(tmp_path)
    add_key(tmp_path / "keys.json", "ann")
    monkeypatch.setattr("ingot.verbs.serve", lambda *given, **named: found.append(named))
    done = CliRunner().invoke(app, ["serve", str(run), "--no-supervise", "--max-body", "2048"])
    assert done.exit_code == 0, done.output
    assert found[0]["port"] == 9000
    assert found[0]["options"] == Options.of(Serve(**SAID, max_body=2048))
    assert "port=9000" in done.stdout
