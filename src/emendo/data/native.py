"""The native layout: one JSON object with the fields of `Record`."""

import dataclasses
import difflib

from emendo.data.schema import Fields, Record

KEYS = frozenset({"prompt", "target", "paraphrases", "neighbours", "unrelated"})
PARAPHRASE = "paraphrases"
_NAMES = tuple(field.name for field in dataclasses.fields(Record))


def to_record(fields: Fields) -> Record:
    """Maps a native object to a record; other keys are ignored unless they look like a misspelt field."""
    for key in fields.raw.keys() - set(_NAMES):
        for meant in difflib.get_close_matches(key, _NAMES, n=1, cutoff=0.85):
            if meant not in fields.raw:
                fields.note(key, f"the field name '{meant}'", "a name that is not in the schema")
    answer = fields.optional("answer")
    return Record(
        prompt=fields.text("prompt").rstrip(),
        target=fields.text("target").strip(),
        subject=fields.optional("subject"),
        relation=fields.optional("relation"),
        id=fields.label("id"),
        paraphrases=tuple(text.rstrip() for text in fields.texts("paraphrases")),
        neighbours=fields.probes("neighbours"),
        unrelated=fields.probes("unrelated"),
        answer=answer and answer.strip(),
        consequences=fields.consequences("consequences"),
    )
