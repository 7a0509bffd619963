"""Keys: shown once, kept as hashes, compared without telling by time, read again when the file changes."""

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ingot.cli import app
from ingot.errors import ServeError
from ingot.serving import keys as keys_module
from ingot.serving.keys import Keyring, add_key, read_keys, remove_key


def test_the_file_holds_hashes_only(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secret = add_key(path, "ann", requests_per_minute=6)
    other = add_key(path, "bob")
    assert secret != other
    assert len(secret) > 40
    text = path.read_text()
    assert secret not in text
    assert secret.removeprefix("ingot-") not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [(key.name, key.requests_per_minute, key.tokens_per_minute) for key in read_keys(path)] == [
        ("ann", 6, None),
        ("bob", None, None),
    ]
    assert [one.name for one in tmp_path.iterdir()] == ["keys.json"]


def test_a_key_is_found_by_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    secret, other = add_key(path, "ann"), add_key(path, "bob")
    compared = []
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    ring = Keyring(path, "from-the-environment")
    for sent, name in ((secret, "ann"), (other, "bob"), ("from-the-environment", "environment")):
        compared.clear()
        found = ring.find(sent.encode())
        assert found is not None
        assert found.name == name
        assert len(compared) == 3
    for sent in ("", "x", secret[:-1], hashlib.sha256(secret.encode()).hexdigest()):
        assert ring.find(sent.encode()) is None
    assert not ring.open
    assert Keyring().open


def test_a_removed_key_is_refused_by_a_running_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LOOK_S", 0.0)
    path = tmp_path / "keys.json"
    secret = add_key(path, "ann")
    ring = Keyring(path)
    assert ring.find(secret.encode())
    late = add_key(path, "bob")
    assert ring.find(late.encode())
    remove_key(path, "ann")
    assert ring.find(secret.encode()) is None
    path.write_text("{")
    assert ring.find(late.encode()) is None
    path.unlink()
    assert ring.find(late.encode()) is None


def test_a_file_that_comes_back_or_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LOOK_S", 0.0)
    path, aside = tmp_path / "keys.json", tmp_path / "aside.json"
    ann, bob = add_key(path, "ann"), add_key(path, "bob")
    ring = Keyring(path)
    path.rename(aside)
    assert ring.find(ann.encode()) is None
    aside.rename(path)
    assert ring.find(ann.encode())
    read = keys_module.read_keys

    def slow(file: Path) -> list[keys_module.Key]:
        found = read(file)
        if any(key.name == "ann" for key in found):
            monkeypatch.setattr(keys_module, "read_keys", read)
            remove_key(file, "ann")
        return found

    monkeypatch.setattr(keys_module, "read_keys", slow)
    ring = Keyring(path)
    assert ring.find(ann.encode()) is None
    assert ring.find(bob.encode())


@pytest.mark.parametrize(
    "fault", [{"sha256": None}, {"sha256": "é" * 64}, {"name": "a b"}, {"requests_per_minute": "9"}]
)
def test_a_key_of_wrong_kinds_is_refused(tmp_path: Path, fault: dict[str, Any]) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "ann")
    [key] = json.loads(path.read_text())["keys"]
    path.write_text(json.dumps({"keys": [key | fault]}))
    with pytest.raises(ServeError, match="not a file of keys"):
        keys_module.read_keys(path)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(ServeError, match="ingot keys add"):
        Keyring(path)
    add_key(path, "ann")
    with pytest.raises(ServeError, match="has a key of this name"):
        add_key(path, "ann")
    with pytest.raises(ServeError, match="letters, digits"):
        add_key(path, "a b")
    with pytest.raises(ServeError, match="it has ann"):
        remove_key(path, "bob")
    path.write_text("[]")
    with pytest.raises(ServeError, match="not a file of keys"):
        read_keys(path)


def test_the_verb(tmp_path: Path) -> None:
    file = ["--file", str(tmp_path / "k.json")]
    runner = CliRunner()
    made = json.loads(runner.invoke(app, ["keys", "add", "ann", "--tokens-per-minute", "9", "--json", *file]).stdout)
    assert Keyring(tmp_path / "k.json").find(made["key"].encode())
    listed = runner.invoke(app, ["keys", "list", "--json", *file]).stdout
    assert json.loads(listed)[0] | {"created": ""} == {
        "name": "ann",
        "created": "",
        "requests_per_minute": None,
        "tokens_per_minute": 9,
    }
    assert made["key"] not in listed
    assert runner.invoke(app, ["keys", "remove", "ann", *file]).exit_code == 0
    assert read_keys(tmp_path / "k.json") == []
    assert runner.invoke(app, ["keys", "remove", "ann", *file]).exit_code == 2
