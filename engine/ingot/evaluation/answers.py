"""Answers found in a context: the best stretch of tokens, and how SQuAD compares it with the right ones."""

# B windows, T tokens

import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Small letters, without punctuation and articles, single blanks (Rajpurkar et al. 2016, section 6.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact(prediction: str, references: Sequence[str]) -> float:
    """1 where the plain text is that of a reference."""
    return float(plain(prediction) in {plain(reference) for reference in references})


def word_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of words, the best reference. Where there is no answer (""), saying so is 1 and a text is 0."""
    return max(_overlap(plain(prediction).split(), plain(reference).split()) for reference in references)


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def best_spans(logits_BT2: Tensor, row_BT: Tensor, context_BT: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """(score [B], first token [B], last token [B]) of the likeliest answer of at most `longest` tokens of the context.

    Scores are log-probabilities among the row's tokens. `row_BT`, `context_BT` bool: no padding; the context's tokens.
    """
    shares_BT2 = log_shares(logits_BT2, row_BT).masked_fill(~context_BT.unsqueeze(-1), -torch.inf)
    scores_BTT = shares_BT2[:, :, None, 0] + shares_BT2[:, None, :, 1]
    length = scores_BTT.shape[1]
    allowed_TT = torch.ones(length, length, dtype=torch.bool, device=scores_BTT.device).triu().tril(longest - 1)
    score_B, place_B = scores_BTT.masked_fill(~allowed_TT, -torch.inf).flatten(1).max(1)
    return score_B, place_B // length, place_B % length


def log_shares(logits_BT2: Tensor, row_BT: Tensor) -> Tensor:
    """Log-probability of each token to be the first, or the last, of the answer; padding takes no part."""
    return logits_BT2.float().masked_fill(~row_BT.unsqueeze(-1), torch.finfo(torch.float32).min).log_softmax(1)
