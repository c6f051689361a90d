"""What a conversation asks."""

from __future__ import annotations

import pytest

from emendo.memory.turns import questions

ABOUT = "Tell me about Peru."


@pytest.mark.parametrize(
    ("turns", "texts"),
    [
        ([], []),
        ([ABOUT], [ABOUT]),
        (["…", "What is it?"], ["What is it?"]),
        (["What is it?"], ["What is it?"]),  # nothing before
        ([ABOUT, "Hello!"], ["Hello!"]),
        ([ABOUT, "", "What is its capital?"], ["What is its capital?", "What is Peru's capital?"]),
        ([ABOUT, "And Chile?", "Where is it?"], ["Where is it?", "Where is Chile?"]),  # the nearest name
        (
            [ABOUT, "Thanks, go on.", "Where is it?"],  # which is perhaps a name
            ["Where is it?", "Where is Thanks?", "Where is Peru?"],
        ),
        (
            ["tell me about peru", "Where is it, who are her neighbours, and who likes her?"],
            [
                "Where is it, who are her neighbours, and who likes her?",
                "Where is peru, who are peru's neighbours, and who likes peru?",
            ],
        ),
    ],
)
def test_a_pronoun_is_read_with_a_name_for_it(turns: list[str], texts: list[str]) -> None:
    assert questions(turns) == texts
