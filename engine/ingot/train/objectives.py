"""Objectives: (sharded model, batch, divisor, section) -> loss. Each sums over its targets and divides ONCE by the
global count.

B rows, T tokens.
"""

from collections.abc import Callable

from torch import Tensor

from ingot.data.labels import collate_tagged
from ingot.data.loader import Batch, Collate, collate
from ingot.data.masking import collate_masked
from ingot.data.pairs import pairs
from ingot.data.plan import Divisor
from ingot.data.spans import collate_asked
from ingot.data.targets import collate_targets
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective
from ingot.train.distillation import distillation
from ingot.train.forward import cross_entropy, next_tokens
from ingot.train.pointing import label, label_set, span, tokens
from ingot.train.preferences import dpo, orpo, reward
from ingot.train.targets import target_tokens

Loss = Callable[[Sharded, Batch, Divisor, Objective], Tensor]


def next_token(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Cross-entropy of the trainable tokens given what stands before them, summed and divided by their number."""
    inputs, targets_BT = next_tokens(sharded, batch)
    loss = cross_entropy(sharded, inputs, targets_BT, section.label_smoothing)
    return loss / divisor.targets


OBJECTIVES: dict[str, Loss] = {
    "chat-completion": next_token,
    "text-generation": next_token,
    "language-modeling": next_token,
    "summarization": target_tokens,
    "translation": target_tokens,
    "text-classification": label,
    "multi-label-classification": label_set,
    "token-classification": tokens,
    "question-answering": span,
    "fill-mask": tokens,
    "dpo": dpo,
    "orpo": orpo,
    "reward": reward,
    "distillation": distillation,
}
# How rows become a batch, where it is not `collate`.
COLLATORS: dict[str, Collate] = {
    "token-classification": collate_tagged,
    "question-answering": collate_asked,
    "fill-mask": collate_masked,
    "dpo": pairs,
    "orpo": pairs,
    "reward": pairs,
    "summarization": collate_targets,
    "translation": collate_targets,
}


def collator_of(section: Objective) -> Collate:
    """How the objective's rows become a batch."""
    return COLLATORS.get(section.loss, collate)
