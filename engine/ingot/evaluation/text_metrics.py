"""Written answers beside the right ones: exact match, BLEU, chrF, TER and ROUGE."""

# N rows

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ingot.errors import IngotError
from ingot.evaluation.chrf import chrf_counts, chrf_of
from ingot.evaluation.statistic import Array, References, Statistic, TextMetric, ratio, row_mean
from ingot.registry import nearest

Undefined = Callable[..., str | None]

# --- exact match ---

_NO_PUNCTUATION, _NO_DIGITS = (str.maketrans("", "", signs) for signs in (string.punctuation, string.digits))


@dataclass(frozen=True)
class Ignored:
    """What makes no difference between two texts."""

    case: bool = False
    punctuation: bool = False
    numbers: bool = False
    regexes: Sequence[str] = ()

    def strip(self, text: str) -> str:
        """`text` without what is ignored: expressions in their order, then case, ASCII punctuation, ASCII digits."""
        for regex in [self.regexes] if isinstance(self.regexes, str) else self.regexes:
            text = re.sub(regex, "", text)
        text = text.lower() if self.case else text
        text = text.translate(_NO_PUNCTUATION) if self.punctuation else text
        return text.translate(_NO_DIGITS) if self.numbers else text


def exact_match(
    predictions: Sequence[str],
    references: References,
    *,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
    regexes_to_ignore: Sequence[str] = (),
    blanks_matter: bool = False,
) -> Statistic:
    """Prediction equals a reference, after both lost what is ignored. `blanks_matter`: those around a text too, as
    lm-evaluation-harness has it.
    """
    ignored = Ignored(ignore_case, ignore_punctuation, ignore_numbers, regexes_to_ignore)

    def plain(text: str) -> str:
        return ignored.strip(text if blanks_matter else text.strip())

    pairs = zip(predictions, references, strict=True)
    return row_mean([float(plain(p) in {plain(r) for r in refs}) for p, refs in pairs])


def exact_match_undefined(references: References, **options: Any) -> str | None:
    """Why exact match says nothing: an expression that is none, or what is ignored leaves nothing of a reference."""
    names = {"ignore_case": "case", "ignore_punctuation": "punctuation", "ignore_numbers": "numbers"}
    flags = {short: bool(options.get(name)) for name, short in names.items()}
    try:
        ignored = Ignored(**flags, regexes=options.get("regexes_to_ignore", ()))  # type: ignore[arg-type]
        lost = [text for refs in references for text in refs if text.strip() and not ignored.strip(text).strip()]
    except re.error as error:
        return f"regexes_to_ignore holds no regular expression: {error}"
    return f"nothing is left of the reference {lost[0]!r} after what is ignored" if lost else None


# --- BLEU ---

# Tokenizers of sacrebleu that need no download, and the languages that are not written with blanks between words.
TOKENIZERS = ("13a", "intl", "char", "none", "zh", "ja-mecab", "ko-mecab")
_OF_LANGUAGE = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab", **dict.fromkeys(("th", "lo", "km", "my", "bo"), "char")}
_NEEDS = {"ja-mecab": "MeCab", "ko-mecab": "mecab_ko"}


def tokenizer_of(language: str | None = None, tokenizer: str | None = None) -> str:
    """The name of sacrebleu's tokenizer: as said, or that of a language's code ("zh", "zh-CN"), or 13a.

    Raises IngotError for one that is unknown, or whose package is not installed.
    """
    code = re.split(r"[-_]", language.lower())[0] if language else ""
    name = tokenizer or _OF_LANGUAGE.get(code, "13a")
    if name not in TOKENIZERS:
        raise IngotError(f"bleu's tokenizer {name!r} is unknown: {nearest(name, TOKENIZERS)}")
    if name in _NEEDS and importlib.util.find_spec(_NEEDS[name]) is None:
        extra = name.removesuffix("-mecab")
        raise IngotError(f"bleu's tokenizer {name!r} is not installed: pip install 'sacrebleu[{extra}]', or use 'char'")
    return name


def bleu(
    predictions: Sequence[str], references: References, *, language: str | None = None, tokenizer: str | None = None
) -> Statistic:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu, 0 to 100; its signature is in the details."""
    from sacrebleu.metrics.bleu import BLEU

    split = tokenizer_of(language, tokenizer)
    rows = BLEU(effective_order=True, tokenize=split)  # for the rows' counts only; without it sacrebleu warns
    counted = [rows.sentence_score(p, list(refs)) for p, refs in zip(predictions, references, strict=True)]
    whole = BLEU(tokenize=split)
    whole.corpus_score(list(predictions), _streams(references))  # until then a signature has no number of references
    numbers = np.asarray([[r.sys_len, r.ref_len, *r.counts, *r.totals] for r in counted], dtype=np.float64)
    return Statistic(numbers, bleu_of, {"signature": str(whole.get_signature())})


def bleu_of(sums: Array) -> Array:
    """Lengths of prediction and reference, right n-grams, n-grams [..., 10] -> BLEU."""
    from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER

    def score(sums_K: Array) -> float:
        sys_len, ref_len, *counts = sums_K.tolist()
        correct, total = counts[:MAX_NGRAM_ORDER], counts[MAX_NGRAM_ORDER:]
        return float(BLEU.compute_bleu(correct, total, int(sys_len), int(ref_len), smooth_method="exp").score)

    return np.apply_along_axis(score, -1, sums)


def bleu_undefined(references: References, n: int = 4, **options: Any) -> str | None:
    """Why no `n`-gram of these references could match."""
    if reason := empty_reference(references):
        return reason
    try:
        words_of = _words(tokenizer_of(options.get("language"), options.get("tokenizer")))
    except IngotError as error:
        return str(error)
    if all(len(words_of(r)) < n for refs in references for r in refs):
        return f"no reference has {n} words, so nothing can match; use exact_match"
    return None


def empty_reference(references: References, **options: Any) -> str | None:
    """Whether a reference is empty, as a reason."""
    empty = any(not r.strip() for refs in references for r in refs)
    return "a reference is empty; remove its row, or use exact_match" if empty else None


def _words(tokenizer: str) -> Callable[[str], list[str]]:
    from sacrebleu.metrics.bleu import BLEU

    split = BLEU(tokenize=tokenizer).tokenizer
    return lambda text: split(text.rstrip()).split()


def _streams(references: References) -> list[list[str | None]]:
    """References as sacrebleu wants them: every row's first, every row's second (None where there is none) ..."""
    return [[refs[i] if i < len(refs) else None for refs in references] for i in range(max(map(len, references)))]


def bleu_n(n: int) -> TextMetric:
    """BLEU of n-grams up to `n`, 0 to 1, with the SHORTEST reference's length and no smoothing: Azure's bleu_1 to
    bleu_4. `smoothing` adds one to every count of n-grams (Lin & Och 2004).
    """

    def compute(
        predictions: Sequence[str],
        references: References,
        *,
        language: str | None = None,
        tokenizer: str | None = None,
        smoothing: bool = False,
    ) -> Statistic:
        name = tokenizer_of(language, tokenizer)
        words_of = _words(name)
        rows = []
        for prediction, refs in zip(predictions, references, strict=True):
            found, wanted = words_of(prediction), [words_of(r) for r in refs]
            right, tried = zip(*(_matches(found, wanted, order) for order in range(1, n + 1)), strict=True)
            rows.append([len(found), min(map(len, wanted)), *right, *tried, float(smoothing)])
        details = {"tokenizer": name, "smoothing": smoothing, "reference_length": "shortest"}
        return Statistic(np.asarray(rows, dtype=np.float64), bleu_n_of, details)

    return compute


def bleu_n_of(sums: Array) -> Array:
    """Lengths of prediction and shortest reference, right n-grams, n-grams, whether to smooth [..., 2n + 3] -> BLEU."""
    found, wanted, smooth = sums[..., 0], sums[..., 1], sums[..., -1:] > 0
    right, tried = np.split(sums[..., 2:-1], 2, axis=-1)
    shares = np.divide(right + smooth, tried + smooth, out=np.zeros_like(right), where=tried + smooth > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.where(found >= wanted, 1.0, np.exp(1 - wanted / found))
        mean = np.exp(np.log(shares).mean(-1))
    score: Array = np.where(found > 0, penalty * mean, 0.0)
    return score


def _matches(found: list[str], wanted: Sequence[list[str]], n: int) -> tuple[int, int]:
    """n-grams of `found` that a reference holds (as often as the one that holds it most often), and its n-grams."""
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (found, *wanted)]
    most: Counter[tuple[str, ...]] = Counter()
    for gram in grams[1:]:
        most |= gram
    return (grams[0] & most).total(), grams[0].total()


# --- chrF, TER ---


def chrf(words: int) -> TextMetric:
    """Corpus chrF with n-grams of words up to `words`; see chrf.py."""

    def compute(predictions: Sequence[str], references: References) -> Statistic:
        details = {"character_order": 6, "word_order": words, "beta": 2}
        return Statistic(chrf_counts(predictions, references, words), chrf_of, details)

    return compute


def ter(predictions: Sequence[str], references: References) -> Statistic:
    """Translation edit rate (Snover et al. 2006) by sacrebleu: edits per 100 words of the references' mean length."""
    from sacrebleu.metrics.ter import TER

    whole = TER()
    scores = [whole.sentence_score(p, list(refs)) for p, refs in zip(predictions, references, strict=True)]
    rows = np.asarray([[score.num_edits, score.ref_length] for score in scores], dtype=np.float64)
    whole.corpus_score([""] * len(rows), _streams(references))  # until then a signature has no number of references
    return Statistic(rows, ter_of, {"signature": str(whole.get_signature())})


def ter_of(sums: Array) -> Array:
    """Edits and words -> edits per 100 words."""
    return 100 * ratio(sums, 0, 1)


# --- ROUGE ---


def rouge(kind: str) -> TextMetric:
    """ROUGE F1 (Lin 2004) by rouge_score, without stemming unless `stemmer`, the best reference of each row, mean over
    rows.
    """

    def compute(predictions: Sequence[str], references: References, *, stemmer: bool = False) -> Statistic:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=stemmer)
        pairs = zip(predictions, references, strict=True)
        return row_mean([max(scorer.score(r, p)[kind].fmeasure for r in refs) for p, refs in pairs], stemmer=stemmer)

    return compute


def rouge_undefined(references: References, **options: Any) -> str | None:
    """Why ROUGE cannot read these references: it sees a-z and 0-9 only."""
    texts = [r.lower() for refs in references for r in refs]
    if any(not re.search(r"[a-z0-9]", text) for text in texts):
        return "it counts only a-z and 0-9, and a reference has none of them; use bleu or exact_match"
    letters = sum(sum(map(str.isalpha, text)) for text in texts)
    latin = sum(len(re.findall(r"[a-z]", text)) for text in texts)
    if 2 * latin < letters:
        return f"it counts only a-z and 0-9, and {1 - latin / letters:.0%} of the letters are others; use bleu or chrf"
    return None


BLEU_N: dict[str, tuple[TextMetric, Undefined]] = {
    f"bleu_{n}": (bleu_n(n), partial(bleu_undefined, n=n)) for n in (1, 2, 3, 4)
}
