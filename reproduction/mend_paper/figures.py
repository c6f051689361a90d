"""The figures of a cell, each with its definition and 95% interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from torch import Tensor

from emendo.evaluate.intervals import Interval, bootstrap_interval, mean_interval
from emendo.evaluate.metrics import perplexity
from reproduction.mend_paper.measure import PASSAGE_TOKENS, PASSAGES, Scores, Sums

Figures = dict[str, Interval]
"""Name -> value with its interval; a figure that does not apply is absent. See :data:`PROTOCOL`."""

_LOCAL = ("near", "far")
_BOOTSTRAP = "95% interval: bootstrap over the facts, 2000 draws, fixed seed; Wilson's where all agree"

PROTOCOL = {
    "edit_success": "ES, Eq. 1: all target tokens are the argmax, teacher forced; mean over the edit prompt and its "
    f"paraphrases together, then over the facts. {_BOOTSTRAP}",
    "success": f"edit success on the edit prompt alone. {_BOOTSTRAP}",
    "generalisation": f"edit success on the paraphrases alone. {_BOOTSTRAP}",
    "accuracy_drawdown": "accuracy before minus after: the whole gold answer of a locality prompt is the argmax, "
    f"teacher forced; before is the ORIGINAL model. {_BOOTSTRAP}",
    "accuracy_drawdown_near": "accuracy drawdown on neighbours alone: the same relation, another subject",
    "accuracy_drawdown_far": "accuracy drawdown on unrelated prompts alone, as the paper takes it",
    "accuracy_drawdown_of_host": "accuracy drawdown against the model that the editor trained, no edit made",
    "accuracy_drift": "accuracy of the original model minus that of the model that the editor trained, no edit made",
    "perplexity_drawdown": "perplexity after minus before, exp(sum of NLL / tokens) over the whole evaluation: "
    f"{PASSAGES} passages an edit, at most {PASSAGE_TOKENS} tokens each, all but the first scored; before is the "
    f"ORIGINAL model. {_BOOTSTRAP}",
    "perplexity_drawdown_of_host": "perplexity drawdown against the model that the editor trained, no edit made",
    "perplexity_drift": "perplexity of the model that the editor trained minus that of the original, no edit made",
    "locality_kl": "KL(original || edited) in nats, mean over the answer tokens of a locality prompt, then over the "
    f"prompts; without such prompts over the tokens of the passages. {_BOOTSTRAP}",
    "drift_kl": "drift of predictions: locality KL of the model that the editor trained, no edit made",
    "drift_unchanged": "`unchanged` of the model that the editor trained, no edit made",
    "drift_task_loss": "drift of the task loss: NLL of the gold answers of locality prompts, or of the passages' "
    "tokens, in the model that the editor trained minus that in the original, in nats per token, no edit made",
    "unchanged": "share of locality prompts whose answer's argmax tokens are all unchanged; without such prompts share "
    f"of the passages' tokens whose argmax is unchanged. {_BOOTSTRAP}",
    "seconds_per_edit": "time to make the edits, divided by the facts",
    "rank": "rank of an edit at the site where it is highest (an upper bound), mean over the edits",
    "relative_norm": "||dW|| / ||W||, mean over the sites, then over the edits",
}
"""How each figure is defined; :data:`PROTOCOL` has a text for every name of :data:`Figures`."""


def figures(scores: Scores) -> Figures:
    """Every figure that applies."""
    facts = [_with_locality(fact) for fact in scores.facts]
    found: dict[str, Interval | None] = {
        "edit_success": mean_interval(_shares(facts, "prompt", "paraphrase")),
        "success": mean_interval(_shares(facts, "prompt")),
        "generalisation": mean_interval(_shares(facts, "paraphrase")),
        **_accuracies(facts, scores.apart),
        **_perplexities(facts, scores.apart),
        **_changes(facts, scores.apart),
        "seconds_per_edit": _plain([scores.seconds]),
        "rank": _plain(scores.ranks),
        "relative_norm": _plain(scores.norms),
    }
    return {name: value for name, value in found.items() if value is not None}


def _with_locality(fact: Sums) -> Sums:
    """A fact's sums, and those of its locality prompts of both kinds together."""
    both = {**fact}
    for kind in _LOCAL:
        for name in [name for name in fact if name.startswith(f"{kind} ")]:
            whole = name.replace(kind, "locality", 1)
            both[whole] = both.get(whole, 0.0) + fact[name]
    return both


def _shares(facts: Sequence[Sums], *kinds: str) -> list[float]:
    """For each fact with texts of these kinds, the share that is right."""
    pairs = [
        (sum(f.get(f"{kind} hit", 0) for kind in kinds), sum(f.get(f"{kind} count", 0) for kind in kinds))
        for f in facts
    ]
    return [hits / count for hits, count in pairs if count]


def _accuracies(facts: Sequence[Sums], apart: bool) -> dict[str, Interval | None]:
    """Of locality prompts: columns are answers right in one state of the model, in another, and prompts."""

    def less(sums: Tensor) -> Tensor:
        return (sums[..., 0] - sums[..., 1]) / sums[..., 2]

    def pair(before: str, after: str, kind: str = "locality") -> Interval | None:
        return _over(facts, less, *(f"{kind} {name}" for name in (before, after, "count")))

    found = {
        "accuracy_before": _ratio(facts, "locality hit before", "locality count"),
        "accuracy_after": _ratio(facts, "locality hit", "locality count"),
        "accuracy_drawdown": pair("hit before", "hit"),
    }
    if all(any(f"{kind} count" in fact for fact in facts) for kind in _LOCAL):
        found |= {f"accuracy_drawdown_{kind}": pair("hit before", "hit", kind) for kind in _LOCAL}
    if apart:
        found |= {
            "accuracy_drawdown_of_host": pair("hit host", "hit"),
            "accuracy_drift": pair("hit before", "hit host"),
        }
    return found


def _perplexities(facts: Sequence[Sums], apart: bool) -> dict[str, Interval | None]:
    """Of passages: columns are NLL in one state of the model, in another, and tokens."""

    def more(sums: Tensor) -> Tensor:
        return perplexity(sums[..., 1], sums[..., 2]) - perplexity(sums[..., 0], sums[..., 2])

    def alone(name: str) -> Interval | None:
        columns = (f"passage {name}", "passage tokens")
        return _over(facts, lambda sums: perplexity(sums[..., 0], sums[..., 1]), *columns)

    def pair(before: str, after: str) -> Interval | None:
        return _over(facts, more, *(f"passage {name}" for name in (before, after, "tokens")))

    found = {
        "perplexity_before": alone("nll before"),
        "perplexity_after": alone("nll"),
        "perplexity_drawdown": pair("nll before", "nll"),
    }
    if apart:
        found |= {
            "perplexity_drawdown_of_host": pair("nll host", "nll"),
            "perplexity_drift": pair("nll before", "nll host"),
        }
    return found


def _changes(facts: Sequence[Sums], apart: bool) -> dict[str, Interval | None]:
    """KL and unchanged predictions, of locality prompts or else of passages."""
    prompts = any("locality count" in fact for fact in facts)
    kind = "locality" if prompts else "passage"
    same, whole = ("same", "count") if prompts else ("same tokens", "tokens")
    found = {
        "locality_kl": _ratio(facts, f"{kind} kl", f"{kind} {whole}"),
        "unchanged": _ratio(facts, f"{kind} {same}", f"{kind} {whole}"),
    }
    if apart:
        found["drift_kl"] = _ratio(facts, f"{kind} kl host", f"{kind} {whole}")
        found["drift_unchanged"] = _ratio(facts, f"{kind} {same} host", f"{kind} {whole}")
        found["drift_task_loss"] = _over(
            facts,
            lambda sums: (sums[..., 1] - sums[..., 0]) / sums[..., 2],
            *(f"{kind} {name}" for name in ("nll before", "nll host", whole)),
        )
    return found


def _ratio(facts: Sequence[Sums], part: str, whole: str) -> Interval | None:
    return _over(facts, lambda sums: sums[..., 0] / sums[..., 1], part, whole)


def _over(facts: Sequence[Sums], statistic: Callable[[Tensor], Tensor], *columns: str) -> Interval | None:
    """A statistic of column sums over the facts that have such texts; the last column counts them."""
    rows = [[fact[column] for column in columns] for fact in facts if fact.get(columns[-1])]
    return bootstrap_interval(rows, statistic)


def _plain(values: Sequence[float]) -> Interval | None:
    """A mean without an interval."""
    return Interval(*[fmean(values)] * 3) if values else None
