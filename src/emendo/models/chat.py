"""How a decoder is given its prompts: as they stand, or as a user's turn in its tokenizer's chat template.

Whatever turns prompts and answers into tokens asks a :class:`Framing` for the text, so that editing, training,
evaluation and generation read the same::

    PLAIN           "The capital of France is" + " " + "Paris"
    chat_framing    "<|user|>The capital of France is<|end|><|assistant|>" + "" + "Paris"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emendo.errors import ModelError


@dataclass(frozen=True, slots=True)
class Framing:
    """How prompts and answers become one text.

    Attributes:
        words: the same for people.
        frame: a prompt to what the model reads before the answer.
        gap: what stands between the two.
        special: whether the tokenizer adds its special tokens; a chat template brings its own.
    """

    words: str
    frame: Callable[[str], str]
    gap: str
    special: bool


PLAIN = Framing("as they stand", str.rstrip, " ", True)
"""The prompt as it stands, a space, and the answer."""


def chat_framing(tokenizer: Any, name: str) -> Framing:
    """The tokenizer's chat template: the prompt is a user's turn, the answer begins the assistant's.

    Args:
        tokenizer: of the model.
        name: of the model, for the error.

    Raises:
        ModelError: the tokenizer has no chat template, or one that does not take a user's turn and an answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"The tokenizer of {name} has no chat template, so no prompt can be put into one: take an "
            "instruction-tuned model, or leave chat out."
        )

    def frame(prompt: str) -> str:
        turn = {"role": "user", "content": prompt.rstrip()}
        text: str = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return text

    try:
        gap = _gap(tokenizer, frame)
    except Exception as error:  # a template is a program, and may raise what it likes
        raise ModelError(
            f"The chat template of {name} does not take a user's turn and an answer: {error}"
        ) from error
    return Framing("a user's turn in the tokenizer's chat template", frame, gap, False)


def _gap(tokenizer: Any, frame: Callable[[str], str]) -> str:
    """The white space that the template puts before an assistant's answer; most put none, Llama 2's a space."""
    asked, answered = "Q", "A"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    whole: str = tokenizer.apply_chat_template(turns, tokenize=False)
    before, begun, rest = whole.partition(frame(asked))
    bare = rest.lstrip()
    return rest[: len(rest) - len(bare)] if begun and not before and bare.startswith(answered) else ""
