"""Which edits a neighbour's prompt asks for: facts of one data set are each other's neighbours.

A record's neighbour has the record's relation. It asks for the fact of another record whose subject it names, if that
one has the same relation: by its name where both records have one, else by the wordings (CounterFact in the layout
with one paraphrase names no relations).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from emendo.data.schema import Record
from emendo.memory.words import Prompt, compare, words

_LONGEST = 12  # words of a name


class SameFact:
    """The facts of some records.

    Two wordings ask for one relation if they are the same or those of one record. A wording is a prompt with a mark for
    the subject, without the sentences in front of it.

    Args:
        records: the records that are edited.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._wordings = [_wordings(record) for record in records]
        self._together: dict[str, set[str]] = defaultdict(set)
        self._by_name: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for number, (record, own) in enumerate(zip(records, self._wordings, strict=True)):
            for wording in own:
                self._together[wording] |= own
            if record.subject:
                self._by_name[words(record.subject)].append(number)

    def asked(self, prompt: str, like: int) -> list[int]:
        """The numbers of the records whose fact a neighbour's prompt asks for.

        Args:
            prompt: the prompt.
            like: the number of the record whose neighbour it is.
        """
        return [number for number in self._named(prompt) if self._is_relation(number, prompt, like)]

    def _named(self, prompt: str) -> Iterator[int]:
        """The records whose subject stands in a prompt, and not within a longer name."""
        found = words(prompt)
        names = {
            found[at:end]
            for at in range(len(found))
            for end in range(at + 1, min(len(found), at + _LONGEST) + 1)
        }
        query = Prompt.read(prompt)
        for name in sorted(names & self._by_name.keys()):
            for number in self._by_name[name]:
                record = self._records[number]
                if (record.subject or "") in prompt:
                    stands, inside, *_ = compare(Prompt.read(record.prompt, record.subject), query)
                    if stands and not inside:
                        yield number

    def _is_relation(self, number: int, prompt: str, like: int) -> bool:
        one, other = self._records[number], self._records[like]
        if one.relation is not None and other.relation is not None:
            return one.relation == other.relation
        own, asked = self._wordings[number], _wording(prompt, one.subject or "")
        return bool(own & (self._wordings[like] | self._together.get(asked, {asked})))


def _wordings(record: Record) -> set[str]:
    """The wordings of a record that name its subject."""
    name = record.subject
    return {_wording(text, name) for text in (record.prompt, *record.paraphrases) if name and name in text}


def _wording(text: str, name: str) -> str:
    marked = text.replace(name, "{}")
    last = marked.rpartition(". ")[2]
    return last if "{}" in last else marked
