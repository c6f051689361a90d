"""Records of the data sets whose layouts must be taken apart, one function a data set."""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import TypeGuard

from emendo.data._fields import Fields, describe
from emendo.data.schema import MALFORMED, Consequence, ConsequenceKind, Probe, Record

SEVERAL = "several edits at once"
NO_TARGET = "without a target"


@cache
def _record_fields() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(Record))


def native(fields: Fields) -> Record:
    """One object with the fields of `Record`; a key that looks misspelt is a problem."""
    names = _record_fields()
    for key in fields.raw.keys() - set(names):
        for meant in _misspelt(key):
            if meant not in fields.raw:
                fields.problem(key, f"the field name '{meant}'", "a name that is not in the schema")
    return Record(
        prompt=fields.text("prompt"),
        target=fields.text("target"),
        subject=fields.optional("subject"),
        relation=fields.optional("relation"),
        id=fields.label("id"),
        paraphrases=fields.texts("paraphrases"),
        neighbours=fields.probes("neighbours"),
        unrelated=fields.probes("unrelated"),
        answer=fields.answer("answer"),
        consequences=fields.consequences("consequences"),
        separator=fields.separator("separator"),
    )


@cache
def _misspelt(key: str) -> tuple[str, ...]:
    return tuple(difflib.get_close_matches(key, _record_fields(), n=1, cutoff=0.85))


def counterfact(fields: Fields) -> Record:
    """CounterFact (Meng et al. 2022), also with AKEW's additions.

    ``neighborhood_prompts`` have the old answer of the record. ``attribute_prompts``, about other subjects that have
    the new answer, are not read: an edit towards that answer cannot harm them.
    """
    rewrite = fields.child("requested_rewrite")
    record = _rewritten(fields, rewrite)
    return dataclasses.replace(
        record,
        paraphrases=(*fields.prompts("paraphrase_prompts"), *record.paraphrases),
        neighbours=tuple(_neighbours(fields, record.answer)),
    )


def _neighbours(fields: Fields, answer: str | None) -> Iterator[Probe]:
    """Texts with the record's old answer, or objects with an answer each."""
    listed = fields.get("neighborhood_prompts")
    if isinstance(listed, list) and any(isinstance(item, dict) for item in listed):
        yield from (probe for _, probe in fields.groups("neighborhood_prompts"))
        return
    for prompt in fields.prompts("neighborhood_prompts"):
        if answer is None:
            fields.pass_over("neighborhood_prompts (no answer)")
        else:
            yield Probe(prompt, answer)


def mquake(fields: Fields) -> Record:
    """MQuAKE (Zhong et al. 2023), also with AKEW's additions.

    The questions of the case become one-hop consequences where the chain has two facts, else two-hop ones. A case with
    several rewrites asks for consequences of all of them at once, but a record is a single edit.
    """
    rewrites = fields.get("requested_rewrite")
    if not isinstance(rewrites, list) or len(rewrites) != 1:
        several = isinstance(rewrites, list) and len(rewrites) > 1
        count = f"{len(rewrites)} of them" if isinstance(rewrites, list) else describe(rewrites)
        expected = "a list with one rewrite, since a record is one edit"
        fields.problem("requested_rewrite", expected, count, SEVERAL if several else MALFORMED)
        return Record("", "")
    rewrite = fields.nested("requested_rewrite[0]", rewrites[0])
    record = _rewritten(fields, rewrite)
    hops = fields.get("new_single_hops")
    kind: ConsequenceKind = "two_hop" if isinstance(hops, list) and len(hops) > 2 else "one_hop"
    answer = fields.text("new_answer")
    return dataclasses.replace(
        record, consequences=tuple(Consequence(kind, text, answer) for text in fields.prompts("questions"))
    )


def _rewritten(fields: Fields, rewrite: Fields) -> Record:
    """The edit of a ``requested_rewrite``, as CounterFact and MQuAKE have it."""
    new = rewrite.child("target_new")
    record = Record(
        prompt=rewrite.text("prompt"),
        target=new.text("str"),
        subject=rewrite.optional("subject"),
        relation=rewrite.label("relation_id"),
        id=fields.label("case_id"),
        paraphrases=rewrite.prompts("question"),
        answer=rewrite.answer("target_true"),
    )
    new.close()
    rewrite.close()
    return record


def ripple(fields: Fields) -> Record:
    """RippleEdits (Cohen et al. 2024): an edit as a sentence, and lists of queries about its consequences.

    The sentence, "The name of the spouse of X is Y.", is cut where the phrase of its relation ends. Where that phrase
    stands more than once, the sentence of the original fact decides, else the last one counts. The first answer of a
    query counts; queries without an answer are not read. Every query is asked by itself: what the clean model must
    know (``condition_queries``) and alternatives (``test_condition``) are not read.
    """
    edit = fields.get("edit")
    raw: dict[str, object] = edit if isinstance(edit, dict) else {"prompt": edit}
    original, name = raw.get("original_fact"), raw.get("relation")
    before = original.get("prompt") if isinstance(original, dict) else None
    relation = name if isinstance(name, str) else None
    end = f" {_RELATION_ENDS.get(relation or '', 'is')} "
    prompt, target = _split(raw.get("prompt"), end, before)
    if not prompt:
        fields.problem("edit", f"a sentence with{end}in it, such as 'X{end}Y'", describe(raw.get("prompt")))
    elif not target:
        fields.problem("edit", "a target at the end of the sentence", describe(raw["prompt"]), NO_TARGET)
    return Record(
        prompt=prompt,
        target=target,
        relation=relation,
        unrelated=tuple(Probe(*query) for key in _RIPPLE_LOCALITY for query in _queries(fields, key)),
        answer=_split(before, end, raw.get("prompt"))[1] or None,
        consequences=tuple(
            Consequence(kind, *query)
            for key, kind in _RIPPLE_KINDS.items()
            for query in _queries(fields, key)
        ),
    )


_RIPPLE_KINDS: dict[str, ConsequenceKind] = {
    "Subject_Aliasing": "alias",
    "Logical_Generalization": "reversed",
    "Compositionality_I": "one_hop",
    "Compositionality_II": "one_hop",
}
_RIPPLE_LOCALITY = ("Relation_Specificity", "Forgetfulness")
_RELATION_ENDS = {
    "FOLLOWS": "follows",
    "FOLLOWED_BY": "is followed by",
    "SIBLING": "are",
    "CAST_MEMBER": "are",
}
"""How a relation's phrase ends; all others end with "is"."""


def _split(sentence: object, end: str, other: object) -> tuple[str, str]:
    """Prompt and answer of a sentence, cut after the last ``end`` up to which another sentence is the same."""
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
    expected = "a list of tests with 'test_queries' of 'prompt' and 'answers'"
    tests = fields.get(key) or []
    for test in tests if isinstance(tests, list) else [tests]:
        if not isinstance(test, dict) or not isinstance(test.get("test_queries"), list):
            fields.problem(key, expected, describe(test))
            continue
        listed = fields.nested(key, test)
        for query in listed.get("test_queries"):  # type: ignore[attr-defined]
            one = listed.nested("test_queries", query)
            if answer := one.answer("answers"):
                yield one.text("prompt"), answer
            elif isinstance(query, dict):
                fields.pass_over(f"{key} (no answer)")
        listed.close()


def dune(fields: Fields) -> Record:
    """DUNE (Akyürek et al. 2023): an edit as a statement, and queries about its consequences.

    A statement "A = B" is the prompt "A =" with the target "B", and its query a one-hop consequence. Other statements
    have no prompt, and are not read: the first query with its answer is the edit, and the others are its consequences.
    """
    statement, queries = fields.text("edits"), fields.get("test_inputs")
    left, equals, right = statement.rpartition(" = ")
    pairs: list[object]
    if equals and right.strip() and isinstance(queries, str):
        pairs = [[f"{left} =", right], [queries, right]]
    else:
        pairs = [queries] if _is_pair(queries) else queries if isinstance(queries, list) else []
        fields.pass_over("edits")
    asked = [probe for pair in pairs if _is_pair(pair) for probe in _asked(*pair)]
    if not asked or len(asked) < len(pairs):
        fields.problem("test_inputs", "questions with an answer each, or an edit 'A = B'", describe(queries))
        return Record("", "")
    return Record(
        prompt=asked[0].prompt,
        target=asked[0].answer,
        consequences=tuple(Consequence("one_hop", probe.prompt, probe.answer) for probe in asked[1:]),
    )


def _asked(question: str, answer: str) -> list[Probe]:
    return [Probe(question, answer)] if question.strip() and answer.strip() else []


def _is_pair(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def kilt(fields: Fields) -> Record:
    """FEVER in KILT (Petroni et al. 2021), and zsRE and FEVER as De Cao et al. (2021) augmented KILT's files.

    ``alternatives`` are answers that the model ranks below its ``prediction``: one of them is the target, chosen at
    random by the prompt. Where there are none, FEVER's target is the other class. The first of the true answers in
    ``output`` counts, else the prediction. ``filtered_rephrases`` are the back-translations of ``input`` that leave the
    prediction as it is.
    """
    prompt = fields.text("input")
    answer, prediction = next(_true_answers(fields), None), fields.optional("prediction")
    alternatives = fields.prompts("alternatives") or _other_class(answer)
    if not alternatives:
        fields.problem("alternatives", "at least one other answer", "none", NO_TARGET)
        return Record("", "")
    if len(alternatives) > 1:
        fields.pass_over("alternatives (all but one)")
    rephrased = fields.prompts("filtered_rephrases")
    return Record(
        prompt=prompt,
        target=random.Random(prompt).choice(alternatives),
        id=fields.label("id"),
        paraphrases=tuple(text for text in rephrased if text != prompt),
        answer=answer or prediction,
    )


_FEVER = ("SUPPORTS", "REFUTES")


def _other_class(answer: str | None) -> tuple[str, ...]:
    return tuple(label for label in _FEVER if label != answer) if answer in _FEVER else ()


def _true_answers(fields: Fields) -> Iterator[str]:
    """The texts under ``answer`` in a list of outputs; others of its items name only where the answer stands."""
    outputs = fields.get("output")
    if outputs is not None and not isinstance(outputs, list):
        fields.problem("output", "a list of objects with 'answer'", describe(outputs))
        return
    for item in outputs or ():
        one = fields.nested("output[]", item)
        if (text := one.optional("answer")) is not None:
            yield text


def generation(fields: Fields) -> Record:
    """The Wikitext edits of the MEND paper: passages that go on with tokens sampled from a language model.

    ``completions`` is a passage with its sampled tokens, and ``original`` the passage, alone or with its true
    continuation: what both begin with, up to a word's end, is the prompt. A paraphrase is a prompt without up to half
    of its words at the beginning.
    """
    completion, original = fields.text("completions"), fields.text("original")
    fields.used.add("n_tokens")
    prompt = completion[: _shared(completion, original)]
    target = completion[len(prompt) :]
    if not prompt.strip() or not target.strip():
        fields.problem(
            "completions", "a text that goes on otherwise than 'original'", describe(completion), NO_TARGET
        )
        return Record("", "")
    return Record(prompt=prompt, target=target, paraphrases=_endings(prompt), separator="")


_ENDINGS = 3


def _shared(one: str, other: str) -> int:
    """Length of the beginning that two texts share: all of the other, or whole words."""
    if one.startswith(other):
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    shared = next((i for i, (letter, its) in pairs if letter != its), len(one))
    while shared and not (one[shared : shared + 1].isspace() and not one[shared - 1].isspace()):
        shared -= 1
    return shared


def _endings(text: str) -> tuple[str, ...]:
    """The text without its first words, up to half of them, in a few lengths."""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    removable = starts[1 : len(starts) // 2 + 1]
    chosen = random.Random(text).sample(removable, min(_ENDINGS, len(removable)))
    return tuple(text[start:] for start in sorted(chosen))
