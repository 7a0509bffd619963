"""What is learned from pairs of answers: dpo, orpo, and a reward model's score.

P pairs, S = 2P sequences (2i: the chosen answer of pair i, 2i + 1: the rejected one), B rows, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ingot.data.loader import IGNORE, Batch
from ingot.data.plan import Divisor
from ingot.model.kinds import logits_of
from ingot.parallel.sharded import Sharded
from ingot.recipe import Objective
from ingot.train.forward import cross_entropy, inputs_of, moved, next_tokens

# log(1 - p) of a mean probability p that rounds to 1 in float32 would be minus infinity.
NEAREST_TO_CERTAIN = -1e-7


def answer_logps(sharded: Sharded, batch: Batch) -> Tensor:
    """Log-probability of every answer given its prompt, summed over its trainable tokens: float32 [P, 2]."""
    inputs, targets_BT = next_tokens(sharded, batch)
    logps_BT = -cross_entropy(sharded, inputs, targets_BT, each=True)
    if batch.row_lengths is None:
        return logps_BT.sum(1).view(-1, 2)
    lengths_S = torch.tensor(batch.row_lengths)
    sequence_T = moved(torch.repeat_interleave(torch.arange(len(lengths_S)), lengths_S), sharded.device)
    return logps_BT.new_zeros(len(lengths_S)).index_add(0, sequence_T, logps_BT[0]).view(-1, 2)


def answer_lengths(batch: Batch) -> Tensor:
    """Trainable tokens of every answer: int64 [P, 2], on the CPU; zeros for a pair that only keeps a rank busy."""
    learned_BT = batch.labels_BT != IGNORE
    if batch.row_lengths is None:
        return learned_BT.sum(1).view(-1, 2)
    return torch.stack([part.sum() for part in learned_BT[0].split(list(batch.row_lengths))]).view(-1, 2)


def dpo(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Direct preference optimization (Rafailov et al. 2023, equation 7), with Mitchell's (2023) conservative labels;
    mean over pairs.
    """
    assert batch.reference_P2 is not None, "rows come from reference.with_reference"
    gains_P2 = answer_logps(sharded, batch) - batch.reference_P2.to(sharded.device)
    margins_P = section.beta * (gains_P2[:, 0] - gains_P2[:, 1])
    return _preferred(margins_P, answer_lengths(batch), section.label_smoothing) / divisor.rows


def reward(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """The chosen answer's score beats the rejected one's (Bradley & Terry 1952; Ouyang et al. 2022, equation 1); mean
    over pairs.
    """
    inputs = inputs_of(batch, sharded)
    pad_id = getattr(sharded.plain.config, "pad_token_id", None)
    if batch.attention_BT is not None and pad_id is not None:
        # Decoders find a row's last token by the id that the model, not the tokenizer, calls padding.
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad_id)
    scores_P2 = logits_of(sharded.forward(**inputs)).view(-1, 2)
    margins_P = scores_P2[:, 0] - scores_P2[:, 1]
    return _preferred(margins_P, answer_lengths(batch), section.label_smoothing) / divisor.rows


def orpo(sharded: Sharded, batch: Batch, divisor: Divisor, section: Objective) -> Tensor:
    """Odds-ratio preference optimization (Hong et al. 2024, equations 3 to 7): the likelihood of the chosen answer,
    mean over its tokens in the whole step, and beta times the log odds ratio, mean over pairs.
    """
    logps_P2, lengths_P2 = answer_logps(sharded, batch), answer_lengths(batch)
    mean_P2 = logps_P2 / lengths_P2.clamp(min=1).to(sharded.device)
    # log(p / (1 - p)); log(-expm1(x)) keeps the digits that log(1 - exp(x)) loses near x = 0.
    odds_P2 = mean_P2 - torch.log(-torch.expm1(mean_P2.clamp(max=NEAREST_TO_CERTAIN)))
    ratio = _preferred(odds_P2[:, 0] - odds_P2[:, 1], lengths_P2)
    return -logps_P2[:, 0].sum() / divisor.targets + section.beta * ratio / divisor.rows


def _preferred(margins_P: Tensor, lengths_P2: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid of the margins, summed; `smoothing`: the share of pairs that are the wrong way round."""
    losses_P = -F.logsigmoid(margins_P)
    if smoothing:
        losses_P = (1 - smoothing) * losses_P - smoothing * F.logsigmoid(-margins_P)
    return (losses_P * (lengths_P2[:, 0] > 0).to(losses_P.device)).sum()
