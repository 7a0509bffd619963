"""Log-probabilities of chosen tokens, with no more logits in memory than a few rows of the vocabulary.

The model runs as always; before its output head the hidden states that are asked about are picked out, and the head
sees only those. What a model does to its logits afterwards (a cap, a scale) it so does itself. Only where the rows are
more than one chunk is that repeated here, from the configuration, and held against the model's own first row.
"""

# B rows, T tokens, N chosen hidden states, M questions, D hidden, V vocabulary

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ingot.errors import ModelError
from ingot.model.generate import without_gradients
from ingot.model.head import SCALES, SHIFT

# Logits of one chunk of rows, 64 MiB in float32. At V = 128,256 these are 130 rows: on a CPU larger chunks were no
# faster.
LOGITS = 1 << 24
CLOSE = {torch.float32: 1e-4, torch.float64: 1e-4}  # difference as a share of the largest logit; other dtypes: COARSE
COARSE = 5e-2


class Told(NamedTuple):
    """Of each question [M]: the token's log-probability, float32; whether no token's is larger."""

    logprob: Tensor
    greedy: Tensor


class Projection:
    """A model and the door to its output head."""

    def __init__(self, model: nn.Module) -> None:
        find: Any = getattr(model, "get_output_embeddings", None)
        head = None if find is None else find()
        if head is None:
            raise ModelError("model", type(model).__name__, "it has no output head over a vocabulary to score with")
        self.model, self.head = model, head
        # A model may be spread over devices.
        self.device, self.head_device = next(model.parameters()).device, next(head.parameters()).device
        unwrap: Any = getattr(model, "get_base_model", lambda: model)
        self.owner: Any = unwrap()
        self.size = chunk_rows(_vocabulary(head, self.owner))
        self.wide = False  # what follows the head is not known here: all rows go through the model at once

    def hidden(self, places: tuple[Tensor, Tensor], inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Run the model; its last hidden states [N, D] at `places` (row, token), and its output, without logits."""
        return self._run(places, inputs, 0, None)

    def tell(
        self,
        places: tuple[Tensor, Tensor],
        inputs: dict[str, Any],
        about: Tensor,
        tokens: Tensor,
        before: Tensor | None = None,
    ) -> Told:
        """Run the model and ask about hidden states.

        Rows to ask about are `before` [K, D], hidden states of an earlier run, then those at `places`: K + N rows.
        Question m is: token `tokens[m]` behind row `about[m]`.
        """
        about, tokens = about.to(self.head_device), tokens.to(self.head_device)
        if self.wide:
            _, output = self._run(places, inputs, 1 << 60, before)
            return _told(_logits(output)[0], about, tokens)
        rows, output = self._run(places, inputs, 1, before)
        first = _logits(output)[0]
        size = self.size
        if len(rows) <= size:
            return _told(first, about, tokens)
        if not self._close(self._after(self.head(rows[:1]))[0], first[0]):
            self.wide = True
            return self.tell(places, inputs, about, tokens, before)
        all_told = Told(first.new_empty(len(about), dtype=torch.float32), about.new_empty(len(about), dtype=torch.bool))
        for start in range(0, len(rows), size):
            logits_NV = first if start == 0 else self._after(self.head(rows[start : start + size]))
            here = (about >= start) & (about < start + size)
            told = _told(logits_NV, about[here] - start, tokens[here])
            all_told.logprob[here], all_told.greedy[here] = told.logprob, told.greedy
        return all_told

    def _run(
        self, places: tuple[Tensor, Tensor], inputs: dict[str, Any], chunks: int, before: Tensor | None
    ) -> tuple[Tensor, Any]:
        """Run the model; its head sees the first `chunks` chunks of the rows."""
        kept: list[Tensor] = []
        tokens = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]

        def narrow(_head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_BTD = given[0]
            shift = hidden_BTD.shape[1] - tokens  # virtual tokens of prompt tuning stand in front
            found = hidden_BTD[places[0].to(hidden_BTD.device), places[1].to(hidden_BTD.device) + shift]
            kept.append(found if before is None else torch.cat([before, found]))
            return (kept[0][: chunks * self.size].unsqueeze(0), *given[1:])

        hook = self.head.register_forward_pre_hook(narrow)
        try:
            output = self.model(**inputs)
        finally:
            hook.remove()
        [rows] = kept
        return rows, output

    def _after(self, logits_NV: Tensor) -> Tensor:
        """What a model does to the logits of its head, by its configuration."""
        config = self.owner.config.get_text_config()
        shift = getattr(self.owner, SHIFT, None)
        logits_NV = logits_NV if shift is None else logits_NV + shift
        for name, power in SCALES.items():
            if getattr(config, name, None):
                logits_NV = logits_NV * getattr(config, name) ** power
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(logits_NV / cap) * cap if cap else logits_NV

    @staticmethod
    def _close(found_V: Tensor, wanted_V: Tensor) -> bool:
        if found_V.shape != wanted_V.shape:
            return False
        off = (found_V.float() - wanted_V.float()).abs().max()
        return bool(off <= CLOSE.get(wanted_V.dtype, COARSE) * wanted_V.float().abs().max())


def chunk_rows(vocabulary: int) -> int:
    """Rows of one chunk of logits."""
    return max(1, LOGITS // vocabulary)


def _vocabulary(head: Any, owner: Any) -> int:
    return int(getattr(head, "out_features", None) or owner.config.get_text_config().vocab_size)


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _told(logits_NV: Tensor, about: Tensor, tokens: Tensor) -> Told:
    logits_NV = logits_NV.float()
    norms_N = logits_NV.logsumexp(-1)
    best_N = logits_NV.argmax(-1)
    return Told(logits_NV[about, tokens] - norms_N[about], best_N[about] == tokens)


def target_nll(model: nn.Module, ids_BT: Tensor, attention_BT: Tensor | None, labels_BT: Tensor) -> Tensor:
    """Summed negative log-likelihood [B] in nats, float32, of the tokens that `labels_BT` holds (-100: not asked).

    Labels stand where their tokens stand: that at t is predicted from what is before t, the one at 0 from nothing and
    so left out. Equal to cross-entropy over all logits, of which only a chunk of rows is ever held.
    """
    rows, places = (labels_BT[:, 1:] != -100).nonzero(as_tuple=True)
    device = ids_BT.device
    total_B = torch.zeros(len(ids_BT), device=device, dtype=torch.float32)
    if not len(rows):
        return total_B
    inputs = {"input_ids": ids_BT, "attention_mask": attention_BT, "use_cache": False}
    with without_gradients():
        told = Projection(model).tell(
            (rows.to(device), places.to(device)),
            inputs,
            torch.arange(len(rows), device=device),
            labels_BT[rows, places + 1].to(device),
        )
    return total_B.index_add(0, rows.to(device), -told.logprob.to(device))
