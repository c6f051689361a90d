"""JSON from a stream: one value at a time, with repeated keys noted and long integers accepted."""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from emendo.data.schema import Problem
from emendo.errors import DataError

CHUNK = 1 << 16
"""Bytes that are read at once."""
LARGEST = 1 << 26
"""Bytes of the largest value."""

_DIGITS = 4000  # of the longest whole number; Python itself refuses more than 4300


@dataclass(frozen=True, slots=True)
class LongInteger:
    """Stands for a whole number of too many digits."""

    digits: int

    def __repr__(self) -> str:
        return f"a whole number of {self.digits} digits"


def refuse_bytes(name: str, byte: int) -> NoReturn:
    """Raise the error for a byte that is not UTF-8."""
    raise DataError(
        f"{name} is not a UTF-8 text file (byte {byte} is not valid); save it in UTF-8, with iconv for example"
    )


def refuse_size(name: str, line: int) -> NoReturn:
    """Raise the error for a value larger than :data:`LARGEST`."""
    raise DataError(f"{name}:{line}: a record is larger than {LARGEST >> 20} MiB")


class Decoder(json.JSONDecoder):
    """Decodes JSON, notes keys that an object gives twice, and puts a :class:`LongInteger` for a long one."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_int=_integer)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated += [key for key in found if keys.count(key) > 1]
        return found

    def repeated(self) -> tuple[str, ...]:
        """The keys given twice since the last call."""
        found = tuple(self._repeated)
        self._repeated.clear()
        return found


def _integer(digits: str) -> object:
    return int(digits) if len(digits) <= _DIGITS else LongInteger(len(digits))


class Window:
    """A piece of a file's text, from which JSON values are taken one after the other.

    Args:
        file: at the byte ``start``.
        name: of the file, for messages.
        start: the byte of the next character.
    """

    def __init__(self, file: BinaryIO, name: str, start: int) -> None:
        self._file, self._name = file, name
        self._text, self._at = "", 0
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._read = start
        self._decoder = Decoder()
        self.start, self.line = start, 1

    def peek(self) -> str:
        """The next character that is no white space; an empty text at the end of the file."""
        while True:
            at = self._at
            while at < len(self._text) and self._text[at] in " \t\r\n":
                at += 1
            self._advance(at)
            if at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Pass over one character."""
        self._advance(self._at + 1)

    def value(self) -> tuple[object, tuple[str, ...]]:
        """The next value, and the keys that it gives twice.

        Raises:
            DataError: there is no valid value here.
        """
        self.peek()
        while True:
            try:
                found, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                offset = error.pos - self._at
                if cut and self._fill():
                    continue
                self._advance(self._at + offset)
                self.refuse("valid JSON")
            except RecursionError:
                self.refuse("JSON that is nested less deeply")
            size, repeated, complete = end - self._at, self._decoder.repeated(), end < len(self._text)
            if complete or not self._fill():  # a number may go on
                self._advance(self._at + size)
                return found, repeated

    def refuse(self, expected: str) -> NoReturn:
        """Raise the error for the text that comes next."""
        self.peek()
        found = (
            repr(self._text[self._at : self._at + 40]) if self._text[self._at :] else "the end of the file"
        )
        raise DataError(str(Problem(self._name, self.line, "", expected, found)))

    def _advance(self, at: int) -> None:
        passed = self._text[self._at : at]
        self.line += passed.count("\n")
        self.start += len(passed) if passed.isascii() else len(passed.encode())
        self._at = at

    def _fill(self) -> bool:
        """Read as much again as is waiting; False at the end of the file."""
        self._decoder.repeated()
        waiting = len(self._text) - self._at
        if waiting > LARGEST:
            refuse_size(self._name, self.line)
        content = self._file.read(max(CHUNK, waiting))
        pending = len(self._decode.getstate()[0])
        try:
            more = self._decode.decode(content, final=not content)
        except UnicodeDecodeError as error:
            refuse_bytes(self._name, self._read - pending + error.start)
        self._read += len(content)
        self._text, self._at = self._text[self._at :] + more, 0
        return bool(content)
