"""One row as token ids, and what a tokenizer puts around a text."""

from collections.abc import Sequence
from dataclasses import dataclass

from ingot.data.turns import Tokenizer
from ingot.errors import ModelError

IGNORE = -100  # a label that is no target; what torch's cross entropy leaves out


@dataclass(frozen=True)
class Encoded:
    """One row as ids. `trainable[i]`: token i is a target.

    `labels` is None where the targets are tokens, else the targets themselves, IGNORE where there is none: a class; a 0
    or 1 for every class (multi-label); a class for every token; the first and last token of the answer. `parts`:
    lengths of the sequences that the row consists of, where it is several (two answers; source and target). `terms`:
    number of targets, where they are drawn anew in every epoch. `reference`: log-probability of each part under the
    starting model.
    """

    ids: list[int]
    trainable: list[bool]
    labels: Sequence[int] | None
    where: str
    parts: tuple[int, ...] = ()
    terms: int | None = None
    reference: tuple[float, ...] = ()

    @property
    def n_targets(self) -> int:
        """Terms that it adds to the loss. A row's first token has nothing before it to be predicted from."""
        if self.terms is not None:
            return self.terms
        if self.labels is not None:
            return sum(label != IGNORE for label in self.labels)
        return sum(self.trainable[1:])


def eos_of(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        fix = "the tokenizer has no eos token, so the model could not learn to stop; set eos_token in its configuration"
        raise ModelError("model.source", tokenizer.name_or_path, fix)
    return int(tokenizer.eos_token_id)


def ended(ids: list[int], trainable: list[bool], eos: int) -> tuple[list[int], list[bool]]:
    return (ids, trainable) if ids and ids[-1] == eos else ([*ids, eos], [*trainable, True])
