"""The table of metrics: names, exact definitions, and the names that others have for them.

A definition is a sentence for people; docs/metrics.md is written from them.
"""

from collections.abc import Callable

from ingot.evaluation import class_metrics, json_metrics, solutions, squad, text_metrics
from ingot.evaluation.averages import BY_AVERAGE
from ingot.evaluation.calibration import ece_of
from ingot.evaluation.chrf import chrf_of
from ingot.evaluation.entities import ENTITY_SCORES, entities_undefined
from ingot.evaluation.judge_metrics import JUDGE_ALIASES, JUDGE_METRICS
from ingot.evaluation.likelihood_metrics import bits_of, loss_of, perplexity_of
from ingot.evaluation.ranking import RANKINGS
from ingot.evaluation.statistic import Array, Metric, mean_of, share_of

_WORDS = {
    "macro": "mean over the classes that occur in predictions or references",
    "weighted": "mean over classes, weighted by their references",
    "micro": "of all classes' counts together",
    "binary": "of the positive class alone (option positive; the last in order by default)",
}
_BLEU = ("language", "tokenizer")
_FLAGS = ("ignore_case", "ignore_punctuation", "ignore_numbers", "blanks_matter", "smoothing", "stemmer")
OPTION_TYPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(_FLAGS, (bool, "true or false")),
    **dict.fromkeys((*_BLEU, "positive"), (str, "a text")),
    "regexes_to_ignore": (list, "a list of regular expressions"),
}
"""Option of a metric -> the type of its values, and that in words."""


def _text() -> list[Metric]:
    from ingot.evaluation.text_metrics import bleu_of, bleu_undefined, empty_reference, rouge_undefined, ter_of

    ignored = ("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore", "blanks_matter")
    rouges = {
        "rouge1": "of single words",
        "rouge2": "of pairs of words",
        "rougeL": "of the longest common subsequence of the whole texts",
        "rougeLsum": "of the union of longest common subsequences of their lines",
    }
    return [
        Metric(
            "exact_match",
            "share of answers that equal a reference, blanks around both aside; options drop, in this order, what "
            "regexes_to_ignore match, then case, ASCII punctuation and digits; blanks_matter keeps the blanks",
            mean_of,
            text_metrics.exact_match,
            text_metrics.exact_match_undefined,
            options=ignored,
        ),
        Metric(
            "bleu",
            "sacrebleu's corpus BLEU, 0 to 100: case kept, exponential smoothing; tokenizer 13a, or zh, ja-mecab, "
            "ko-mecab, char by the option language; its signature is in the details",
            bleu_of,
            text_metrics.bleu,
            bleu_undefined,
            unit_interval=False,
            decimals=1,
            options=_BLEU,
        ),
        *(
            Metric(
                name,
                f"corpus BLEU of n-grams up to {name[-1]}, 0 to 1: brevity penalty x geometric mean of the shares of "
                "n-grams that a reference holds; the shortest reference's length, words of sacrebleu's 13a, no "
                "smoothing unless the option smoothing adds 1 to every count",
                text_metrics.bleu_n_of,
                compute,
                undefined,
                options=(*_BLEU, "smoothing"),
            )
            for name, (compute, undefined) in text_metrics.BLEU_N.items()
        ),
        Metric(
            "chrf",
            "sacrebleu's chrF2, 0 to 100: F of n-grams of 1 to 6 characters without blanks, recall counting twice",
            chrf_of,
            text_metrics.chrf(0),
            empty_reference,
            unit_interval=False,
            decimals=1,
        ),
        Metric(
            "chrf++",
            "the same with n-grams of 1 and 2 words too",
            chrf_of,
            text_metrics.chrf(2),
            empty_reference,
            unit_interval=False,
            decimals=1,
        ),
        Metric(
            "ter",
            "sacrebleu's translation edit rate: edits per 100 words of the references' mean length; 0 is perfect",
            ter_of,
            text_metrics.ter,
            empty_reference,
            higher_is_better=False,
            unit_interval=False,
            decimals=1,
        ),
        *(
            Metric(
                name,
                f"rouge_score's F1 {what}, best reference, mean over rows; without stemming unless the option stemmer",
                mean_of,
                text_metrics.rouge(name),
                rouge_undefined,
                options=("stemmer",),
            )
            for name, what in rouges.items()
        ),
    ]


def _answers() -> list[Metric]:
    json_undefined, gsm8k_undefined = json_metrics.json_undefined, solutions.gsm8k_undefined
    return [
        Metric(
            "squad_exact_match",
            "share of answers equal to a reference in small letters, without ASCII punctuation and then a, an, the, "
            "blanks joined: SQuAD's, as a share",
            mean_of,
            squad.squad(squad.exact),
        ),
        Metric(
            "squad_f1",
            "F1 of the bags of words of both, so normalised; best reference, mean over rows. Where there is no answer "
            '(""), saying so is 1 and anything else 0',
            mean_of,
            squad.squad(squad.word_f1),
        ),
        *(
            Metric(
                f"{name}_{part}",
                f"{name} of the rows that have {'an' if answered else 'no'} answer: {other} of SQuAD 2.0, as a share",
                share_of,
                squad.squad_of(score, answered=answered),
                squad.none_of(answered=answered),
            )
            for part, answered, other in (("has_answer", True, "HasAns"), ("no_answer", False, "NoAns"))
            for name, score in (("squad_exact_match", squad.exact), ("squad_f1", squad.word_f1))
        ),
        Metric(
            "gsm8k_strict",
            'share of answers whose number after the first "#### " is the reference\'s; commas, $ and a full stop at '
            "the end aside",
            mean_of,
            solutions.gsm8k_strict,
            gsm8k_undefined,
        ),
        Metric(
            "gsm8k_flexible",
            "the same of the last match of (-?[$0-9.,]{2,})|(-?[0-9]+)",
            mean_of,
            solutions.gsm8k_flexible,
            gsm8k_undefined,
        ),
        Metric(
            "json_valid", "share of answers that are one JSON object and nothing else", mean_of, json_metrics.json_valid
        ),
        Metric(
            "json_exact_match",
            "share of answers that are a reference's JSON object: order of keys aside, 1 is 1.0, true is not 1",
            mean_of,
            json_metrics.json_exact_match,
            json_undefined,
        ),
        Metric(
            "json_argument_f1",
            "F1 of the bags of leaves (path, kind, value) of both objects; best reference, mean over rows, 0 where the "
            "answer is no object",
            mean_of,
            json_metrics.json_argument_f1,
            json_undefined,
        ),
        Metric(
            "tool_call_match",
            "share of answers that make exactly a reference's tool calls, name and arguments as JSON, in any order; "
            "one call or a list, bare or under tool_calls",
            mean_of,
            json_metrics.tool_call_match,
            json_metrics.tool_calls_undefined,
        ),
    ]


def _classes() -> list[Metric]:
    counts: dict[str, str] = {
        "balanced_accuracy": "mean recall of the classes that have references",
        "weighted_accuracy": "accuracy of rows that weigh as much as their class has rows",
        "norm_macro_recall": "(R - 1/C) / (1 - 1/C) of balanced accuracy R over C classes: guessing is 0, all right 1, "
        "worse than guessing is negative",
        "matthews_correlation": "Matthews' correlation of classes (R_K), -1 to 1; 0 where one class is predicted only",
    }
    counts |= {name: f"{name.split('_')[0]}, {_WORDS[name.split('_')[1]]}" for name in BY_AVERAGE}
    signed = ("norm_macro_recall", "matthews_correlation")
    curves = {"AUC": "area under the ROC curve of class against rest", "average_precision_score": "average precision"}

    def curve(name: str) -> str:
        what, average = name.rsplit("_", 1)
        words = (
            "mean over the classes that some rows have and others have not" if average == "macro" else _WORDS[average]
        )
        return f"{curves[what]}, {words}, from probabilities"

    return [
        Metric("accuracy", "share of rows whose class is right", mean_of, class_metrics.accuracy),
        *(
            Metric(
                name,
                doc,
                class_metrics.FROM_COUNTS[name],
                class_metrics.counted(name),
                unit_interval=name not in signed,
            )
            for name, doc in counts.items()
        ),
        *(
            Metric(
                name,
                f"{name.split('_')[0]} {_WORDS['binary']}",
                value_of,
                class_metrics.binary(name),
                options=("positive",),
            )
            for name, value_of in class_metrics.BINARY.items()
        ),
        *(Metric(name, curve(name), value_of, whole=True) for name, value_of in RANKINGS.items()),
        Metric(
            "log_loss",
            "mean of -log p of the right class in nats, p kept 2.2e-16 from 0 and 1",
            mean_of,
            higher_is_better=False,
            unit_interval=False,
        ),
        Metric(
            "brier",
            "mean over rows of the squared distance between probabilities and truth, summed over classes, 0 to 2; of "
            "choices: of the softmax over their log-likelihoods",
            mean_of,
            higher_is_better=False,
            unit_interval=False,
        ),
        Metric(
            "ece",
            "expected calibration error: gaps between the highest probability and the share of right rows in 15 bins "
            "of equal width, weighted by rows",
            ece_of,
            higher_is_better=False,
        ),
        Metric("subset_accuracy", "share of rows whose labels are all right", mean_of),
    ]


def _entities() -> list[Metric]:
    what = {"f1": "F1", "precision": "share of predicted entities that are real", "recall": "share of real ones found"}
    averages = {f"entity_{name}": of for name, of in BY_AVERAGE.items() if not name.endswith("_micro")}

    def doc(name: str) -> str:
        _, score, *average = name.split("_")
        by = f", by type: {_WORDS[average[0]].replace('class', 'type')}" if average else ", all types together"
        return f"seqeval's {what[score]} of entities, words and type right{by}; mode and scheme are in the details"

    scores: dict[str, Callable[[Array], Array]] = ENTITY_SCORES | averages
    return [
        *(Metric(name, doc(name), of, undefined=entities_undefined) for name, of in scores.items()),
        Metric("token_accuracy", "share of words with the right tag", share_of),
    ]


def _likelihoods() -> list[Metric]:
    lower = {
        "perplexity": ("exp of the mean loss per predicted token", perplexity_of, 2),
        "loss": ("mean loss per predicted token in nats", loss_of, 3),
        "word_perplexity": (r"exp of the loss per word, words split at \s+; sums over documents", perplexity_of, 2),
        "byte_perplexity": ("exp of the loss per byte of UTF-8; sums over documents", perplexity_of, 3),
        "bits_per_byte": ("loss in bits per byte of UTF-8; sums over documents", bits_of, 3),
    }
    choices = {
        "acc": "summed log-likelihood is the highest",
        "acc_norm": "log-likelihood per CHARACTER is the highest",
        "acc_bytes": "log-likelihood per byte of UTF-8 is the highest",
        "acc_mutual_info": "log-likelihood gains most from the question: less that without it",
    }
    return [
        *(
            Metric(name, doc, of, higher_is_better=False, unit_interval=False, decimals=decimals)
            for name, (doc, of, decimals) in lower.items()
        ),
        *(Metric(name, f"share of rows whose right choice's {doc}", mean_of) for name, doc in choices.items()),
        Metric("masked_accuracy", "share of hidden tokens that are told", share_of),
        Metric(
            "preference_accuracy", "share of pairs whose preferred answer comes out ahead; a draw is no win", mean_of
        ),
        Metric(
            "preference_margin",
            "mean lead of the preferred answer: log-probability in nats, or score",
            mean_of,
            unit_interval=False,
            decimals=2,
        ),
    ]


_OF_TEXTS = [*_text(), *_answers()]


class _ByName(dict[str, Metric]):
    """Metrics by name. `metric@extract`, the score of one of several parts of an answer, is that metric's too."""

    def __missing__(self, name: str) -> Metric:
        metric, at, _ = name.partition("@")
        if not at:
            raise KeyError(name)
        return self[metric]


METRICS: dict[str, Metric] = _ByName(
    (metric.name, metric) for metric in (*_OF_TEXTS, *_classes(), *_entities(), *_likelihoods(), *JUDGE_METRICS)
)
TEXT_METRICS = tuple(metric.name for metric in _OF_TEXTS)
_CURVES = tuple(name for name in RANKINGS if not name.endswith("_binary"))
SQUAD = tuple(name for name in TEXT_METRICS if name.startswith("squad_"))
OF_TASK: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("chat-completion", "text-generation", "summarization", "translation"), TEXT_METRICS),
    "text-classification": (
        *("accuracy", *class_metrics.FROM_COUNTS, *class_metrics.BINARY),
        *(*RANKINGS, "log_loss", "brier", "ece"),
    ),
    "multi-label-classification": (*BY_AVERAGE, "subset_accuracy", *_CURVES),
    "token-classification": (*(metric.name for metric in _entities()),),
    "question-answering": SQUAD,
    "fill-mask": ("masked_accuracy", "perplexity"),
    "language-modeling": ("perplexity", "loss"),
    "perplexity": ("perplexity", "loss", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple-choice": ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "brier", "ece"),
    "preference": ("preference_accuracy", "preference_margin"),
}
"""Kind of rows -> its metrics."""

_AVERAGES = ("macro", "micro", "weighted", "binary")
ALIASES: dict[str, str] = {
    **{f"{score}_score_{by}": f"{score}_{by}" for score in ("f1", "precision", "recall") for by in _AVERAGES},
    **{f"{other}_{by}": f"AUC_{by}" for other in ("auc", "roc_auc") for by in _AVERAGES},
    **{f"average_precision_{by}": f"average_precision_score_{by}" for by in _AVERAGES},
    **dict.fromkeys(("mcc", "matthews_corrcoef"), "matthews_correlation"),
    **dict.fromkeys(("brier_score", "brier_loss"), "brier"),
    "expected_calibration_error": "ece",
    "sacrebleu": "bleu",
    **dict.fromkeys(("chrfpp", "chrf_plus_plus"), "chrf++"),
    "perplexities": "perplexity",
    **JUDGE_ALIASES,
    **{
        f"{other}Ans_{score}": f"squad_{ours}_{part}"
        for other, part in (("Has", "has_answer"), ("No", "no_answer"))
        for score, ours in (("exact", "exact_match"), ("f1", "f1"))
    },
}
"""Names that mean the same in every task: Azure's for evaluation, and libraries'."""
_ENTITY_ALIASES = {
    f"{score}{middle}_{by}": f"entity_{score}" + ("" if by == "micro" else f"_{by}")
    for score in ("f1", "precision", "recall")
    for middle in ("", "_score")
    for by in ("macro", "weighted", "micro")
}
_WRITTEN = {"f1": "squad_f1", "f1_score": "squad_f1", "exact": "exact_match"}
ALIASES_OF_TASK: dict[str, dict[str, str]] = {
    **dict.fromkeys(("chat-completion", "text-generation", "summarization", "translation"), _WRITTEN),
    "multi-label-classification": {"accuracy": "subset_accuracy"},
    "token-classification": {
        "accuracy": "token_accuracy",
        **{f"{score}{end}": f"entity_{score}" for score in ("f1", "precision", "recall") for end in ("", "_score")},
        **_ENTITY_ALIASES,
    },
    "question-answering": {
        **dict.fromkeys(("exact_match", "exact"), "squad_exact_match"),
        **dict.fromkeys(("f1", "f1_score"), "squad_f1"),
    },
    "fill-mask": {"accuracy": "masked_accuracy"},
    "multiple-choice": {"accuracy": "acc"},
    "preference": {"accuracy": "preference_accuracy"},
}
"""Kind of rows -> names that mean something of their own there."""
