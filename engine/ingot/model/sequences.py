"""Whole sequences to scores: batches whose content depends on the data only, padded, and read back.

B rows, T tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ingot.model.projection import Projection, Told


@dataclass(frozen=True)
class Scored:
    """Of one continuation: log-likelihood in nats, whether greedy decoding would write it, its number of tokens."""

    logprob: float
    greedy: bool
    n_tokens: int


@dataclass
class Job:
    """A sequence and the tokens [n] that its last n rows predict; `source`: what an encoder reads."""

    ids: list[int]
    targets: list[int]
    source: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids) + len(self.source or ())


def batches(sizes: Sequence[int], extra: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of each batch of at most `tokens` tokens (at least one place), long ones first.

    Sizes and extras are each padded to their longest.
    """
    batch: list[int] = []
    widest = 0
    # Longest first: memory runs out at the first batch or never.
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], -extra[place], place)):
        if batch and (sizes[batch[0]] + max(widest, extra[place])) * (len(batch) + 1) > tokens:
            yield batch
            batch, widest = [], 0
        batch.append(place)
        widest = max(widest, extra[place])
    if batch:
        yield batch


def run_whole(projection: Projection, jobs: Sequence[Job], pad_id: int, tokens: int) -> Iterator[tuple[int, Scored]]:
    """Each job's place and score. Rows are padded on the right, where a causal model does not look back from."""
    for batch in batches([len(job) for job in jobs], [0] * len(jobs), tokens):
        device = projection.device
        part = [jobs[place] for place in batch]
        ids_BT = padded([job.ids for job in part], pad_id, device)
        inputs: dict[str, Any] = {"input_ids": ids_BT, "use_cache": False}
        if part[0].source is not None:
            sources = [job.source or [] for job in part]
            attention_BT = padded([[1] * len(source) for source in sources], 0, device)
            inputs |= {"input_ids": padded(sources, pad_id, device), "attention_mask": attention_BT}
            inputs["decoder_input_ids"] = ids_BT
        rows = [row for row, job in enumerate(part) for _ in job.targets]
        places = [len(job.ids) - len(job.targets) + n for job in part for n in range(len(job.targets))]
        targets = [token for job in part for token in job.targets]
        told = projection.tell(
            (torch.tensor(rows, device=device), torch.tensor(places, device=device)),
            inputs,
            torch.arange(len(targets), device=device),
            torch.tensor(targets, device=device),
        )
        yield from zip(batch, read_back(told, [len(job.targets) for job in part]), strict=True)


def padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    """Rows [B, T], int64, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)


def read_back(told: Told, counts: Sequence[int]) -> list[Scored]:
    """Scores of continuations of `counts` tokens one behind the other."""
    logprobs, greedy = told.logprob.double().tolist(), told.greedy.tolist()
    found, start = [], 0
    for count in counts:
        end = start + count
        found.append(Scored(sum(logprobs[start:end]), all(greedy[start:end]), count))
        start = end
    return found
