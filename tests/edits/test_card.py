"""The card of an edit lists its requests, its method and the measured side effects."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from emendo.edits import Origin, Request
from emendo.edits._card import card_of

ORIGIN = Origin(
    fingerprint="0123456789abcdef-0123",
    model="some/model",
    editor="mend",
    settings={"rank": 256},
    requests=(Request("The capital of X | Y is", "Old Town"),),
    date="2025-01-31T12:00:00",
    version="1.2.3",
    upon=("a", "b"),
)
CARD = {
    "target_before": 0.01234567,
    "reached": True,
    "rank": 7,
    "note": "a text is not a figure",
    "rows": [
        {
            "kind": "edit",
            "prompt": "The capital",
            "before": [{"text": "is", "probability": 0.5}],
            "after": [{"text": "Old", "probability": 0.875}, {"text": "is", "probability": 0.1}],
        }
    ],
}


def test_a_card_states_requests_method_and_figures() -> None:
    card = card_of(ORIGIN, CARD)
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.tags) == (
        "emendo",
        "some/model",
        ["model-editing", "emendo"],
    )
    assert "| The capital of X \\| Y is | Old Town |" in card
    assert "mend of emendo 1.2.3 on 2025-01-31T12:00:00, upon 2 earlier edit(s)" in card
    assert "fingerprint `0123456789abcdef-0123`" in card and "rank = 256" in card
    assert "| target before | 0.01235 |" in card and "| reached | yes |" in card and "| rank | 7 |" in card
    assert "a text is not a figure" not in card
    assert "| edit | The capital | is (50.0%) | Old (87.5%) |" in card
    assert "emendo export" in card


def test_an_adapter_states_its_library_and_its_error() -> None:
    card = card_of(ORIGIN, {}, library="peft", notes=["Cut to rank 4."])
    assert ModelCard(card).data.library_name == "peft" and "lora" in ModelCard(card).data.tags
    assert card.endswith("Cut to rank 4.\n")
    assert "Nothing was measured." in card


def test_a_card_does_not_list_thousands_of_requests() -> None:
    many = Origin("f", "m", "mend", {}, tuple(Request(f"p{i}", "t") for i in range(60)), "2025-01-31")
    card = card_of(many, {})
    assert "| p49 | t |" in card and "| p50 | t |" not in card
    assert "and 10 more" in card


@pytest.mark.parametrize(
    "text",
    [
        "<img src=https://x.org/a.png>",
        "![a](https://x.org/a.png)",
        "a`b```c",
        "a | b | c",
        "[click](javascript:alert(1))",
        "&lt;script>",
        "a\n# heading\n---",
        "\x1b[2J\x9b\u202e",
    ],
)
def test_text_from_data_adds_no_markup(text: str) -> None:
    """Rendered as Markdown, every text of a card is one piece of plain text, wherever it stands."""
    origin = Origin(
        "f", text, text, {"a": text}, (Request(text + "p", text + "t"),), text, version=text, upon=("a",)
    )
    answer = [{"text": text, "probability": 0.5}]
    rows = [{"kind": text, "prompt": text, "before": answer, "after": answer}]
    card = card_of(origin, {text: 1.0, "rows": rows})
    body = MarkdownIt("gfm-like", {"linkify": False}).render(ModelCard(card).text)
    plain = {"&lt;script>": "&amp;lt;script&gt;", "a\n# heading\n---": "a # heading ---"}
    assert body.count("<h1>") == 1 and body.count("<tr>") == 6 and body.count("<td>") == 8
    assert not re.search(r"<(img|script|a |code)", body.partition("<h2>Use")[0].replace("<code>f</code>", ""))
    if text in plain:
        assert body.count(plain[text]) >= 10
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", card)


def test_rows_of_another_shape_are_left_out() -> None:
    for rows in (3, [3], [{"kind": 1}], [{"kind": "a", "prompt": "b", "before": [1], "after": []}]):
        assert "## Answers" not in card_of(ORIGIN, {"rows": rows})
