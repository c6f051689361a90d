"""The card of an edit says what was changed, why, by what, and with what measured side effects."""

from __future__ import annotations

from emendo.edits._card import card_of
from emendo.edits.provenance import Origin, Request

ORIGIN = Origin(
    fingerprint="0123456789abcdef",
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
    "note": "a text is no figure",
    "rows": [
        {
            "kind": "edit",
            "prompt": "The capital",
            "before": [{"text": "is", "probability": 0.5}],
            "after": [{"text": "Old", "probability": 0.875}, {"text": "is", "probability": 0.1}],
        }
    ],
}


def test_what_a_card_says() -> None:
    card = card_of(ORIGIN, CARD)
    assert card.startswith('---\nlibrary_name: "emendo"\nbase_model: "some/model"\n')
    assert "| The capital of X \\| Y is | Old Town |" in card
    assert "`mend` of emendo 1.2.3 on 2025-01-31T12:00:00, upon 2 earlier edit(s)" in card
    assert "fingerprint `0123456789abcdef`" in card and "rank = 256" in card
    assert "| target before | 0.01235 |" in card and "| reached | yes |" in card and "| rank | 7 |" in card
    assert "a text is no figure" not in card
    assert "| edit | The capital | is (50.0%) | Old (87.5%) |" in card
    assert "emendo export" in card


def test_an_adapter_names_its_library_and_what_was_cut() -> None:
    card = card_of(ORIGIN, {}, library="peft", notes=["Cut to rank 4."])
    assert 'library_name: "peft"' in card and '"lora"' in card
    assert card.endswith("Cut to rank 4.\n")
    assert "Nothing was measured." in card


def test_a_card_does_not_list_thousands_of_requests() -> None:
    many = Origin("f", "m", "mend", {}, tuple(Request(f"p{i}", "t") for i in range(60)), "2025-01-31")
    card = card_of(many, {})
    assert "| p49 | t |" in card and "| p50 | t |" not in card
    assert "and 10 more" in card
