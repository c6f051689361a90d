"""MQuAKE (Zhong et al. 2023): edits with questions that take several hops.

Keys: `case_id, requested_rewrite [{prompt "{} is a citizen of", subject, question, relation_id, target_new {str},
target_true {str}}], questions, new_answer, new_single_hops`. The rewrite's own question is its rewording. The case's
questions become one-hop consequences where the chain has two facts, two-hop ones where it has more; all are asked as
they stand.

A case with several rewrites asks what follows from all of them at once, which no record can say: a record is one edit,
and its consequences follow from it alone. Such a case is not malformed; it is left out (`--skip-bad`) under a reason of
its own.
"""

from typing import Any

from emendo.data.schema import MALFORMED, Consequence, ConsequenceKind, Fields, Record, describe

KEYS = frozenset({"requested_rewrite", "new_single_hops"})
PARAPHRASE = "requested_rewrite"
SEVERAL = "several edits at once"


def to_record(fields: Fields) -> Record:
    """Maps a MQuAKE object to a record."""
    rewrites = fields.raw.get("requested_rewrite")
    if not isinstance(rewrites, list) or len(rewrites) != 1:
        several = isinstance(rewrites, list) and len(rewrites) > 1
        count = f"{len(rewrites)} of them" if isinstance(rewrites, list) else describe(rewrites)
        fields.note(
            "requested_rewrite",
            "a list with one rewrite, since a record is one edit",
            count,
            SEVERAL if several else MALFORMED,
        )
        return Record("", "")
    try:
        rewrite: dict[str, Any] = rewrites[0]
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"]).rstrip()
        target, old = rewrite["target_new"]["str"].strip(), rewrite["target_true"]["str"].strip()
        subject, question = rewrite["subject"], str(rewrite.get("question") or "").strip()
    except (AttributeError, KeyError, TypeError) as error:
        wanted = "'prompt', 'subject', 'target_new' and 'target_true' with 'str'"
        fields.note("requested_rewrite", wanted, f"{error!r} on the way")
        return Record("", "")
    hops = fields.raw.get("new_single_hops")
    kind: ConsequenceKind = "two_hop" if isinstance(hops, list) and len(hops) > 2 else "one_hop"
    answer = fields.text("new_answer").strip()
    return Record(
        prompt=prompt,
        target=target,
        subject=subject,
        relation=str(rewrite.get("relation_id") or "") or None,
        id=fields.label("case_id"),
        paraphrases=(question,) if question else (),
        answer=old,
        consequences=tuple(Consequence(kind, text.rstrip(), answer) for text in fields.texts("questions")),
    )
