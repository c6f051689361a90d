"""Layouts of record files: which fields of a published data set go where in a :class:`Record`.

A layout with one object a record is an entry of :data:`LAYOUTS` that names its fields. One whose records must be taken
apart has a function in :mod:`emendo.data._builders`. The layout of a file is the first whose keys its first record has.
To add one, add an entry and, to ``tests/data/layouts.py``, a sample; ``docs/data.md`` is checked against this list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from emendo.data import _builders
from emendo.data._fields import Fields, fill_templates
from emendo.data.schema import Consequence, ConsequenceKind, Record


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
        build: makes a record that the other attributes cannot describe.
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
            prompt=fields.text(self.prompt),
            target=fields.text(self.target),
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
"""Names of the groups in a nested ``portability``, and the kinds of their prompts."""


def _portability(fields: Fields) -> Iterator[Consequence]:
    for name, probe in fields.groups("portability"):
        if (kind := _PORTABILITY_GROUPS.get(name)) is not None:
            yield Consequence(kind, probe.prompt, probe.answer)
        else:
            fields.pass_over(f"portability.{name}")


_ONE_PARAPHRASE = Layout(
    "CounterFact, one paraphrase",
    any_of=("target_new", "rephrase_prompt", "locality_prompt"),
    target="target_new",
    id="case_id",
    answer=("ground_truth",),
    paraphrases=("rephrase_prompt", "rephrase"),
    neighbours=(("locality_prompt", "locality_ground_truth"),),
)
LAYOUTS = (
    Layout(
        "emendo",
        any_of=("paraphrases", "neighbours", "unrelated", "consequences"),
        paraphrases=("paraphrases",),
        build=_builders.native,
    ),
    Layout(
        "RippleEdits",
        any_of=("Subject_Aliasing", "Relation_Specificity", "Compositionality_I", "Compositionality_II"),
        prompt="edit",
        target="edit",
        paraphrases=("edit",),
        build=_builders.ripple,
    ),
    Layout(
        "MQuAKE",
        any_of=("new_single_hops", "new_answer"),
        prompt="requested_rewrite",
        paraphrases=("requested_rewrite",),
        build=_builders.mquake,
    ),
    Layout(
        "CounterFact",
        any_of=("requested_rewrite",),
        prompt="requested_rewrite",
        paraphrases=("paraphrase_prompts",),
        build=_builders.counterfact,
    ),
    replace(_ONE_PARAPHRASE, name="KnowEdit", all_of=("target_new",), any_of=("portability", "locality")),
    _ONE_PARAPHRASE,
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
    Layout(
        "DUNE", any_of=("test_inputs",), prompt="edits", paraphrases=("paraphrases",), build=_builders.dune
    ),
    Layout(
        "KILT",
        all_of=("input", "output"),
        any_of=("id", "prediction", "alternatives"),
        prompt="input",
        target="alternatives",
        paraphrases=("filtered_rephrases",),
        build=_builders.kilt,
    ),
    Layout(
        "Wikitext generation",
        all_of=("completions", "original"),
        any_of=("completions",),
        prompt="completions",
        target="completions",
        paraphrases=("completions",),
        build=_builders.generation,
    ),
    Layout("emendo", any_of=("prompt", "target"), paraphrases=("paraphrases",), build=_builders.native),
)
"""In the order in which they are tried."""

KNOWN = (
    "a record with the keys of a known layout: 'prompt' and 'target' (emendo), 'requested_rewrite' (CounterFact, "
    "MQuAKE), 'prompt' and 'target_new' (KnowEdit, CounterFact with one paraphrase), 'src' and 'alt' (zsRE), 'update' "
    "and 'ans' (WikiBigEdit), 'input' and 'output' (KILT), 'completions' and 'original' (Wikitext generation), "
    "'question' and 'answer' (UnKE), 'question' and 'object' (HalluEditBench), or 'edit' and "
    "'Compositionality_I' (RippleEdits)"
)
"""The forms of a record, for an error message."""


def find_layout(raw: Mapping[str, object]) -> Layout | None:
    """The layout of an object; None where no layout has its keys."""
    return next((layout for layout in LAYOUTS if layout.matches(raw)), None)


def prompt_field(raw: Mapping[str, object]) -> str | None:
    """The field with the prompt of an object; None where no layout has its keys."""
    layout = find_layout(raw)
    return None if layout is None else layout.prompt
