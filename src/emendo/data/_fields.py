"""Typed access to the fields of one raw record, which notes its problems and its unused fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard, TypeVar, cast

from emendo.data.schema import CONSEQUENCES, MALFORMED, Consequence, ConsequenceKind, Probe, Record

_P = TypeVar("_P", Probe, Consequence)
_SUBJECT_SLOT = re.compile(r"(?<!\{)\{(?:|0|s|x|subj|subject|entity)\}(?!\})|\[X\]|\[(?i:subj|subject)\]")
_ANSWER_SLOT = re.compile(r"\[Y\]\W*$")
_PROMPTS = ("prompt", "question", "loc", "New Question")  # of a nested object
_ANSWERS = ("ground_truth", "answer", "answers", "target", "target_new", "loc_ans", "New Answer")
_EMPTY: tuple[object, ...] = (None, "", [], {})
_INDEX = re.compile(r"\[[0-9]+\]")
_ALTERNATIVES = 3  # depth of a list of lists of alternative answers


@dataclass(slots=True)
class Fields:
    """Takes typed fields out of a raw object.

    Texts are returned exactly as they are. A method returns an empty value for a field that is wrong, so that one pass
    finds every problem of a record. An optional field may be absent, null or blank.

    Attributes:
        raw: the object.
        prefix: of the names of its fields, for a nested object.
        problems: of the record: field, expected, found and reason.
        unused: names of fields that are not read.
        used: keys that were read.
    """

    raw: Mapping[str, object]
    prefix: str = ""
    problems: list[tuple[str, str, str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def get(self, key: str) -> object:
        """A field as it is; None where it is absent."""
        self.used.add(key)
        return self.raw.get(key)

    def child(self, key: str) -> Fields:
        """A nested object that must be there; its problems and unused fields are those of the record."""
        return self.nested(key, self.get(key))

    def nested(self, name: str, value: object) -> Fields:
        """The fields of a value in this record."""
        if not isinstance(value, dict):
            self.problem(name, "an object", describe(value))
            value = {}
        return Fields(value, f"{self.prefix}{name}.", self.problems, self.unused)

    def problem(self, key: str, expected: str, found: str, reason: str = MALFORMED) -> None:
        """Note a problem of the record."""
        self.problems.append((self.prefix + key, expected, found, reason))

    def pass_over(self, key: str) -> None:
        """Note a field, or a part of one, that is not read."""
        self.unused.append(_INDEX.sub("[]", self.prefix + key))

    def close(self) -> None:
        """Note the fields that nothing has read, unless they are empty."""
        for key, value in self.raw.items():
            if key not in self.used and value not in _EMPTY:
                self.pass_over(key)

    # One text

    def text(self, key: str) -> str:
        """A required text."""
        return self._text(key, self.get(key), missing=key not in self.raw)

    def optional(self, key: str) -> str | None:
        """A text as it is, or None."""
        value = self.get(key)
        return (
            None
            if value is None or (isinstance(value, str) and not value.strip())
            else self._text(key, value)
        )

    def separator(self, key: str) -> str | None:
        """A text that may be empty or white space; None where it is absent or null."""
        value = self.get(key)
        if value is None or value == "" or (isinstance(value, str) and value.isspace()):
            return value
        return self._text(key, value)

    def label(self, key: str) -> str | None:
        """A text or a whole number, as text, or None."""
        value = self.get(key)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self.optional(key)

    def answer(self, *keys: str) -> str | None:
        """The first answer among optional fields that hold a text, a number, or alternatives in a list (of lists)."""
        found = None
        for key in keys:
            answers = self._alternatives(key, self.get(key))
            found = found or next(iter(answers), None)
        return found

    # Several

    def prompts(self, *keys: str) -> tuple[str, ...]:
        """Prompts of optional fields, each a text or a list of texts."""
        found: list[str] = []
        for key in keys:
            value = self.get(key)
            if isinstance(value, list):
                found += [self._text(f"{key}[{i}]", item) for i, item in enumerate(value)]
            elif (text := self.optional(key)) is not None:
                found.append(text)
        return tuple(found)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, exactly as they are; empty where the field is absent or null."""
        items = self._list(key, "a list of non-empty texts")
        return tuple(self._text(f"{key}[{i}]", item) for i, item in enumerate(items))

    def probes(self, key: str) -> tuple[Probe, ...]:
        """A list of objects with ``prompt`` and ``answer``; empty where the field is absent or null."""
        return tuple(Probe(one.text("prompt"), one.text("answer")) for one in self._objects(key))

    def consequences(self, key: str) -> tuple[Consequence, ...]:
        """A list of objects with ``kind``, ``prompt`` and ``answer``; empty where the field is absent or null."""
        found = []
        for one in self._objects(key):
            kind = one.raw.get("kind")
            if kind not in CONSEQUENCES:
                one.problem("kind", f"one of {', '.join(CONSEQUENCES)}", describe(kind))
            found.append(Consequence(cast(ConsequenceKind, kind), one.text("prompt"), one.text("answer")))
        return tuple(found)

    def pairs(self, prompt: str, answer: str) -> tuple[Probe, ...]:
        """Prompts of an optional field with the answers of another, both texts or lists; without an answer unused."""
        prompts, answers = self.get(prompt), self.get(answer)
        if isinstance(prompts, list) and isinstance(answers, list):
            return tuple(
                probe
                for i, (text, found) in enumerate(zip(prompts, answers, strict=False))
                for probe in self._pair(f"{prompt}[{i}]", text, f"{answer}[{i}]", found)
            )
        return tuple(self._pair(prompt, prompts, answer, answers))

    def groups(self, key: str) -> Iterator[tuple[str, Probe]]:
        """Prompts with answers of an optional nested field, each with the name of its group.

        The field is an object of groups by name, or one group without a name. A group is a list of objects with a
        prompt and an answer, one such object, or an object with a list of each.
        """
        value = self.get(key)
        if isinstance(value, dict) and not _is_group(value):
            for name, group in value.items():
                yield from ((name, probe) for probe in self._group(f"{key}.{name}", group))
        else:
            yield from (("", probe) for probe in self._group(key, value))

    def _group(self, name: str, value: object) -> Iterator[Probe]:
        for item in value if isinstance(value, list) else [value]:
            if _is_group(item):
                one = Fields(item, f"{self.prefix}{name}.", self.problems, self.unused)
                prompt = next(key for key in _PROMPTS if key in one.raw)
                answer = next((key for key in _ANSWERS if key in one.raw), _ANSWERS[0])
                yield from one.pairs(prompt, answer)
                one.close()
            elif item not in _EMPTY:
                self.pass_over(name)

    def _pair(self, prompt_name: str, prompt: object, answer_name: str, answer: object) -> Iterator[Probe]:
        if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
            return
        texts = self._alternatives(answer_name, answer)
        prompts = prompt if isinstance(prompt, list) else [prompt]
        for text in prompts:
            if texts:
                yield Probe(self._text(prompt_name, text), texts[0])
            else:
                self.pass_over(f"{prompt_name} (no answer)")

    def _alternatives(self, name: str, value: object, depth: int = 0) -> list[str]:
        """The answers that a value spells, each as good as the others; all but the first are not read."""
        if isinstance(value, list) and depth < _ALTERNATIVES:
            found = [text for item in value for text in self._alternatives(name, item, depth + 1)]
        elif isinstance(value, dict) and ("str" in value or "value" in value) and depth < _ALTERNATIVES:
            found = self._alternatives(name, value.get("str", value.get("value")), depth + 1)
        elif isinstance(value, str):
            found = [value] if value.strip() else []
            for text in found:
                self._text(name, text)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found = [str(value)]
        else:
            found = []
            if value is not None and value != {}:
                self.problem(name, "a text or a list of texts", describe(value))
        if depth == 0 and len(found) > 1:
            self.pass_over(f"{name}[1:]")
        return found

    def _objects(self, key: str) -> Iterator[Fields]:
        for i, item in enumerate(self._list(key, "a list of objects with 'prompt' and 'answer'")):
            if isinstance(item, dict):
                yield Fields(item, f"{self.prefix}{key}[{i}].", self.problems, self.unused)
            else:
                self.problem(f"{key}[{i}]", "an object with 'prompt' and 'answer'", describe(item))

    def _list(self, key: str, expected: str) -> list[object]:
        value = self.get(key)
        if value is None or isinstance(value, list):
            return value or []
        self.problem(key, expected, describe(value))
        return []

    def _text(self, key: str, value: object, missing: bool = False) -> str:
        if not isinstance(value, str) or not value.strip():
            self.problem(key, "a non-empty text", "nothing" if missing else describe(value))
            return ""
        if not value.isascii() and (lone := _lone_surrogate(value)):
            self.problem(key, "valid Unicode", f"the lone surrogate {lone!r} in {describe(value)}")
            return ""
        return value


def fill_templates(record: Record, fields: Fields, prompt_field: str) -> Record:
    """Put the subject in place of ``{}`` or ``[X]`` in every prompt of a record.

    In a template with ``[X]``, a ``[Y]`` at the end is the answer's place and is cut off; of prompts that have it
    elsewhere, the record's own is a problem and others are not read.

    Args:
        record: as it was read.
        fields: of the record.
        prompt_field: the field that the record's prompt was read from.
    """
    probes: list[Probe | Consequence] = [*record.neighbours, *record.unrelated, *record.consequences]
    texts = (record.prompt, *record.paraphrases, *(probe.prompt for probe in probes))
    template = next(
        (text for text in texts if ("{" in text or "[" in text) and _SUBJECT_SLOT.search(text)), None
    )
    if template is None:
        return record
    subject = record.subject
    if subject is None:
        name = prompt_field if template == record.prompt else "subject"
        fields.problem(name, "a subject to fill a template with", f"none, and {describe(template)}")
        return record

    def fill(text: str) -> str:
        if not _SUBJECT_SLOT.search(text):
            return text
        return _SUBJECT_SLOT.sub(lambda _: subject, _ANSWER_SLOT.sub("", text))

    def filled(probes: Iterable[_P], name: str) -> tuple[_P, ...]:
        found = [replace(probe, prompt=fill(probe.prompt)) for probe in probes]
        return tuple(probe for probe in found if complete(probe.prompt, name))

    def complete(text: str, name: str) -> bool:
        if "[Y]" in text:
            fields.pass_over(f"{name} (answer not at the end)")
        return "[Y]" not in text

    prompt = fill(record.prompt)
    if "[Y]" in prompt:
        fields.problem(prompt_field, "the answer's place '[Y]' at the end", describe(record.prompt))
    return replace(
        record,
        prompt=prompt,
        paraphrases=tuple(text for text in map(fill, record.paraphrases) if complete(text, "paraphrases")),
        neighbours=filled(record.neighbours, "neighbours"),
        unrelated=filled(record.unrelated, "unrelated"),
        consequences=filled(record.consequences, "consequences"),
    )


def _is_group(value: object) -> TypeGuard[dict[str, object]]:
    """Whether an object has a prompt of its own, or a list of prompts."""
    return isinstance(value, dict) and any(_is_text(value.get(key)) for key in _PROMPTS)


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _lone_surrogate(text: str) -> str:
    return next((char for char in text if "\ud800" <= char <= "\udfff"), "")


def describe(value: object) -> str:
    """A JSON value in a few words, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, str):
        if not value.strip():
            return "only whitespace" if value else "an empty text"
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if isinstance(value, bool | int | float):
        text = str(value).lower()
        return f"the {'boolean' if isinstance(value, bool) else 'number'} {text[:40]}" + "..." * (
            len(text) > 40
        )
    kind = "a list" if isinstance(value, list) else "an object"
    return f"{kind} of length {len(value)}" if isinstance(value, list | dict) else f"{value!r}"
