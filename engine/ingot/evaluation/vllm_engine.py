"""vLLM's offline engine as what answers (`pip install ingot[vllm]`). Checked against a stand-in only, never run here.

Prompts and answers are token ids of our own tokenizer; where an answer ends is decided here, from its tokens, as for
every other engine. vLLM only has to write greedily, and to say the log-probability of each token of a prompt.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ingot.errors import DataError, MissingPackage, ModelError
from ingot.evaluation.subject import Writer
from ingot.evaluation.task import Likelihood, Prompt
from ingot.model.continuations import encode_groups, encode_texts, prefix_id
from ingot.model.generate import context_limit, end_ids, make_rows
from ingot.model.load import Tokenizer, described
from ingot.model.sampling import Generation, Sampling


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return find_spec("vllm") is not None


def require_vllm(purpose: str = "evaluate.engine vllm") -> None:
    """Raise MissingPackage unless vLLM is installed; imported after this, it tells nobody else that it runs."""
    if not has_vllm():
        raise MissingPackage("'ingot[vllm]'", purpose)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class Vllm(Writer):
    """A complete model folder, read by vLLM. It writes and scores text; it has no heads of other tasks."""

    engine = "vllm"

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: str) -> None:
        """`dtype`: float32 or bfloat16. Raises MissingPackage without vLLM, ModelError for what it cannot read."""
        require_vllm()
        import vllm

        self.tokenizer, self._made = tokenizer, vllm.SamplingParams
        self._about: Any = described(folder)  # where a model of this process is asked for its configuration
        try:
            self._llm: Any = vllm.LLM(
                model=str(folder),
                dtype=dtype,
                max_model_len=self.context,
                trust_remote_code=False,
                generation_config="vllm",  # not the folder's: answers are greedy, by all engines
                seed=0,
            )
        except Exception as error:  # an architecture, a GPU or a size that it does not take
            raise ModelError("evaluate.engine", "vllm", f"it cannot run {folder.name}: {error}") from error

    @property
    def context(self) -> int | None:
        """Most tokens that the model reaches."""
        return context_limit(self._about)

    def written(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Generation]:
        """Greedy answers to prompts of token ids, cut at stop strings."""
        sampling, ends = Sampling(max_new_tokens, stop=tuple(stop)), end_ids(self._about, self.tokenizer)
        rows = make_rows(self._about, self.tokenizer, prompts, sampling)
        # It stops at strings only in text that it makes itself; what is kept comes from the tokens.
        made = self._made(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop=list(stop),
            stop_token_ids=sorted(ends),
            detokenize=bool(stop),
        )
        for row, output in zip(rows, self._asked(prompts, made), strict=True):
            for token in output.outputs[0].token_ids:
                row.push(int(token), ends)
                if row.finish_reason:
                    break
            row.finish_reason = row.finish_reason or str(output.outputs[0].finish_reason)
        return [row.result() for row in rows]

    def score(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Likelihood]]:
        """Log-likelihoods of continuations. Raises DataError for a question longer than the model reaches."""
        written = [(prompt if isinstance(prompt, str) else self.chat(prompt), texts) for prompt, texts in questions]
        groups = encode_groups(self.tokenizer, written)
        pairs = [(list(group.context), list(one)) for group in groups for one in group.continuations]
        found = iter(self._scored(pairs))
        return [[next(found) for _ in group.continuations] for group in groups]

    def roll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Log-likelihoods of documents. Raises DataError for one longer than the model reaches."""
        ids, first = encode_texts(self.tokenizer, texts), prefix_id(self.tokenizer)
        found = self._scored([([first], ids[text]) for text in texts if ids[text]])
        told = iter(found)
        return [(next(told).logprob, len(ids[text])) if ids[text] else (0.0, 0) for text in texts]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        room = (self.context or 1 << 60) - 1  # it always writes one token behind a prompt
        for context, continuation in pairs:
            if (length := len(context) + len(continuation)) > room:
                fix = f"vLLM would cut a text of {length} tokens elsewhere than the other engines; use static"
                raise DataError("evaluate.engine", "vllm", fix)
        made = self._made(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = self._asked([context + continuation for context, continuation in pairs], made)
        found = []
        for (context, continuation), output in zip(pairs, outputs, strict=True):
            told = output.prompt_logprobs[len(context) :]  # one a token of the prompt: {token: log-probability, rank}
            each = [at[token] for at, token in zip(told, continuation, strict=True)]
            found.append(Likelihood(sum(one.logprob for one in each), all(one.rank == 1 for one in each), len(each)))
        return found

    def _asked(self, prompts: Sequence[list[int]], made: Any) -> list[Any]:
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return list(self._llm.generate(asked, made, use_tqdm=False)) if asked else []
