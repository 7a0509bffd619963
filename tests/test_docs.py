"""What README, pages, help and setup.py say, held against the code."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import typer

from ingot import cli, errors
from ingot.errors import EXIT_CODES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
APP: Any = typer.main.get_command(cli.app)


def verbs(group: Any, name: str = "ingot") -> Iterator[tuple[str, Any]]:
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def shown() -> list[tuple[str, str]]:
    """Every command line of `ingot` in a page's shell blocks and in the help of a verb, with where it stands."""
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            found += [(page.name, part) for part in line.split(" && ")]
    for name, command in verbs(APP):
        found += [(f"{name} --help", part) for line in (command.help or "").splitlines() for part in line.split(" && ")]
    start = re.compile(r"^\s*(?:torchrun .*-m ingot|(?:\.venv/bin/)?ingot) (?=[a-z-])")
    return [(where, start.sub("", line)) for where, line in found if start.match(line)]


def test_every_command_that_is_shown_is_one() -> None:
    lines = shown()
    assert len(lines) > 80
    for where, line in lines:
        words, command = shlex.split(re.sub(r"\s#.*", "", line)), APP
        if "|" in words or ">" in words:
            words = words[: min(words.index(sign) for sign in "|>" if sign in words)]
        try:
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context(line, words)
        except Exception as error:  # typer keeps its classes of them to itself
            pytest.fail(f"{where}: ingot {line}: {error!r}")


def test_every_verb_has_examples_and_debug() -> None:
    for name, command in verbs(APP):
        assert re.search(rf"Examples?:\n\n.*{name}", command.help or "", re.DOTALL), name
        options = {option for parameter in command.params for option in parameter.opts}
        if name != "ingot schema":  # which prints JSON and has nothing to fail at
            assert "--debug" in options, name
        if name not in ("ingot schema", "ingot serve"):  # which gives answers over HTTP
            assert "--json" in options, name


def test_exit_codes_are_those_of_the_errors() -> None:
    classes = [found for found in vars(errors).values() if isinstance(found, type) and hasattr(found, "exit_code")]
    assert {found.exit_code for found in classes} | {0, 130} == set(EXIT_CODES)


def test_links_of_pages_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
            generated = target.startswith("reference/")  # by mkdocs
            assert generated or (page.parent / target).exists(), f"{page.name}: {target}"


def test_an_installed_ingot_has_all_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with patch("setuptools.setup") as setup:
        runpy.run_path("setup.py")
    for package, patterns in setup.call_args.kwargs["package_data"].items():
        folder = ROOT / {"ingot": "engine", "ingot_kernels": "kernels"}[package] / package
        shipped = {path for pattern in patterns for path in folder.glob(pattern)}
        there = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        assert there <= shipped, sorted(str(path.relative_to(ROOT)) for path in there - shipped)
