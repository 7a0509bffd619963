"""What answers: a model in this process, and with which engine it writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ingot.data.rendering import require_template
from ingot.errors import DataError, IngotError
from ingot.evaluation.task import Answer, Likelihood, Prompt, Subject
from ingot.model.continuations import encode_groups, encode_texts, prefix_id
from ingot.model.continuous import generate_continuously, refuse_beams, supports
from ingot.model.generate import context_limit, generate, plain_prompt_ids
from ingot.model.inputs import ids_of
from ingot.model.kinds import pad_id
from ingot.model.load import Tokenizer
from ingot.model.sampling import Generation
from ingot.model.score import rolling, score


class Writer:
    """What goes on from token ids: the part of a subject that is the same for every engine."""

    tokenizer: Tokenizer
    engine: str
    """What writes the answers."""

    @property
    def context(self) -> int | None:
        """Most tokens that the model reaches."""
        raise NotImplementedError

    def written(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Generation]:
        """Greedy answers to prompts of token ids."""
        raise NotImplementedError

    def ids(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, special ones once."""
        if isinstance(prompt, str):
            return plain_prompt_ids(self.tokenizer, prompt)
        return ids_of(self.tokenizer, self.chat(prompt))

    def write(self, prompts: Sequence[Prompt], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[Answer]:
        """Greedy answers. Raises DataError for a prompt that leaves no room for one."""
        asked = [self.ids(prompt) for prompt in prompts]
        longest, limit = max(map(len, asked), default=0), self.context
        if limit is not None and longest + max_new_tokens > limit:
            fix = f"a prompt has {longest} tokens and the model reaches {limit}; lower it, or shorten the prompts"
            raise DataError("max_new_tokens", max_new_tokens, fix)
        written = self.written(asked, max_new_tokens=max_new_tokens, stop=stop)
        return [Answer(it.text, it.finish_reason, it.n_prompt, len(it.ids), self.engine) for it in written]

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """Turns as the tokenizer's own template writes them."""
        require_template(self.tokenizer)
        return chat_text(self.tokenizer, messages)


@dataclass
class Local(Writer):
    """A causal language model, or a model with the head that a task needs, and its tokenizer.

    `wanted`: evaluate.engine. `note` hears why it is not what writes.
    """

    model: nn.Module
    tokenizer: Tokenizer
    tokens_per_batch: int = 8192
    wanted: str = "auto"
    note: Callable[[str], None] = field(default=lambda text: None, repr=False)

    def __post_init__(self) -> None:
        self.model.eval()
        self._engine: str | None = None

    @property
    def context(self) -> int | None:
        """Most tokens that the model reaches."""
        return context_limit(self.model)

    @property
    def engine(self) -> str:  # type: ignore[override]
        """What writes the answers: static or continuous."""
        if self._engine is None:  # once: what an unsupported model is answered by is said once
            self._engine = engine_of(self.model, self.wanted, self.note)
        return self._engine

    def written(
        self, prompts: Sequence[list[int]], *, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Generation]:
        """Greedy answers to prompts of token ids."""
        write = generate_continuously if self.engine == "continuous" else generate
        return write(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            stop=stop,
            tokens_per_batch=self.tokens_per_batch,
        )

    def score(self, questions: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[Likelihood]]:
        """Log-likelihoods of continuations, the prompt of each question run once."""
        written = [(prompt if isinstance(prompt, str) else self.chat(prompt), texts) for prompt, texts in questions]
        found = score(
            self.model,
            encode_groups(self.tokenizer, written),
            pad_id=pad_id(self.tokenizer),
            tokens_per_batch=self.tokens_per_batch,
        )
        return [[Likelihood(it.logprob, it.greedy, it.n_tokens) for it in group] for group in found]

    def roll(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Log-likelihoods of documents."""
        ids = encode_texts(self.tokenizer, texts)
        return rolling(
            self.model,
            [ids[text] for text in texts],
            prefix_id=prefix_id(self.tokenizer),
            pad_id=pad_id(self.tokenizer),
            tokens_per_batch=self.tokens_per_batch,
        )


def engine_of(model: nn.Module, wanted: str, note: Callable[[str], None] = lambda text: None) -> str:
    """`evaluate.engine` for a loaded model -> static or continuous; `note` hears why continuous is not what it is.

    Raises ModelError where continuous is wanted of a model whose generation config asks for a search.
    """
    if wanted == "auto":
        # Pages pay with flash attention, which reads them in place. Other attention sees all rows of a batch in one
        # mask: on a CPU that took 1.8 times the processor time of static batches (benchmarks/eval.py, generation_32k).
        config: Any = model.config
        paged = str(getattr(config, "_attn_implementation", "")).startswith("flash_attention")
        device = next(model.parameters()).device
        return "continuous" if device.type == "cuda" and paged and supports(model) is None else "static"
    if wanted != "continuous":
        return "static"
    refuse_beams(model)
    reason = supports(model)
    if reason is not None:
        note(f"evaluate.engine: {reason}, which continuous batching cannot do; static batches answer")
    return "static" if reason is not None else "continuous"


def chat_text(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    """Turns as the tokenizer's own template writes them, with what opens the assistant's next turn."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs: they raise anything
        raise DataError("messages", len(messages), f"the model's chat template refuses these turns: {error}") from error


def require_writer(subject: Subject, kind: str) -> Writer:
    """`subject`, where it takes token ids. Raises IngotError where it takes only text."""
    if isinstance(subject, Writer):
        return subject
    raise IngotError(f"{kind} needs a model in this process; name a folder")


def require_local(subject: Subject, kind: str) -> Local:
    """`subject`, where it is a model in this process. Raises IngotError where it only writes and scores text."""
    if isinstance(subject, Local):
        return subject
    raise IngotError(f"{kind} needs a model in this process; name a folder")
