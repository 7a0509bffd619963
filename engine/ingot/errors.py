"""Errors meant for the person at the keyboard: each says which field, which value, and what to do.

Everything raised on purpose derives from `IngotError`; the command line prints it as one line and exits
with `exit_code`. Anything else that escapes is a defect of Ingot and keeps its traceback.
"""

from typing import Any

# What a verb's exit status means; docs/reference/cli.md lists them from here.
EXIT_CODES = {
    0: "done",
    1: "anything else that you can mend; of `ingot conform`: a target failed, or none ran",
    2: "a setting, an argument or the data must change, or a proof of `ingot check` failed",
    3: "the model is not good enough: its policy is not met, or `ingot compare --fail-if-worse` found it worse",
    4: "more rows of a batch failed than `--max-errors` allows",
    130: "interrupted; the same command (a run: `--resume`) goes on",
}


class IngotError(Exception):
    """A problem that the user can mend. `str(error)` is the whole message."""

    exit_code = 1


class FieldError(IngotError):
    """A value that cannot be used: `field` names it, `value` shows it, `fix` says what to write instead."""

    exit_code = 2

    def __init__(self, field: str, value: object, fix: str, *, where: str = "") -> None:
        self.field, self.value, self.fix, self.where = field, value, fix, where
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{field} = {value!r}: {fix}")


class RecipeError(FieldError):
    """The recipe asks for something impossible, unknown or contradictory."""


class DataError(FieldError):
    """The data cannot be read, or holds rows that cannot be used."""


class ModelError(FieldError):
    """The model or tokenizer cannot be found, is unsafe to load, or lacks a part that the task needs."""


class CheckpointError(IngotError):
    """A checkpoint could not be written or read; what was there before is untouched."""


class CheckFailed(IngotError):
    """A proof of the trust gate failed: the message names it, its figures and what to change."""

    exit_code = 2


class NotPromoted(IngotError):
    """`evaluate.promotion` is not met: the message names what is missing and how to go on.

    `summary`: what the run has come to, where a whole run ends with it.
    """

    exit_code = 3
    summary: dict[str, Any] | None = None


class NotFinite(IngotError):
    """More losses or gradients than `train.nonfinite_budget` were not finite; the weights are as before the last."""


class OutOfMemory(IngotError):
    """A step does not fit: the message names what grew and the cheapest lever."""


class PackageError(IngotError):
    """A package could not be written, or does not answer as the model it was made from."""


class ServeError(FieldError):
    """The endpoint cannot start as asked."""


class EndpointError(IngotError):
    """An endpoint of somebody else refuses what it is asked, or does not answer."""


class TooManyErrors(IngotError):
    """More rows of a batch failed than it allows; the answers so far are kept.

    `printed`: by another rank. `summary`: what the batch has come to.
    """

    exit_code = 4
    printed = False
    summary: dict[str, Any] | None = None


class Interrupted(IngotError):
    """Stopped by Ctrl-C or SIGTERM after writing a resumable checkpoint."""

    exit_code = 130


class MissingPackage(IngotError):
    """An optional package is needed; the message holds the install command."""

    def __init__(self, package: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install {package}")
