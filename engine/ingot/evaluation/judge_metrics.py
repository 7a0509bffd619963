"""Metrics that a judge's verdicts give: of the table of names, not of any kind's rows."""

from ingot.evaluation.statistic import Metric, share_of

GRADED = ("coherence", "fluency", "groundedness", "relevance", "similarity")  # Azure's gpt_* and llm_*, our rubrics
JUDGE_METRICS = (
    Metric(
        "judge_score",
        "mean grade of a judging model by a rubric, its scale's worst as 0 and best as 1; rows without a readable "
        "verdict are left out and counted",
        share_of,
    ),
    Metric(
        "judge_win_rate",
        "share of rows whose answer a judging model prefers, ties as a half; asked in both orders, and what the order "
        "decides is a tie",
        share_of,
    ),
)
JUDGED = tuple(metric.name for metric in JUDGE_METRICS)
JUDGE_ALIASES = {f"{by}_{what}": "judge_score" for by in ("gpt", "llm") for what in GRADED}
