"""RippleEdits (Cohen et al. 2024): one edit with queries on what it implies.

Keys: `example_type, edit {prompt, relation, original_fact {prompt}, ...}` and six lists of tests, each with
`test_queries [{prompt, answers [{value, aliases}]}]`. The edit's prompt is a whole sentence, "The name of the spouse
of X is Y."; what the phrase of its relation ends with ("is", "are", "follows", "is followed by") ends the prompt, and
the target follows. Where that stands more than once, the sentence of the original fact decides, else the last one
counts. The first answer of a query is the one that is asked for; queries without an answer are left out.

`Subject_Aliasing` becomes aliases, `Logical_Generalization` reversed relations, both `Compositionality` lists one-hop
consequences; `Relation_Specificity` (other facts of the subject) and `Forgetfulness` (other answers of a relation that
has several) shall not change and become unrelated prompts. Every query is asked by itself: conditions
(`condition_queries`: what the clean model must know) and alternatives (`test_condition`) are not read.
"""

from collections.abc import Iterator
from typing import Any

from emendo.data.schema import Consequence, ConsequenceKind, Fields, Probe, Record, describe

KEYS = frozenset({"Subject_Aliasing", "Relation_Specificity", "Compositionality_I", "Compositionality_II"})
PARAPHRASE = "edit"
NO_TARGET = "without a target"
_KINDS: dict[str, ConsequenceKind] = {
    "Subject_Aliasing": "alias",
    "Logical_Generalization": "reversed",
    "Compositionality_I": "one_hop",
    "Compositionality_II": "one_hop",
}
_KEPT = ("Relation_Specificity", "Forgetfulness")
_ENDS = {"FOLLOWS": "follows", "FOLLOWED_BY": "is followed by", "SIBLING": "are", "CAST_MEMBER": "are"}
"""What a relation's phrase ends with; all others end with "is"."""


def to_record(fields: Fields) -> Record:
    """Maps a RippleEdits object to a record."""
    edit = fields.raw.get("edit")
    raw: dict[str, Any] = edit if isinstance(edit, dict) else {"prompt": edit}
    original = raw.get("original_fact")
    before = original.get("prompt") if isinstance(original, dict) else None
    relation = raw["relation"] if isinstance(raw.get("relation"), str) else None
    end = f" {_ENDS.get(relation or '', 'is')} "
    prompt, target = _split(raw.get("prompt"), end, before)
    if not prompt:
        fields.note("edit", f"a sentence with{end}in it, such as 'X{end}Y'", describe(raw.get("prompt")))
    elif not target:
        fields.note("edit", "a target at the end of the sentence", describe(raw["prompt"]), NO_TARGET)
    answer = _split(before, end, raw.get("prompt"))[1]
    return Record(
        prompt=prompt,
        target=target,
        relation=relation,
        unrelated=tuple(Probe(*query) for key in _KEPT for query in _queries(fields, key)),
        answer=answer or None,
        consequences=tuple(
            Consequence(kind, *query) for key, kind in _KINDS.items() for query in _queries(fields, key)
        ),
    )


def _split(sentence: object, end: str, other: object) -> tuple[str, str]:
    """A sentence as prompt and answer, cut after the last place of ``end`` up to which another one is the same."""
    if not isinstance(sentence, str):
        return "", ""
    text = sentence.strip().removesuffix(".")
    cuts = [at + len(end) for at in range(len(text)) if text.startswith(end, at)]
    alike = [cut for cut in cuts if isinstance(other, str) and other.lstrip().startswith(text[:cut])]
    if not cuts:
        return "", ""
    cut = (alike or cuts)[-1]
    return text[:cut].rstrip(), text[cut:].strip()


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
