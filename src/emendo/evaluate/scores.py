"""Every score, in one list, with its protocol and its definition; and the scores of an evaluation with their intervals.

A score is the mean over the records of the mean over a record's prompts, so that a record with many prompts counts no
more than others; its interval is a bootstrap over the records (:mod:`emendo.evaluate.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from emendo.evaluate.intervals import Interval, harmonic_interval, mean_interval
from emendo.evaluate.results import MAIN, PORTABLE, Kind, Outcome, Result, per_record, plain

Value = Callable[[Outcome], "float | None"]


@dataclass(frozen=True, slots=True)
class Score:
    """One score.

    Attributes:
        group: its protocol.
        name: its name there.
        about: its definition, in words.
        kinds: the kinds of prompts that it is averaged over.
        value: the value of a prompt; None for a prompt that does not count.
        share: whether the value is between 0 and 1.
        better: 1 where more is better, -1 where less is, 0 where neither is.
    """

    group: str
    name: str
    about: str
    kinds: tuple[Kind, ...]
    value: Value
    share: bool = True
    better: int = 1


# ---------------------------------------------------------------------------------- values of a prompt


def _of(name: str) -> Value:
    """A field of the outcome as a number."""

    def value(outcome: Outcome) -> float | None:
        found = getattr(outcome, name)
        return None if found is None else float(found)

    return value


def _more_likely(outcome: Outcome) -> float | None:
    """Whether the answer is more likely than the competing one in the edited model, per token."""
    if outcome.nll_after is None or outcome.other_nll_after is None:
        return None
    return float(outcome.nll_after < outcome.other_nll_after)


def _margin(outcome: Outcome) -> float | None:
    """The difference of the two probabilities per token."""
    if outcome.nll_after is None or outcome.other_nll_after is None:
        return None
    return math.exp(-outcome.nll_after) - math.exp(-outcome.other_nll_after)


def _drawdown(outcome: Outcome) -> float | None:
    if outcome.share_after is None:
        return None
    return float(outcome.known) - float(outcome.share_after == 1)


def _reciprocal_rank(outcome: Outcome) -> float | None:
    return None if outcome.rank_after is None else 1 / outcome.rank_after


# -------------------------------------------------------------------------------------------- the list

_EDIT, _PARAPHRASE, _LOCAL = MAIN["edit_success"], MAIN["generalisation"], MAIN["locality"]
_NEIGHBOUR: tuple[Kind, ...] = ("neighbour",)
_IN_CONTEXT: tuple[Kind, ...] = ("told",)
_FORCED = "teacher forced: "
_TF, _TOKENS, _FREE = "teacher_forced", "token_fraction", "free_generation"

_amount = partial(Score, share=False)
_cost = partial(Score, share=False, better=-1)

SCORES: tuple[Score, ...] = (
    Score(_TF, "edit_success", f"{_FORCED}all target tokens are the argmax, edit prompt", _EDIT, _of(_TF)),
    Score(_TF, "generalisation", f"{_FORCED}the same, paraphrases", _PARAPHRASE, _of(_TF)),
    Score(
        _TF,
        "locality",
        f"{_FORCED}the argmax is unchanged at all tokens of the stored answer, neighbours and unrelated prompts",
        _LOCAL,
        _of(_TF),
    ),
    Score(
        _TF,
        "locality_in_context",
        f"{_FORCED}the same with the edited fact in the prompt's context, against the clean model with the "
        "same context",
        _IN_CONTEXT,
        _of(_TF),
    ),
    Score(
        _TOKENS,
        "edit_success",
        f"{_FORCED}share of the target's tokens that are the argmax",
        _EDIT,
        _of("token_level"),
    ),
    Score(_TOKENS, "generalisation", f"{_FORCED}the same, paraphrases", _PARAPHRASE, _of("token_level")),
    Score(
        _TOKENS,
        "locality",
        f"{_FORCED}share of the stored answer's tokens whose argmax is unchanged",
        _LOCAL,
        _of("token_level"),
    ),
    Score(
        _FREE,
        "edit_success",
        "greedy continuation of the prompt alone begins with the target, as whole words; case, quotes and "
        "punctuation around aside",
        _EDIT,
        _of("generated"),
    ),
    Score(_FREE, "generalisation", "the same, paraphrases", _PARAPHRASE, _of("generated")),
    Score(
        _FREE,
        "locality",
        "the continuation begins with the same words before and after, as many as the stored answer has",
        _LOCAL,
        _of("generated"),
    ),
    Score(
        _FREE,
        "edit_success_full",
        "the greedy answer up to its natural stop (end of the text, of the line or of the first sentence) "
        "is the target and nothing else, normalised",
        _EDIT,
        _of("exact"),
    ),
    Score(_FREE, "generalisation_full", "the same, paraphrases", _PARAPHRASE, _of("exact")),
    Score(
        "probability",
        "target_before",
        "probability of the whole target in the clean model, edit prompt",
        _EDIT,
        _of("before"),
        better=0,
    ),
    Score("probability", "target_after", "in the edited model", _EDIT, _of("after")),
    Score(
        "probability",
        "target_after_paraphrase",
        "in the edited model, paraphrases",
        _PARAPHRASE,
        _of("after"),
    ),
    Score(
        "probability",
        "old_before",
        "probability of the whole old answer in the clean model, edit prompt",
        _EDIT,
        _of("other_before"),
        better=0,
    ),
    Score("probability", "old_after", "in the edited model", _EDIT, _of("other_after"), better=-1),
    Score(
        "rank",
        "target_before",
        "rank of the target's worst token in the clean model (1 is the argmax), edit prompt",
        _EDIT,
        _of("rank_before"),
        share=False,
        better=0,
    ),
    _cost("rank", "target_after", "in the edited model", _EDIT, _of("rank_after")),
    _cost(
        "rank", "target_after_paraphrase", "in the edited model, paraphrases", _PARAPHRASE, _of("rank_after")
    ),
    Score(
        "rank",
        "target_reciprocal",
        "1 / rank in the edited model, paraphrases",
        _PARAPHRASE,
        _reciprocal_rank,
    ),
    Score(
        "rank",
        "old_before",
        "rank of the old answer's worst token in the clean model, edit prompt",
        _EDIT,
        _of("other_rank_before"),
        share=False,
        better=0,
    ),
    Score("rank", "old_after", "in the edited model", _EDIT, _of("other_rank_after"), share=False, better=0),
    _cost(
        "kl",
        "locality",
        "KL(clean || edited) in nats, mean over the stored answer's positions, neighbours and unrelated prompts",
        _LOCAL,
        _of("kl"),
    ),
    _cost(
        "kl",
        "locality_in_context",
        "the same with the edited fact in the prompt's context",
        _IN_CONTEXT,
        _of("kl"),
    ),
    Score(
        "counterfact",
        "efficacy",
        "the target is more likely than the old answer in the edited model, by mean NLL per token, edit prompt",
        _EDIT,
        _more_likely,
    ),
    _amount(
        "counterfact",
        "efficacy_magnitude",
        "the difference of the two probabilities, geometric means per token",
        _EDIT,
        _margin,
    ),
    Score("counterfact", "paraphrase", "as efficacy, paraphrases", _PARAPHRASE, _more_likely),
    _amount(
        "counterfact", "paraphrase_magnitude", "as efficacy_magnitude, paraphrases", _PARAPHRASE, _margin
    ),
    Score(
        "counterfact",
        "neighbourhood",
        "the stored answer is more likely than the edit's target in the edited model, neighbours",
        _NEIGHBOUR,
        _more_likely,
    ),
    _amount(
        "counterfact",
        "neighbourhood_magnitude",
        "the difference of the two probabilities",
        _NEIGHBOUR,
        _margin,
    ),
    Score(
        "counterfact",
        "neighbourhood_in_context",
        "as neighbourhood, with the edited fact in the prompt's context (CounterFact+)",
        _IN_CONTEXT,
        _more_likely,
    ),
    Score(
        "zsre",
        "efficacy",
        "share of the target's tokens that are the argmax, edit prompt",
        _EDIT,
        _of("share_after"),
    ),
    Score("zsre", "paraphrase", "the same, paraphrases", _PARAPHRASE, _of("share_after")),
    Score(
        "zsre",
        "specificity",
        "share of the stored answer's tokens that the edited model predicts, neighbours and unrelated prompts",
        _LOCAL,
        _of("share_after"),
    ),
    Score(
        "zsre",
        "specificity_clean",
        "the same in the clean model: the value of an edit that changes nothing",
        _LOCAL,
        _of("share_before"),
        better=0,
    ),
    Score(
        "mend",
        "edit_success",
        "ES: all target tokens are the argmax, mean over the edit prompt and its paraphrases together",
        ("edit", "paraphrase"),
        _of(_TF),
    ),
    _cost(
        "mend",
        "accuracy_drawdown",
        "accuracy on neighbours and unrelated prompts before minus after, all tokens of the stored answer",
        _LOCAL,
        _drawdown,
    ),
    *(
        Score(
            "portability",
            kind,
            f"{_FORCED}all tokens of the answer that follows from the edit are the argmax, {about}",
            (kind,),
            _of(_TF),
        )
        for kind, about in zip(
            PORTABLE,
            ("reversed relation", "one-hop consequence", "two-hop consequence", "subject alias"),
            strict=True,
        )
    ),
    *(
        Score("portability", f"{kind}_generated", "the same by free generation", (kind,), _of("generated"))
        for kind in PORTABLE
    ),
)
"""All scores, in the order in which they are shown."""

GROUPS = {
    "teacher_forced": "the answer is fed token by token; all or nothing",
    "token_fraction": "the same, as the share of tokens: the figure of MALMEN, UltraEdit and EasyEdit",
    "free_generation": "greedy decoding from the prompt alone",
    "probability": "of whole answers, the product over their tokens",
    "rank": "among the vocabulary",
    "kl": "how far the whole distribution moved",
    "counterfact": "the scores of ROME and MEMIT: which of two answers is more likely, by mean NLL per token",
    "zsre": "the scores of MEMIT on zsRE: the share of tokens predicted",
    "mend": "the scores of the MEND paper",
    "portability": "answers that follow from the edit",
}
"""The protocols, in the order in which they are shown."""

BY_NAME: Mapping[tuple[str, str], Score] = {(score.group, score.name): score for score in SCORES}
"""Each score by its protocol and name."""

ALIASES: Mapping[tuple[str, str], str] = {
    ("probability", "target_after_reworded"): "target_after_paraphrase",
    ("rank", "target_after_reworded"): "target_after_paraphrase",
    ("teacher_forced", "locality_told"): "locality_in_context",
    ("kl", "locality_told"): "locality_in_context",
    ("counterfact", "neighbourhood_told"): "neighbourhood_in_context",
}
"""Deprecated names of scores; the JSON output has them beside the present ones until 0.2."""

HARMONIC = ("efficacy", "paraphrase", "neighbourhood")
HARMONIC_ABOUT = "S, the harmonic mean of efficacy, paraphrase and neighbourhood"


def score_intervals(results: Sequence[Result]) -> dict[str, dict[str, Interval | None]]:
    """Protocol -> score -> its mean and interval over the records; scores without a prompt are left out."""
    found: dict[str, dict[str, Interval | None]] = {}
    for score in SCORES:
        values = [v for v in per_record(results, score.value, score.kinds) if v is not None]
        if values:
            found.setdefault(score.group, {})[score.name] = mean_interval(values, share=score.share)
    if (total := _harmonic(results)) is not None:
        found["counterfact"]["score"] = total
    return found


def _harmonic(results: Sequence[Result]) -> Interval | None:
    columns = [values_of(results, "counterfact", name) for name in HARMONIC]
    rows = [[value for value in row if value is not None] for row in zip(*columns, strict=True)]
    return harmonic_interval([row for row in rows if len(row) == len(HARMONIC)])


def scores_as_dict(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float | None]]]:
    """:func:`score_intervals` as JSON values, with the deprecated names."""
    found = {group: plain(scores) for group, scores in score_intervals(results).items()}
    for (group, old), name in ALIASES.items():
        if name in found.get(group, {}):
            found[group][old] = found[group][name]
    return found


def values_of(results: Iterable[Result], group: str, name: str) -> list[float | None]:
    """One value of a score for each record, None where a record has no such prompt.

    Args:
        results: of the records.
        group: the score's protocol.
        name: the score, by its present or deprecated name.

    Raises:
        KeyError: there is no such score.
    """
    score = BY_NAME[group, ALIASES.get((group, name), name)]
    return per_record(results, score.value, score.kinds)


def table() -> str:
    """The list of scores as a Markdown table, as in docs/evaluation.md."""
    lines = ["| protocol | score | definition |", "| --- | --- | --- |"]
    for group, about in GROUPS.items():
        lines.append(f"| **{group}** | | {about} |")
        lines += [f"| | `{score.name}` | {score.about} |" for score in SCORES if score.group == group]
        lines += [f"| | `score` | {HARMONIC_ABOUT} |"] if group == "counterfact" else []
    return "\n".join(lines) + "\n"
