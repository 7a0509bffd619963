"""Progress: lines in a log, silence when asked for."""

import io

import pytest

from ingot.progress import LINES_PER_STAGE, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_a_tenth() -> None:
    log = io.StringIO()
    with Progress(file=log).stage("finetune", total=1000, unit="steps") as bar:
        for _ in range(1000):
            bar.advance(1, loss=0.5)
    lines = log.getvalue().splitlines()
    assert len(lines) == LINES_PER_STAGE + 2
    assert lines[0] == "finetune: 1000 steps"
    assert lines[5].startswith("finetune  500/1000 steps  ")
    assert "loss 0.5" in lines[5]
    assert "s left" in lines[5]
    assert lines[-1].startswith("finetune: done in ")


def test_quiet_counts_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True).stage("finetune", total=10, unit="steps") as bar:
        bar.advance(3)
    assert bar.done == 3
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with Progress(file=terminal).stage("evaluate base", total=4, unit="rows") as bar:
        bar.advance(4)
    assert "4/4" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_a_failing_stage_is_not_called_done() -> None:
    log = io.StringIO()
    with pytest.raises(ValueError, match="broken"), Progress(file=log).stage("x", total=1, unit="rows"):
        raise ValueError("broken")
    assert "done" not in log.getvalue()
