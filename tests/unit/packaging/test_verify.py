"""Verification: a package that needs more than it says, or answers otherwise, does not pass."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from every_task import packaged

from ingot.errors import PackageError
from ingot.model.runtime import Runtime
from ingot.packaging import bundle, verify
from ingot.packaging.clean_process import Hiding, closure
from ingot.packaging.verify import Near, verify_package

EXAMPLES = [{"input_string": "Hello!"}, {"input_string": "What is"}]


@pytest.fixture
def package(text_folder: Path, tmp_path: Path) -> Path:
    return packaged(text_folder, tmp_path / "package")


def _expected(package: Path) -> list[dict[str, Any]]:
    return Runtime.load(package / "model").answer(EXAMPLES)


def _with_line(package: Path, line: str) -> None:
    """Append `line` to the packaged runtime, as if the packager had copied it so."""
    [file] = package.glob("code/*/pyfunc_model.py")
    file.write_text(file.read_text() + line + "\n")
    (package / "manifest.json").unlink()
    bundle._write_manifest(package)


def test_a_good_package_passes_and_stays_as_it_was(package: Path) -> None:
    wanted = _expected(package)
    done = verify_package(package, EXAMPLES, wanted, example=EXAMPLES[1])
    assert done.answers == wanted
    assert done.answer == Runtime.load(package / "model").answer(EXAMPLES[1:])[0]
    assert done.examples == 2
    assert done.hidden_modules > 2
    assert done.seconds > 0
    assert json.loads(json.dumps(done.as_dict()))["examples"] == 2
    bundle.check_manifest(package)
    assert not list(package.rglob("__pycache__"))


def test_another_answer_is_shown_where_it_differs(package: Path) -> None:
    first, second = _expected(package)
    text = second["output_string"]
    other = {"output_string": text[:2] + "\N{SNOWMAN}" + text[3:]}
    with pytest.raises(PackageError, match=r"example 1 .*at output_string: from character 2 on"):
        verify_package(package, EXAMPLES, [first, other])


NAN, INF = float("nan"), float("inf")


def _answered(monkeypatch: pytest.MonkeyPatch, **response: Any) -> None:
    """Let the clean process have given this."""
    given = {"rows": [{}], "hidden": [], "answer": None} | response
    monkeypatch.setattr(verify, "_run", lambda *_: given)


@pytest.mark.parametrize(
    ("wanted", "got", "passes"),
    [
        ([-INF, 1.0, 2.0], [-INF, 1.0, 2.0], True),  # a token that must never come
        ([1.0, 2.0], [1.0, 2.1], True),
        ([1.0, 2.0], [1.0, 2.5], False),
        ([1.0, 2.0], [1.0, NAN], False),  # behind a number, where max() passes over it
        ([1.0, NAN], [1.0, NAN], False),
        ([1.0, 2.0], [1.0, INF], False),
        ([1.0, INF], [1.0, 2.0], False),
        ([1.0, INF], [9.0, INF], False),  # a size of infinity would hide any difference
    ],
)
def test_logits_that_are_no_numbers_do_not_pass(
    package: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[float], got: list[float], passes: bool
) -> None:
    _answered(monkeypatch, logits=[[0.5] * len(got), got], rows=[{}, {}])
    near = Near([[0.5] * len(wanted), wanted], 0.1)
    if passes:
        assert (verify_package(package, EXAMPLES, [{}, {}], near=near).difference or 0.0) <= 0.1
        return
    with pytest.raises(PackageError, match="logits are"):
        verify_package(package, EXAMPLES, [{}, {}], near=near)


@pytest.mark.parametrize(("wanted", "got", "passes"), [(0.5, NAN, False), (NAN, NAN, False), (INF, INF, True)])
def test_scores_that_are_no_numbers_do_not_pass(
    package: Path, monkeypatch: pytest.MonkeyPatch, wanted: float, got: float, passes: bool
) -> None:
    _answered(monkeypatch, rows=[{"score": got}])
    if passes:
        assert verify_package(package, EXAMPLES[:1], [{"score": wanted}]).examples == 1
        return
    with pytest.raises(PackageError, match=r"at score: expected .*, got nan"):
        verify_package(package, EXAMPLES[:1], [{"score": wanted}])


@pytest.mark.parametrize("module", ["ingot", "peft"])
def test_an_import_outside_the_requirements_fails(package: Path, module: str) -> None:
    __import__(module)  # it is installed here: only the hiding can make it fail
    _with_line(package, f"import {module}")
    with pytest.raises(PackageError, match=f"No module named '{module}'"):
        verify_package(package, EXAMPLES, [{}, {}])


def test_environment_variables_do_not_help_the_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", str(package))
    check = "import os, sys\nassert 'INGOT_SECRET' not in os.environ and not os.environ.get('PYTHONPATH')"
    _with_line(package, check + "\nassert os.environ['HF_HUB_OFFLINE'] == '1'")
    verify_package(package, EXAMPLES, _expected(package))


def test_a_package_that_hangs_is_ended(package: Path) -> None:
    _with_line(package, "import time\ntime.sleep(600)")
    with pytest.raises(PackageError, match=r"no answer within 0\.5 s"):
        verify_package(package, EXAMPLES, [{}, {}], timeout_s=0.5)


def test_a_changed_package_is_refused_before_it_runs(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(verify.subprocess, "run", never)
    (package / "README.md").write_text("other")
    with pytest.raises(PackageError, match=r"README\.md changed"):
        verify_package(package, EXAMPLES, [{}, {}])


@pytest.mark.parametrize(
    ("examples", "expected"),
    [([], []), (EXAMPLES, [{}]), ([{"input_string": "x"}, {"messages": []}], [{}, {}])],
)
def test_examples_and_answers_must_fit(package: Path, examples: list[Any], expected: list[Any]) -> None:
    with pytest.raises(PackageError, match="verification needs"):
        verify_package(package, examples, expected)


def test_closure_follows_requirements_of_requirements() -> None:
    found = closure(["transformers==0"])
    assert {"transformers", "tokenizers", "huggingface-hub", "pyyaml"} <= found
    assert not {"pytest", "ruff", "peft"} & found  # peft is an extra of transformers that nobody asked for


def test_a_hidden_module_looks_not_installed() -> None:
    code = (
        "import sys, importlib.util; sys.path[:0] = sys.argv[1:]\n"
        "from clean_process import hide_others\n"
        "hide_others(['transformers'])\n"
        "assert importlib.util.find_spec('pytest') is None\n"
        "assert importlib.util.find_spec('ingot') is None\n"
        "assert importlib.util.find_spec('yaml') is not None\n"
    )
    here = Path(verify.__file__).parent
    subprocess.run([sys.executable, "-I", "-c", code, str(here), str(here.parents[1])], check=True)
    assert Hiding(None, {"a"}).find_spec("a.b") is None
