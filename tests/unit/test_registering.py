"""The registry: what a version says, which alias its verdict allows, and that no byte is written twice."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot import registering, verbs
from ingot.cli import app
from ingot.conformance.case import Case
from ingot.conformance.processes import free_port, server
from ingot.errors import IngotError, ModelError, NotPromoted, PackageError, RecipeError
from ingot.packaging import bundle, versions
from ingot.packaging.bundle import Origin, add_file, check_manifest, package_model
from ingot.packaging.registry import fetched, store_uri
from ingot.packaging.versions import Registry
from ingot.recipe_io import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # of mlflow, about its own databases
GRANTED = {"status": "granted", "granted": True, "sentence": "The policy is met.", "verdict": "abc", "model": "m"}
REFUSED = GRANTED | {"status": "refused", "granted": False, "sentence": "It is worse."}
WHO = "Jane Doe: customer demo, ticket 123"


@pytest.fixture
def registry(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of runs in the working folder, where nothing is named."""
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    shutil.copy(empty_store, "runs/mlflow.db")
    return registering.open_registry()


@pytest.fixture
def package(text_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(folder: str = "package", form: str = "merged", **metadata: Any) -> Path:
        return package_model(
            text_folder,
            tmp_path / folder,
            name="tiny",
            task="text-generation",
            example_input={"input_string": "Hello!"},
            metadata=metadata,
            license=None,
            origin=Origin(form=form),
        )

    return make


def change(path: Path) -> None:
    """Write to a file as an editor does: what shares its bytes changes too."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_version_says_what_its_package_says(registry: Registry, package: Callable[..., Path]) -> None:
    place = package(promotion=GRANTED, lineage="line-1", form="merged")
    made, copied = registering.register(registry, place)
    assert (made.uri, copied) == ("models:/tiny/1", 0)
    plain = json.loads(json.dumps(made.as_dict()))
    assert (plain["task"], plain["form"], plain["lineage"]) == ("text-generation", "merged", "line-1")
    assert plain["promotion"] == {"status": "granted", "sentence": "The policy is met.", "verdict": "abc"}
    assert plain["manifest"] == versions.manifest_digest(place)


def test_metrics_are_those_of_the_package(registry: Registry, package: Callable[..., Path]) -> None:
    place = package()
    score = {"value": 0.8123, "interval": [0.79, None], "n": 300}
    measured = {"metrics": {"tuned": {"recall@1": score}}, "tasks": {"letters": {"metrics": {"tuned": {"f1": score}}}}}
    add_file(place, "evaluation.json", measured)
    made, _ = registering.register(registry, place)
    text = "0.8123 [0.79, ?] on 300 rows"
    assert made.as_dict()["metrics"] == {"test.recall:1": text, "letters.f1": text}


def test_files_are_links_and_the_same_files_are_the_same_version(
    registry: Registry, package: Callable[..., Path]
) -> None:
    place = package()
    first, _ = registering.register(registry, place)
    stored = fetched(first.uri)
    assert stored != place
    weights = "model/model.safetensors"
    assert (stored / weights).samefile(place / weights)
    check_manifest(stored)
    again, copied = registering.register(registry, place)
    assert (again.version, copied) == (1, 0)
    shutil.rmtree(place)  # a run's folder may go: the registry's files stay
    check_manifest(stored)
    out, copied = registering.fetch(registry, "tiny", Path("copy"))
    assert (out / weights).samefile(stored / weights) and copied == 0
    with pytest.raises(PackageError, match="exists"):
        registering.fetch(registry, "tiny", Path("copy"))


def test_an_alias_moves_with_the_promotion(registry: Registry, package: Callable[..., Path]) -> None:
    registering.register(registry, package("one", promotion=GRANTED, n=1))
    second, _ = registering.register(registry, package("two", promotion=GRANTED, n=2), alias="champion")
    assert (second.version, second.aliases) == (2, ("champion",))
    registering.promote(registry, "tiny/1", "champion")
    assert [it.aliases for it in registry.versions("tiny")] == [(), ("champion",)]
    assert registering.find(registry, "models:/tiny@champion").version == 1
    assert json.loads((fetched("models:/tiny@champion") / "manifest.json").read_text())["sha256"]
    assert registering.demote(registry, "tiny", "champion").version == 1
    with pytest.raises(IngotError, match="no version or alias 'champion'"):
        registering.find(registry, "tiny@champion")


@pytest.mark.parametrize("alias", ["bad alias", "latest", "Latest", "v1", "", "a/b", "a\n", "\u017fo"])
def test_an_alias_of_another_form_is_refused_before_anything_is_written(
    registry: Registry, package: Callable[..., Path], alias: str
) -> None:
    place = package()
    for n_versions in (0, 1):
        with pytest.raises(RecipeError, match=r"--alias .*write letters, digits, _ and -"):
            registering.register(registry, place, alias=alias, override=WHO)
        assert len(registry.versions("tiny")) == n_versions
        assert not (place / "overrides.jsonl").exists()
        made, _ = registering.register(registry, place)
        with pytest.raises(RecipeError, match=r"--alias .*write letters, digits, _ and -"):
            registering.promote(registry, "tiny", alias, WHO)
        assert not (fetched(made.uri) / "overrides.jsonl").exists()


def test_a_place_within_a_file_is_one_line(registry: Registry, package: Callable[..., Path]) -> None:
    registering.register(registry, package())
    Path("file").touch()
    for inside in ("file/inside", "file/deeper/inside"):
        refused = CliRunner().invoke(app, ["models", "fetch", "tiny", inside])
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
        assert f"OUT = '{inside}': cannot be made" in refused.stderr


@pytest.mark.parametrize("stamp", [None, REFUSED])
def test_without_a_granted_verdict_no_alias(
    registry: Registry, package: Callable[..., Path], stamp: dict[str, Any] | None
) -> None:
    metadata = {} if stamp is None else {"promotion": stamp}
    place = package(**metadata)
    with pytest.raises(NotPromoted):
        registering.register(registry, place, alias="champion")
    assert registry.names() == []
    registering.register(registry, place)
    with pytest.raises(NotPromoted) as caught:
        registering.promote(registry, "tiny", "champion")
    assert caught.value.exit_code == 3
    assert registry.version("tiny").aliases == ()
    with pytest.raises(RecipeError, match="Jane Doe: customer demo"):
        registering.promote(registry, "tiny", "champion", "whoever")
    made = registering.promote(registry, "tiny", "champion", WHO)
    assert made.aliases == ("champion",)
    assert json.loads(made.tags[versions.OVERRIDE])["name"] == "Jane Doe"
    assert made.tags["ingot.alias.champion"] == "overridden"
    [line] = (fetched(made.uri) / "overrides.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "customer demo, ticket 123"
    assert not (place / "overrides.jsonl").exists()


def test_the_newest_has_three_names_everywhere(registry: Registry, package: Callable[..., Path]) -> None:
    registering.register(registry, package("one", n=1))
    registering.register(registry, package("two", n=2))
    second = fetched("models:/tiny/2")
    for name in ("tiny", "tiny/latest"):
        assert registering.find(registry, name).version == 2
        assert registering.find(registry, f"models:/{name}").version == 2
        assert fetched(f"models:/{name}") == second
    for wrong in ("models:/tiny/Production", "tiny/", "tiny@", "", "models:/", "tiny/1@champion", "it's/1"):
        with pytest.raises(RecipeError, match="NAME/VERSION"):
            registering.find(registry, wrong)
        with pytest.raises(RecipeError, match="NAME/VERSION"):
            fetched(wrong)


def test_more_models_than_a_page_and_models_without_versions(registry: Registry, package: Callable[..., Path]) -> None:
    for number in range(101):  # MLflow's pages hold 100
        registry._client.create_registered_model(f"empty-{number:03}")
    registering.register(registry, package())
    assert len(registry.names()) == 102
    assert [it.uri for it in registry.newest()] == ["models:/tiny/1"]
    assert [it["name"] for it in json.loads(ingot("list", "--json").stdout)] == ["tiny"]
    with pytest.raises(ModelError, match=r"empty-007.*has no version"):
        registering.find(registry, "empty-007")
    with pytest.raises(ModelError, match="no version of 'empty-007'"):
        fetched("models:/empty-007/latest")


def test_a_run_of_another_store_is_not_named(registry: Registry, package: Callable[..., Path]) -> None:
    run_id = registry._client.create_run("0").info.run_id
    for number, (given, kept) in enumerate([(run_id, run_id), ("0" * 32, ""), (None, "")], 1):
        made, _ = registry.register(package(f"package-{number}", n=number), "tiny", {}, given)
        assert (registry._client.get_model_version("tiny", str(made.version)).run_id or "") == kept


def test_an_override_that_overrides_nothing_is_refused(registry: Registry, package: Callable[..., Path]) -> None:
    place = package(promotion=GRANTED)
    with pytest.raises(RecipeError, match="nothing to override"):
        registering.register(registry, place, alias="champion", override=WHO)
    with pytest.raises(RecipeError, match="only an alias"):
        registering.register(registry, place, override=WHO)


def test_files_that_changed_after_registration_get_no_alias(registry: Registry, package: Callable[..., Path]) -> None:
    made, _ = registering.register(registry, package(promotion=GRANTED))
    stored = fetched(made.uri)
    change(stored / "model" / "model.safetensors")
    with pytest.raises(NotPromoted, match=r"model\.safetensors changed"):
        registering.promote(registry, "tiny", "champion")
    (stored / "manifest.json").unlink()
    bundle._write_manifest(stored)  # whole again, but another package
    with pytest.raises(NotPromoted, match="another package"):
        registering.promote(registry, "tiny", "champion")
    assert registry.version("tiny").aliases == ()


def test_a_changed_package_is_not_registered(registry: Registry, package: Callable[..., Path]) -> None:
    place = package()
    change(place / "README.md")
    with pytest.raises(PackageError, match=r"README\.md changed"):
        registering.register(registry, place)
    assert registry.names() == []


def test_forms_of_one_lineage_are_shown_together(registry: Registry, package: Callable[..., Path]) -> None:
    for form in ("merged", "quantized"):
        registering.register(registry, package(form, lineage="line-1", form=form), name=f"tiny-{form}")
    other, _ = registering.register(registry, package("other", lineage="line-2"), name="other")
    merged = registering.find(registry, "tiny-merged")
    assert [(it.name, it.tags[versions.FORM]) for it in registering.family(registry, merged)] == [
        ("tiny-merged", "merged"),
        ("tiny-quantized", "quantized"),
    ]
    assert registering.family(registry, other) == [other]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "it's", "-x"])
def test_names_that_leave_the_folder_are_refused(
    registry: Registry, package: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    if name == "":
        with pytest.raises(RecipeError, match="NAME/VERSION"):
            registering.find(registry, "tiny/x")
        return
    with pytest.raises(RecipeError, match="--name"):
        registering.register(registry, package(), name=name)


def test_what_is_not_there_is_named(registry: Registry, package: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(IngotError, match=r"no model 'tiny'; it has: none"):
        registering.find(registry, "tiny")
    registering.register(registry, package())
    with pytest.raises(IngotError, match=r"no version or alias 7; it has 1"):
        registering.find(registry, "tiny/7")
    with pytest.raises(ModelError, match="models:/nope/1"):
        fetched("models:/nope/1")
    with pytest.raises(ModelError, match="no MLmodel"):
        registering.register(registry, tmp_path)


def test_the_store_is_the_environments_else_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking")
    assert store_uri(tmp_path) == "http://tracking"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry")
    assert store_uri(tmp_path) == "http://registry"
    assert store_uri(tmp_path, given="http://given") == "http://given"


def test_a_store_that_does_not_answer_is_one_line_without_its_password(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text("no database")
    with pytest.raises(IngotError) as caught:
        Registry(f"sqlite:///{tmp_path}/broken.db").names()
    assert "broken.db" in str(caught.value) and "\n" not in str(caught.value)


def ingot(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["models", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_verbs(registry: Registry, package: Callable[..., Path]) -> None:
    place = package(promotion=GRANTED, lineage="line-1")
    assert "models:/support/1 (no byte copied)" in ingot("register", place, "--name", "support").stdout
    assert ingot("promote", "support", "--alias", "champion").exit_code == 0
    [listed] = json.loads(ingot("list", "--json").stdout)
    assert listed["aliases"] == ["champion"]
    assert "@champion" in ingot("list", "support").stdout
    shown = ingot("show", "support@champion").stdout
    assert "granted" in shown and "line-1" in shown
    assert json.loads(ingot("show", "support/1", "--json").stdout)["lineage_versions"][0]["version"] == 1
    assert ingot("fetch", "support", "out").exit_code == 0
    assert ingot("demote", "support", "--alias", "champion").exit_code == 0
    assert json.loads(ingot("list", "support", "--json").stdout)[0]["aliases"] == []
    for arguments in (
        ("list", "nope"),
        ("show", "nope/1"),
        ("fetch", "nope@x", "new"),
        ("demote", "nope", "--alias", "x"),
    ):
        refused = ingot(*arguments)
        assert refused.exit_code == 2 and "it has: support" in refused.stderr
    assert ingot("promote", "support/7", "--alias", "champion").exit_code == 2
    refused = ingot("register", "nowhere")
    assert refused.exit_code == 2 and "PACKAGE = " in refused.stderr and "no MLmodel" in refused.stderr


def test_promotion_without_a_verdict_exits_3(registry: Registry, package: Callable[..., Path]) -> None:
    ingot("register", package())
    refused = ingot("promote", "tiny", "--alias", "champion")
    assert refused.exit_code == 3
    assert "no promotion policy" in refused.stderr and "--override" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


EVALUATE = {
    "base": False,
    "promotion": {"rules": [{"metric": "exact_match", "min_rows": 6, "require": "at_least", "value": 0}]},
}


def test_a_run_registers_its_package(registry: Registry, tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    package = {"registered_model": "support", "alias": "champion"}
    recipe = load_recipe(write_recipe(tmp_path, evaluate=EVALUATE, package=package))
    done = verbs.run(recipe, home=tmp_path)
    assert done["stages"]["register"]["models"] == ["models:/support/1"]
    assert done["stages"]["register"]["copied_bytes"] == 0
    made = registering.find(registry, "support@champion")
    assert made.tags[versions.PROMOTION] == "granted"
    assert made.lineage and "exact_match" in str(made.as_dict()["metrics"])
    verbs.run(recipe, home=tmp_path, resume=Path(done["paths"]["run"]))
    assert len(registry.versions("support")) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"package": {"registered_model": "a/b"}}, "registered_model"),
        ({"package": {"registered_model": "a", "enabled": False}}, "package.enabled"),
        ({"package": {"alias": "champion"}}, "set package.registered_model"),
        ({"package": {"registered_model": "a", "alias": "champion"}, "evaluate": {}}, "set evaluate.promotion"),
        (
            {"package": {"registered_model": "a", "alias": "latest"}},
            "package.alias = latest is a name that MLflow keeps",
        ),
        ({"package": {"registered_model": "a", "alias": "V2"}}, "package.alias = V2 is a name that MLflow keeps"),
    ],
)
def test_recipes_that_could_not_register_are_refused(
    tmp_path: Path, write_recipe: Callable[..., Path], change: dict[str, Any], said: str
) -> None:
    recipe = write_recipe(tmp_path, **({"evaluate": EVALUATE} | change))
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe)


@pytest.mark.slow
def test_a_store_elsewhere_gets_the_files(package: Callable[..., Path], tmp_path: Path, empty_store: Path) -> None:
    """A tracking server on loopback that proxies artifacts, as teams have it."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    flags = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", f"{tmp_path}/files"]
    command = [sys.executable, "-m", "mlflow", "server", *flags, "--host", "127.0.0.1", "--port", str(port)]
    case = Case(tmp_path, "", [], [], tmp_path)
    with server(case, "mlflow-server", [*command, "--workers", "1"], f"{uri}/health"):
        registry = registering.open_registry(uri)
        place = package(promotion=GRANTED)
        _, copied = registering.register(registry, place)
        assert copied > 1_000
        assert registering.promote(registry, "tiny", "champion").aliases == ("champion",)
        out, _ = registering.fetch(registry, "tiny@champion", tmp_path / "out")
        check_manifest(out)
        assert versions.manifest_digest(out) == versions.manifest_digest(place)
        made, _ = registry.register(package("another", n=2), "tiny", {}, "0" * 32)  # tracked by another store
        assert fetched(made.uri, uri).is_dir()
