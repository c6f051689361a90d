"""RippleEdits (Cohen et al. 2024): one edit with queries on what it implies.

Keys: `example_type, edit {prompt, original_fact {prompt}, ...}` and six lists of tests, each with `test_queries
[{prompt, answers [{value, aliases}]}]`. The edit's prompt is a whole sentence, "The name of the spouse of X is Y."; the
text after its last " is " is the target. The first answer of a query is the one that is asked for; queries without an
answer are left out.

`Subject_Aliasing` becomes aliases, `Logical_Generalization` reversed relations, both `Compositionality` lists one-hop
consequences; `Relation_Specificity` (other facts of the subject) and `Forgetfulness` (other answers of a relation that
has several) shall not change and become unrelated prompts.
"""

from collections.abc import Iterator
from typing import Any

from emendo.data.schema import Consequence, ConsequenceKind, Fields, Probe, Record, describe

KEYS = frozenset({"Subject_Aliasing", "Relation_Specificity", "Compositionality_I", "Compositionality_II"})
PARAPHRASE = "edit"
_KINDS: dict[str, ConsequenceKind] = {
    "Subject_Aliasing": "alias",
    "Logical_Generalization": "reversed",
    "Compositionality_I": "one_hop",
    "Compositionality_II": "one_hop",
}
_KEPT = ("Relation_Specificity", "Forgetfulness")


def to_record(fields: Fields) -> Record:
    """Maps a RippleEdits object to a record."""
    edit = fields.raw.get("edit")
    sentence = edit.get("prompt") if isinstance(edit, dict) else edit
    prompt, target = _split(sentence)
    if not prompt or not target:
        fields.note("edit", "an object with a 'prompt' such as 'The capital of X is Y.'", describe(sentence))
    original = edit.get("original_fact") if isinstance(edit, dict) else None
    answer = _split(original.get("prompt"))[1] if isinstance(original, dict) else ""
    return Record(
        prompt=prompt,
        target=target,
        unrelated=tuple(Probe(*query) for key in _KEPT for query in _queries(fields, key)),
        answer=answer or None,
        consequences=tuple(
            Consequence(kind, *query) for key, kind in _KINDS.items() for query in _queries(fields, key)
        ),
    )


def _split(sentence: object) -> tuple[str, str]:
    """A sentence as prompt and answer, cut after its last "is"."""
    if not isinstance(sentence, str) or " is " not in sentence:
        return "", ""
    before, _, after = sentence.strip().removesuffix(".").rpartition(" is ")
    return f"{before} is", after.strip()


def _queries(fields: Fields, key: str) -> Iterator[tuple[str, str]]:
    """The prompts of a list of tests, each with its first answer."""
    tests = fields.raw.get(key) or []
    try:
        for test in tests:  # type: ignore[attr-defined]
            for query in test["test_queries"]:
                if answer := _first(query["answers"]):
                    yield query["prompt"].rstrip(), answer
    except (AttributeError, KeyError, TypeError) as error:
        fields.note(
            key, "a list of tests with 'test_queries' of 'prompt' and 'answers'", f"{error!r} on the way"
        )


def _first(answers: list[Any]) -> str:
    return next((str(a["value"]).strip() for a in answers if str(a.get("value", "")).strip()), "")
