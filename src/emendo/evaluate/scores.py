"""The figures of an evaluation: every score of :mod:`emendo.evaluate.scores` with its interval.

A score is the mean over the records of the mean over a record's prompts, so that a record with many prompts counts no
more than others; its interval is a bootstrap over the records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from emendo.evaluate.intervals import Interval, harmonic_interval, score_interval
from emendo.evaluate.results import PORTABLE, Kind, Outcome, Result, per_record

# --------------------
# Every score and its protocol, in one list: what it is taken over, what a prompt adds to it, and how to say it.

Value = Callable[[Outcome], "float | None"]

_EDIT: tuple[Kind, ...] = ("edit",)
_REWORDED: tuple[Kind, ...] = ("paraphrase",)
_NEAR: tuple[Kind, ...] = ("neighbour",)
_LOCAL: tuple[Kind, ...] = ("neighbour", "unrelated")
_TOLD: tuple[Kind, ...] = ("told",)


@dataclass(frozen=True, slots=True)
class Score:
    """One score.

    Attributes:
        group: the protocol that it belongs to.
        name: what it is called there.
        about: how it is obtained, in words.
        kinds: the prompts that it is taken over.
        value: what a prompt adds; None where it has no say.
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


def _of(name: str) -> Value:
    return lambda outcome: getattr(outcome, name)


def _likelier(outcome: Outcome) -> float | None:
    """Whether the answer is likelier than the other one in the edited model, per token."""
    if outcome.nll_after is None or outcome.other_nll_after is None:
        return None
    return float(outcome.nll_after < outcome.other_nll_after)


def _margin(outcome: Outcome) -> float | None:
    """By how much it is likelier: the difference of the probabilities per token."""
    if outcome.nll_after is None or outcome.other_nll_after is None:
        return None
    return math.exp(-outcome.nll_after) - math.exp(-outcome.other_nll_after)


def _right_after(outcome: Outcome) -> float | None:
    return None if outcome.share_after is None else float(outcome.share_after == 1)


def _drawdown(outcome: Outcome) -> float | None:
    right = _right_after(outcome)
    return None if right is None else float(outcome.known) - right


def _reciprocal(outcome: Outcome) -> float | None:
    return None if outcome.rank_after is None else 1 / outcome.rank_after


def _free(name: str) -> Value:
    def value(outcome: Outcome) -> float | None:
        found = getattr(outcome, name)
        return None if found is None else float(found)

    return value


_FORCED = "teacher forced: "
_TF, _TOKENS, _FREE = "teacher_forced", "token_fraction", "free_generation"

SCORES: tuple[Score, ...] = (
    Score(_TF, "edit_success", f"{_FORCED}all target tokens are the argmax, edit prompt", _EDIT, _free(_TF)),
    Score(_TF, "generalisation", f"{_FORCED}the same, rewordings", _REWORDED, _free(_TF)),
    Score(
        _TF,
        "locality",
        (
            f"{_FORCED}the argmax is unchanged at all tokens of the stored answer, neighbours and "
            "unrelated prompts"
        ),
        _LOCAL,
        _free(_TF),
    ),
    Score(
        _TF,
        "locality_told",
        (
            f"{_FORCED}the same with the edited fact standing before the prompt, against the clean "
            "model that reads it too"
        ),
        _TOLD,
        _free(_TF),
    ),
    Score(
        _TOKENS,
        "edit_success",
        f"{_FORCED}share of the target's tokens that are the argmax",
        _EDIT,
        _of("token_level"),
    ),
    Score(_TOKENS, "generalisation", f"{_FORCED}the same, rewordings", _REWORDED, _of("token_level")),
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
        (
            "greedy continuation of the prompt alone begins with the target, as whole words; case, "
            "quotes and punctuation around aside"
        ),
        _EDIT,
        _free("generated"),
    ),
    Score(_FREE, "generalisation", "the same, rewordings", _REWORDED, _free("generated")),
    Score(
        _FREE,
        "locality",
        ("the continuation begins with the same words before and after, as many as the stored answer has"),
        _LOCAL,
        _free("generated"),
    ),
    Score(
        _FREE,
        "edit_success_full",
        (
            "the greedy answer up to its natural stop (end of the text, of the line or of the first "
            "sentence) is the target and nothing else, normalised"
        ),
        _EDIT,
        _free("exact"),
    ),
    Score(_FREE, "generalisation_full", "the same, rewordings", _REWORDED, _free("exact")),
    Score(
        "probability",
        "target_before",
        "probability of the whole target in the clean model, edit prompt",
        _EDIT,
        _of("before"),
        better=0,
    ),
    Score("probability", "target_after", "in the edited model", _EDIT, _of("after")),
    Score("probability", "target_after_reworded", "in the edited model, rewordings", _REWORDED, _of("after")),
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
    Score("rank", "target_after", "in the edited model", _EDIT, _of("rank_after"), share=False, better=-1),
    Score(
        "rank",
        "target_after_reworded",
        "in the edited model, rewordings",
        _REWORDED,
        _of("rank_after"),
        share=False,
        better=-1,
    ),
    Score("rank", "target_reciprocal", "1 / rank in the edited model, rewordings", _REWORDED, _reciprocal),
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
    Score(
        "kl",
        "locality",
        (
            "KL(clean || edited) in nats, mean over the stored answer's positions, neighbours and "
            "unrelated prompts"
        ),
        _LOCAL,
        _of("kl"),
        share=False,
        better=-1,
    ),
    Score(
        "kl",
        "locality_told",
        "the same with the edited fact standing before the prompt",
        _TOLD,
        _of("kl"),
        share=False,
        better=-1,
    ),
    Score(
        "counterfact",
        "efficacy",
        (
            "the target is likelier than the old answer in the edited model, by mean NLL per token, "
            "edit prompt"
        ),
        _EDIT,
        _likelier,
    ),
    Score(
        "counterfact",
        "efficacy_magnitude",
        "the difference of the two probabilities, geometric means per token",
        _EDIT,
        _margin,
        share=False,
    ),
    Score("counterfact", "paraphrase", "as efficacy, rewordings", _REWORDED, _likelier),
    Score(
        "counterfact",
        "paraphrase_magnitude",
        "as efficacy_magnitude, rewordings",
        _REWORDED,
        _margin,
        share=False,
    ),
    Score(
        "counterfact",
        "neighbourhood",
        "the stored answer is likelier than the edit's target in the edited model, neighbours",
        _NEAR,
        _likelier,
    ),
    Score(
        "counterfact",
        "neighbourhood_magnitude",
        "the difference of the two probabilities",
        _NEAR,
        _margin,
        share=False,
    ),
    Score(
        "counterfact",
        "neighbourhood_told",
        "as neighbourhood, with the edited fact standing before the prompt (CounterFact+)",
        _TOLD,
        _likelier,
    ),
    Score(
        "zsre",
        "efficacy",
        "share of the target's tokens that are the argmax, edit prompt",
        _EDIT,
        _of("share_after"),
    ),
    Score("zsre", "paraphrase", "the same, rewordings", _REWORDED, _of("share_after")),
    Score(
        "zsre",
        "specificity",
        (
            "share of the stored answer's tokens that the edited model predicts, neighbours and "
            "unrelated prompts"
        ),
        _LOCAL,
        _of("share_after"),
    ),
    Score(
        "zsre",
        "specificity_clean",
        "the same in the clean model: what an edit that changes nothing gets",
        _LOCAL,
        _of("share_before"),
        better=0,
    ),
    Score(
        "mend",
        "edit_success",
        ("ES: all target tokens are the argmax, mean over the edit prompt and its rewordings together"),
        ("edit", "paraphrase"),
        _free(_TF),
    ),
    Score(
        "mend",
        "accuracy_drawdown",
        ("accuracy on neighbours and unrelated prompts before minus after, all tokens of the stored answer"),
        _LOCAL,
        _drawdown,
        share=False,
        better=-1,
    ),
    *(
        Score(
            "portability",
            kind,
            f"{_FORCED}all tokens of the answer that follows from the edit are the argmax, {about}",
            (kind,),
            _free(_TF),
        )
        for kind, about in zip(
            PORTABLE,
            ("reversed relation", "one-hop consequence", "two-hop consequence", "subject alias"),
            strict=True,
        )
    ),
    *(
        Score("portability", f"{kind}_generated", "the same by free generation", (kind,), _free("generated"))
        for kind in PORTABLE
    ),
)
"""In the order in which they are shown."""

GROUPS = {
    "teacher_forced": "the answer is fed token by token; all or nothing",
    "token_fraction": "the same, as the share of tokens: what MALMEN, UltraEdit and EasyEdit quote",
    "free_generation": "greedy decoding from the prompt alone",
    "probability": "of whole answers, the product over their tokens",
    "rank": "among the vocabulary",
    "kl": "how far the whole distribution moved",
    "counterfact": "the scores of ROME and MEMIT: which of two answers is likelier, by mean NLL per token",
    "zsre": "the scores of MEMIT on zsRE: the share of tokens predicted",
    "mend": "the scores of the MEND paper",
    "portability": "what follows from the edit",
}
"""The protocols, in the order in which they are shown."""


HARMONIC = ("efficacy", "paraphrase", "neighbourhood")
HARMONIC_ABOUT = "S, the harmonic mean of efficacy, paraphrase and neighbourhood"


def figures(results: Sequence[Result]) -> dict[str, dict[str, Interval | None]]:
    """Group -> score -> its mean and interval over the records; a score that no prompt speaks to is left out.

    Args:
        results: one for each record.
    """
    found: dict[str, dict[str, Interval | None]] = {}
    for score in SCORES:
        values = [v for v in per_record(results, score.value, score.kinds) if v is not None]
        if values:
            found.setdefault(score.group, {})[score.name] = score_interval(values, share=score.share)
    if (total := _harmonic(results)) is not None:
        found["counterfact"]["score"] = total
    return found


def values_of(results: Iterable[Result], group: str, name: str) -> list[float | None]:
    """One value of a score for each record, None where a record has no such prompt.

    Args:
        results: of the records.
        group: the score's protocol.
        name: the score.

    Raises:
        KeyError: there is no such score.
    """
    score = BY_NAME[group, name]
    return per_record(results, score.value, score.kinds)


BY_NAME: Mapping[tuple[str, str], Score] = {(score.group, score.name): score for score in SCORES}


def _harmonic(results: Sequence[Result]) -> Interval | None:
    columns = [values_of(results, "counterfact", name) for name in HARMONIC]
    rows = [row for row in zip(*columns, strict=True) if None not in row]
    return harmonic_interval(rows)


def table() -> str:
    """The list of scores as a Markdown table."""
    lines = ["| protocol | score | taken how |", "| --- | --- | --- |"]
    for group, about in GROUPS.items():
        lines.append(f"| **{group}** | | {about} |")
        lines += [f"| | `{score.name}` | {score.about} |" for score in SCORES if score.group == group]
        lines += [f"| | `score` | {HARMONIC_ABOUT} |"] if group == "counterfact" else []
    return "\n".join(lines) + "\n"
