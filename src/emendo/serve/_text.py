"""The text of an answer while its tokens arrive: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
"""A decoder's sign for a part of a character."""


class TextStream:
    """Turns tokens into text that can be sent at once and is never taken back.

    Args:
        tokenizer: of the model.
        stop: texts at which the answer ends.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._sent = 0
        self.whole = ""

    def add(self, tokens: Sequence[int], *, last: bool = False) -> tuple[str, bool]:
        """Add tokens.

        Args:
            tokens: the tokens.
            last: whether no more will come.

        Returns:
            The text that can be sent now, and whether a stop text was reached.
        """
        self._ids += tokens
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        found = [at for stop in self._stop if (at := text.find(stop, max(0, self._sent - len(stop)))) >= 0]
        if found:
            self.whole = text[: max(min(found), self._sent)]
            return self._send(len(self.whole)), True
        self.whole = text
        return self._send(len(text) if last else len(text) - self._uncertain(text)), False

    def _send(self, end: int) -> str:
        text, self._sent = self.whole[self._sent : end], max(end, self._sent)
        return text

    def _uncertain(self, text: str) -> int:
        """The number of characters at the end that may change, or be the beginning of a stop text."""
        broken = len(text) - len(text.rstrip(BROKEN))
        starts = [
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        ]
        return max([broken, *starts])
