"""The form for llama.cpp: asked of its converter, which is a program here, and never taken at its word."""

import struct
from pathlib import Path

import pytest

from ingot.errors import PackageError
from ingot.packaging import gguf

WRITES = """import sys, struct
out = sys.argv[sys.argv.index("--outfile") + 1]
assert sys.argv[sys.argv.index("--outtype") + 1] == "q8_0"
open(out, "wb").write({content})
"""


def _converter(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text(WRITES.format(content=content))
    monkeypatch.setenv(gguf.VARIABLE, str(script))


def test_without_a_converter_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PackageError, match=r"pip install gguf.*INGOT_GGUF_CONVERTER"):
        gguf.find_converter()
    monkeypatch.setenv(gguf.VARIABLE, "nowhere.py")
    with pytest.raises(PackageError, match=r"nowhere\.py is no file"):
        gguf.find_converter()


def test_the_converter_is_asked_for_the_recipe_s_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _converter(tmp_path, 'b"GGUF" + struct.pack("<IQQ", 3, 12, 20)', monkeypatch)
    made = gguf.convert(tmp_path, tmp_path / "out", "q8_0")
    assert made == tmp_path / "out" / "model.gguf"
    assert gguf.check_gguf(made) == 12


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('b"PK"', "no GGUF file"),
        ('b"GGUF" + struct.pack("<IQQ", 3, 0, 0)', "no tensor"),
        ('sys.exit("unknown architecture")', "unknown architecture"),
    ],
)
def test_what_it_made_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str) -> None:
    _converter(tmp_path, content, monkeypatch)
    with pytest.raises(PackageError, match=says):
        gguf.convert(tmp_path, tmp_path / "out", "q8_0")


def test_a_header_is_read_as_the_format_says(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 291, 24) + b"more")
    assert gguf.check_gguf(tmp_path / "x") == 291
