"""The package: complete, pinned, without code that runs on its own, and never half written."""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from every_task import packaged

from ingot.errors import PackageError
from ingot.packaging import bundle, environment
from ingot.packaging.bundle import check_manifest

EXAMPLE = {"input_string": "Hello!"}


def _package(folder: Path, out: Path, **changes: Any) -> Path:
    wanted = {"metadata": {"base_model": "org/base", "steps": 3}, "license": "apache-2.0"}
    return packaged(folder, out, **(wanted | changes))


def test_every_file_is_there_and_in_the_manifest(text_folder: Path, tmp_path: Path) -> None:
    out = _package(text_folder, tmp_path / "out" / "package")
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    [code] = (out / "code").iterdir()
    for file in code.glob("*.py"):
        assert not re.search(r"^\s*(from|import) ingot\b", file.read_text(), re.MULTILINE), file.name
    top = {"MLmodel", "README.md", "conda.yaml", "python_env.yaml", "requirements.txt", "manifest.json"}
    assert files >= top | {"input_example.json", "serving_input_example.json"}
    assert {path.name for path in code.iterdir()} == {
        "__init__.py",
        "pyfunc_model.py",
        *(f"{name}.py" for name in bundle.RUNTIME),
    }
    assert {p.name for p in (out / "model").iterdir()} == {p.name for p in text_folder.iterdir()}
    listed = json.loads((out / "manifest.json").read_text())["sha256"]
    assert set(listed) == files - {"manifest.json"}
    assert listed["MLmodel"] == hashlib.sha256((out / "MLmodel").read_bytes()).hexdigest()
    assert not list(out.parent.glob(".*"))


def test_weights_are_linked_not_copied(text_folder: Path, tmp_path: Path) -> None:
    out = _package(text_folder, tmp_path / "package")
    assert (out / "model/model.safetensors").samefile(text_folder / "model.safetensors")
    # The packager's own facts must not be written through a link into the training run's folder.
    assert not (out / "model/ingot.json").samefile(text_folder / "ingot.json")
    assert "example" not in json.loads((text_folder / "ingot.json").read_text())


def test_weights_are_copied_where_links_fail(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    out = _package(text_folder, tmp_path / "package")
    weights = out / "model/model.safetensors"
    assert not weights.samefile(text_folder / "model.safetensors")
    assert weights.read_bytes() == (text_folder / "model.safetensors").read_bytes()


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def new_file(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file under the umask that is set."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_every_file_can_be_read_by_whoever_reads_new_files(text_folder: Path, tmp_path: Path, new_file: int) -> None:
    weights = text_folder / "model.safetensors"
    weights.chmod(0o600)  # as safetensors creates files
    for file in {*text_folder.iterdir()} - {weights}:
        file.chmod(new_file)
    out = _package(text_folder, tmp_path / "package")
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o444 != new_file & 0o444} == {}
    assert not list(out.rglob(".mode"))
    assert (out / "model/model.safetensors").samefile(weights)


def test_a_file_whose_mode_is_anothers_is_left(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text_folder / "model.safetensors").chmod(0o600)
    real = Path.chmod

    def refused(self: Path, mode: int) -> None:
        if self.suffix == ".safetensors":
            raise PermissionError(1, "Operation not permitted")
        real(self, mode)

    monkeypatch.setattr(Path, "chmod", refused)
    check_manifest(_package(text_folder, tmp_path / "package"))


def test_mlmodel_holds_signature_example_and_metadata(chat_folder: Path, tmp_path: Path) -> None:
    from mlflow.models import Model

    out = _package(chat_folder, tmp_path / "package", task="chat-completion")
    model = Model.load(str(out))
    assert [(c.name, c.type.name, c.required) for c in model.signature.inputs] == [
        ("input_string", "string", False),
        ("messages", "string", False),
    ]
    assert [c.name for c in model.signature.outputs] == ["output_string"]
    assert {p.name for p in model.signature.params} == {"max_tokens", "temperature", "top_p", "stop", "seed"}
    assert model.load_input_example(str(out)).to_dict("records") == [EXAMPLE]
    assert model.metadata["base_model"] == "org/base"
    assert (model.metadata["task"], model.metadata["name"], model.metadata["license"]) == (
        "chat-completion",
        "tiny",
        "apache-2.0",
    )
    flavor = model.flavors["python_function"]
    assert (flavor["data"], flavor["code"]) == ("model", "code")
    assert "python_model" not in flavor


def test_classifier_signature(mean_folder: Path, tmp_path: Path) -> None:
    from mlflow.models import Model

    out = _package(mean_folder, tmp_path / "package", task="text-classification", example_input={"text": "Hello!"})
    signature = Model.load(str(out)).signature
    assert [c.name for c in signature.inputs] == ["text"]
    assert [c.name for c in signature.outputs] == ["label", "probability"]
    assert [(p.name, p.default) for p in signature.params] == [("top_k", 1)]


def test_requirements_are_pinned_without_local_suffix(text_folder: Path, tmp_path: Path) -> None:
    out = _package(text_folder, tmp_path / "package")
    pins = (out / "requirements.txt").read_text().split()
    assert {pin.split("==")[0] for pin in pins} == set(bundle.REQUIREMENTS)
    assert not [pin for pin in pins if "+" in pin]
    assert f"torch=={importlib.metadata.version('torch').split('+')[0]}" in pins
    conda = yaml.safe_load((out / "conda.yaml").read_text())["dependencies"][-1]["pip"]
    # Azure's server wants a pydantic of its own, so only that one is left open.
    open_there = {"pydantic>=2.8,<3", *environment.AZURE_HOSTING}
    assert set(conda) == {pin for pin in pins if not pin.startswith("pydantic")} | open_there


def test_nothing_names_this_machine(text_folder: Path, tmp_path: Path) -> None:
    out = _package(text_folder, tmp_path / "package")
    for path in out.rglob("*"):
        if path.is_file():
            assert str(tmp_path).encode() not in path.read_bytes(), path


def test_the_card_says_what_it_is(text_folder: Path, tmp_path: Path) -> None:
    card = (_package(text_folder, tmp_path / "package") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "org/base"
    assert front["pipeline_tag"] == "text-generation"
    assert '{"dataframe_records": [{"input_string": "Hello!"}]}' in card


@pytest.mark.parametrize(
    ("example", "column"),
    [
        ([{"role": "user", "content": "Hi"}], {"input_string": "Hi"}),
        (
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
            {"messages": '[{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]'},
        ),
    ],
)
def test_a_chat_example_becomes_one_string_column(
    chat_folder: Path, tmp_path: Path, example: Any, column: dict[str, str]
) -> None:
    out = _package(chat_folder, tmp_path / "package", task="chat-completion", example_input={"messages": example})
    split = json.loads((out / "input_example.json").read_text())
    assert split == {"columns": list(column), "data": [list(column.values())]}
    assert json.loads((out / "serving_input_example.json").read_text()) == {"dataframe_split": split}


def test_an_earlier_package_is_replaced(text_folder: Path, tmp_path: Path) -> None:
    out = _package(text_folder, tmp_path / "package", name="first")
    (out / "left over").write_text("x")
    _package(text_folder, out, name="second")
    assert "# second" in (out / "README.md").read_text()
    assert not (out / "left over").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"text", "package"}


@pytest.mark.parametrize("step", ["_write_mlmodel", "_write_manifest"])
def test_a_failure_leaves_the_earlier_package_whole(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = _package(text_folder, tmp_path / "package")

    def fail(*_: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(bundle, step, fail)
    with pytest.raises(OSError, match="no space"):
        _package(text_folder, out, name="second")
    check_manifest(out)
    assert "# tiny" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"text", "package"}


def test_a_failed_rename_puts_the_earlier_package_back(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = _package(text_folder, tmp_path / "package")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if "building" in Path(source).name:
            raise OSError(5, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="input/output"):
        _package(text_folder, out, name="second")
    check_manifest(out)
    assert "# tiny" in (out / "README.md").read_text()


def test_a_folder_that_is_no_package_is_left_alone(text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(PackageError, match="left alone"):
        _package(text_folder, out)
    assert (out / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_an_incomplete_model_is_refused(text_folder: Path, tmp_path: Path, missing: str) -> None:
    (text_folder / missing).unlink()
    with pytest.raises(PackageError, match=missing.replace(".", r"\.")):
        _package(text_folder, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_missing_shard_is_refused(text_folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (text_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PackageError, match="model-00002-of-00002"):
        _package(text_folder, tmp_path / "package")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "sub/scaler.pkl", "modeling_own.py"])
def test_files_that_could_run_code_are_refused(text_folder: Path, tmp_path: Path, name: str) -> None:
    (text_folder / name).parent.mkdir(exist_ok=True)
    (text_folder / name).write_bytes(b"x")
    with pytest.raises(PackageError, match=name):
        _package(text_folder, tmp_path / "package")


def test_a_chat_model_needs_a_template(text_folder: Path, tmp_path: Path) -> None:
    (text_folder / "ingot.json").unlink()
    with pytest.raises(PackageError, match=r"model\.chat_template"):
        _package(text_folder, tmp_path / "package", task="chat-completion")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "translation"}, "translation"),
        ({"task": "language-modeling"}, "says task 'text-generation'"),
        ({"example_input": {"question": "x"}}, "input_string"),
        ({"example_input": {"input_string": "x", "more": "y"}}, "input_string"),
        ({"example_input": {"input_string": 3}}, "valid string"),
    ],
)
def test_contradictions_are_refused(text_folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        _package(text_folder, tmp_path / "package", **changes)


def test_a_changed_file_is_found(text_folder: Path, tmp_path: Path) -> None:
    out = _package(text_folder, tmp_path / "package")
    check_manifest(out)
    (out / "model/ingot.json").write_text("{}")
    with pytest.raises(PackageError, match=r"model/ingot\.json changed"):
        check_manifest(out)
    (out / "model/ingot.json").unlink()
    with pytest.raises(PackageError, match="is missing"):
        check_manifest(out)
    with pytest.raises(PackageError, match="not a package"):
        check_manifest(tmp_path)
