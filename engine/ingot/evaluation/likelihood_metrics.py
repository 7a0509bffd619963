"""Likelihoods of whole texts, per token, word and byte: sums over documents divided once, so long ones weigh more."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.statistic import Array, Compute, Statistic


def loss_of(sums: Array) -> Array:
    """Mean negative log-likelihood in nats; rows are (sum, tokens)."""
    return sums[..., 0] / sums[..., 1]


def perplexity_of(sums: Array) -> Array:
    """exp of `loss_of`: weighted by tokens, not the mean of rows."""
    with np.errstate(over="ignore"):  # `finite` reports it
        return np.exp(loss_of(sums))


def bits_of(sums: Array) -> Array:
    """`loss_of` in bits; rows are (sum in nats, bytes)."""
    return loss_of(sums) / np.log(2)


def words_in(text: str) -> int:
    r"""Parts of `text` between stretches of blanks (\s+), empty ones at its ends included, as lm-evaluation-harness
    counts them.
    """
    return len(re.split(r"\s+", text))


def bytes_in(text: str) -> int:
    """Bytes of `text` in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))


def statistics_of_documents(
    nll_sums: Sequence[float], n_tokens: Sequence[int], texts: Sequence[str] | None = None
) -> Compute:
    """Perplexity and loss from each document's summed negative log-likelihood (nats) and number of predicted tokens;
    with `texts`, those per word and byte too.

    Raises IngotError, naming the row, for a document with nothing to predict.
    """
    for row, count in enumerate(n_tokens):
        if count < 1:
            raise IngotError(f"row {row} has no token to predict; remove it")

    def per(sizes: Sequence[int], value_of: Callable[[Array], Array]) -> Statistic:
        return Statistic(np.asarray([nll_sums, sizes], dtype=np.float64).T, value_of)

    compute: dict[str, Callable[[], Statistic]] = {
        "perplexity": lambda: per(n_tokens, perplexity_of),
        "loss": lambda: per(n_tokens, loss_of),
    }
    if texts is not None:
        known = texts
        compute |= {
            "word_perplexity": lambda: per([words_in(text) for text in known], perplexity_of),
            "byte_perplexity": lambda: per([bytes_in(text) for text in known], perplexity_of),
            "bits_per_byte": lambda: per([bytes_in(text) for text in known], bits_of),
        }
    return compute
