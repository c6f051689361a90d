"""Layouts of record files: which fields of a published data set go where in a :class:`Record`.

A layout with one object a record is an entry of :data:`LAYOUTS` that names its fields. One whose records must be taken
apart has a function of its own. The first layout whose keys the first record of a file has is that of the file. To add
one, add an entry and, to ``tests/data/layouts.py``, a sample; the table in ``docs/data.md`` is checked against it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeGuard

from emendo.data._fields import Fields, describe, fill_templates
from emendo.data.schema import MALFORMED, Consequence, ConsequenceKind, Probe, Record

SEVERAL = "several edits at once"
NO_TARGET = "without a target"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the fields of a data set map to a record.

    Attributes:
        name: of the data set.
        any_of: a record of this layout has one of these keys.
        all_of: and all of these.
        prompt: the field with the prompt.
        target: the field with the target.
        subject: the field with the subject.
        id: the field with the name of the record.
        answer: fields with the old answer; the first that holds one counts.
        paraphrases: fields with a paraphrase, or a list of them.
        neighbours: pairs of fields, with a prompt of the same relation and its answer.
        unrelated: pairs of fields, with any other prompt and its answer.
        consequences: kind, and the fields with a prompt and its answer after the edit.
        build: makes a record of what the other attributes cannot describe.
    """

    name: str
    any_of: tuple[str, ...]
    all_of: tuple[str, ...] = ()
    prompt: str = "prompt"
    target: str = "target"
    subject: str = "subject"
    id: str = "id"
    answer: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    unrelated: tuple[tuple[str, str], ...] = ()
    consequences: tuple[tuple[ConsequenceKind, str, str], ...] = ()
    build: Callable[[Fields], Record] | None = None

    def matches(self, raw: Mapping[str, object]) -> bool:
        """Whether an object has the keys of this layout."""
        return all(key in raw for key in self.all_of) and any(key in raw for key in self.any_of)

    def read(self, raw: Mapping[str, object], *, need_paraphrase: bool = False) -> tuple[Record, Fields]:
        """A raw object as a record, with its problems and unused fields.

        Args:
            raw: the object.
            need_paraphrase: whether a record without a paraphrase has a problem.
        """
        fields = Fields(raw)
        record = self._record(fields) if self.build is None else self.build(fields)
        record = fill_templates(record, fields, self.prompt)
        fields.close()
        if need_paraphrase and not record.paraphrases and not fields.problems:
            fields.problem(self.paraphrases[0], "at least one paraphrase", "none")
        return record, fields

    def _record(self, fields: Fields) -> Record:
        neighbours = [probe for pair in self.neighbours for probe in fields.pairs(*pair)]
        unrelated = [probe for pair in self.unrelated for probe in fields.pairs(*pair)]
        for name, probe in fields.groups("locality"):
            (neighbours if name in _NEIGHBOUR_GROUPS else unrelated).append(probe)
        return Record(
            prompt=fields.prompt(self.prompt),
            target=fields.target(self.target),
            subject=fields.optional(self.subject),
            relation=fields.label("relation"),
            id=fields.label(self.id),
            paraphrases=fields.prompts(*self.paraphrases),
            neighbours=tuple(neighbours),
            unrelated=tuple(unrelated),
            answer=fields.answer(*self.answer),
            consequences=(*self._follow(fields), *_portability(fields)),
        )

    def _follow(self, fields: Fields) -> Iterator[Consequence]:
        for kind, prompt, answer in self.consequences:
            for probe in fields.pairs(prompt, answer):
                yield Consequence(kind, probe.prompt, probe.answer)


_NEIGHBOUR_GROUPS = ("neighborhood", "neighbors", "neighbours")
_PORTABILITY_GROUPS: dict[str, ConsequenceKind] = {
    "": "one_hop",
    "Reasoning": "one_hop",
    "one_hop": "one_hop",
    "mhop": "one_hop",
    "two_hop": "two_hop",
    "Subject_Aliasing": "alias",
    "synonym": "alias",
    "Logical_Generalization": "reversed",
    "Logical_Generation": "reversed",
    "inverse_relation": "reversed",
}
"""What the groups of a nested ``portability`` are called, and the kinds of their prompts."""


def _portability(fields: Fields) -> Iterator[Consequence]:
    for name, probe in fields.groups("portability"):
        if (kind := _PORTABILITY_GROUPS.get(name)) is not None:
            yield Consequence(kind, probe.prompt, probe.answer)
        else:
            fields.pass_over(f"portability.{name}")


@cache
def _record_fields() -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(Record))


def _native(fields: Fields) -> Record:
    """One object with the fields of `Record`, every text exactly as it is; a key that looks misspelt is a problem."""
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


def _counterfact(fields: Fields) -> Record:
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


def _mquake(fields: Fields) -> Record:
    """MQuAKE (Zhong et al. 2023), also with AKEW's additions.

    The questions of the case become one-hop consequences where the chain has two facts, else two-hop ones. A case with
    several rewrites asks what follows from all of them at once, which is not what a record is: one edit.
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
    answer = fields.target("new_answer")
    return dataclasses.replace(
        record, consequences=tuple(Consequence(kind, text, answer) for text in fields.prompts("questions"))
    )


def _rewritten(fields: Fields, rewrite: Fields) -> Record:
    """The edit of a ``requested_rewrite``, as CounterFact and MQuAKE have it."""
    new = rewrite.child("target_new")
    record = Record(
        prompt=rewrite.prompt("prompt"),
        target=new.target("str"),
        subject=rewrite.optional("subject"),
        relation=rewrite.label("relation_id"),
        id=fields.label("case_id"),
        paraphrases=rewrite.prompts("question"),
        answer=rewrite.answer("target_true"),
    )
    new.close()
    rewrite.close()
    return record


def _ripple(fields: Fields) -> Record:
    """RippleEdits (Cohen et al. 2024): an edit as a sentence, and lists of queries on what it implies.

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
                yield one.prompt("prompt"), answer
            elif isinstance(query, dict):
                fields.pass_over(f"{key} (no answer)")
        listed.close()


def _dune(fields: Fields) -> Record:
    """DUNE (Akyürek et al. 2023): an edit as a statement, and queries on what it implies.

    A statement "A = B" is the prompt "A =" with the target "B", and its query a one-hop consequence. Other statements
    have no prompt, and are not read: the first query with its answer is the edit, and the others are its consequences.
    """
    statement, queries = fields.prompt("edits"), fields.get("test_inputs")
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
    return [Probe(question.rstrip(), answer.strip())] if question.strip() and answer.strip() else []


def _is_pair(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


LAYOUTS = (
    Layout(
        "emendo",
        any_of=("paraphrases", "neighbours", "unrelated", "consequences"),
        paraphrases=("paraphrases",),
        build=_native,
    ),
    Layout(
        "RippleEdits",
        any_of=("Subject_Aliasing", "Relation_Specificity", "Compositionality_I", "Compositionality_II"),
        prompt="edit",
        target="edit",
        paraphrases=("edit",),
        build=_ripple,
    ),
    Layout(
        "MQuAKE",
        any_of=("new_single_hops", "new_answer"),
        prompt="requested_rewrite",
        paraphrases=("requested_rewrite",),
        build=_mquake,
    ),
    Layout(
        "CounterFact",
        any_of=("requested_rewrite",),
        prompt="requested_rewrite",
        paraphrases=("paraphrase_prompts",),
        build=_counterfact,
    ),
    Layout(
        "KnowEdit",
        all_of=("target_new",),
        any_of=("portability", "locality"),
        target="target_new",
        id="case_id",
        answer=("ground_truth",),
        paraphrases=("rephrase_prompt", "rephrase"),
        neighbours=(("locality_prompt", "locality_ground_truth"),),
    ),
    Layout(
        "CounterFact, one paraphrase",
        any_of=("target_new", "rephrase_prompt", "locality_prompt"),
        target="target_new",
        id="case_id",
        answer=("ground_truth",),
        paraphrases=("rephrase_prompt", "rephrase"),
        neighbours=(("locality_prompt", "locality_ground_truth"),),
    ),
    Layout(
        "WikiBigEdit",
        any_of=("update", "mhop_ans"),
        prompt="update",
        target="ans",
        paraphrases=("rephrase", "personas"),
        unrelated=(("loc", "loc_ans"),),
        consequences=(("one_hop", "mhop", "mhop_ans"),),
    ),
    Layout(
        "zsRE",
        any_of=("src", "alt"),
        prompt="src",
        target="alt",
        answer=("answers", "pred"),
        paraphrases=("rephrase",),
        unrelated=(("loc", "loc_ans"),),
    ),
    Layout(
        "HalluEditBench",
        all_of=("question", "object"),
        any_of=("question",),
        prompt="question",
        target="object",
        paraphrases=("paraphrased_question",),
        unrelated=(("locality_question", "locality_answer"),),
        consequences=(
            ("one_hop", "question_2hop", "answer_2hop"),
            *(("two_hop", f"question_{n}hop", f"answer_{n}hop") for n in range(3, 7)),
            ("reversed", "reversed_relation_question", "subject"),
        ),
    ),
    Layout(
        "UnKE",
        all_of=("question", "answer"),
        any_of=("question",),
        prompt="question",
        target="answer",
        paraphrases=("para_question",),
        consequences=(("one_hop", "sub_question", "sub_answer"),),
    ),
    Layout(
        "QAEdit",
        all_of=("prompt", "target"),
        any_of=("rephrase", "locality", "portability"),
        paraphrases=("rephrase",),
    ),
    Layout("DUNE", any_of=("test_inputs",), prompt="edits", paraphrases=("paraphrases",), build=_dune),
    Layout("emendo", any_of=("prompt", "target"), paraphrases=("paraphrases",), build=_native),
)
"""In the order in which they are tried."""

KNOWN = (
    "a record with the keys of a known layout: 'prompt' and 'target' (emendo), 'requested_rewrite' (CounterFact, "
    "MQuAKE), 'prompt' and 'target_new' (KnowEdit, CounterFact with one paraphrase), 'src' and 'alt' (zsRE), 'update' "
    "and 'ans' (WikiBigEdit), 'question' and 'answer' (UnKE), 'question' and 'object' (HalluEditBench), or 'edit' and "
    "'Compositionality_I' (RippleEdits)"
)
"""What a record can look like, for an error message."""


def find_layout(raw: Mapping[str, object]) -> Layout | None:
    """The layout of an object; None where no layout has its keys."""
    return next((layout for layout in LAYOUTS if layout.matches(raw)), None)


def prompt_field(raw: Mapping[str, object]) -> str | None:
    """The field with the prompt of an object; None where no layout has its keys."""
    layout = find_layout(raw)
    return None if layout is None else layout.prompt
