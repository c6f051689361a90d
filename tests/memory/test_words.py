"""Words of prompts against slow references, and the cases that names make hard."""

from __future__ import annotations

from math import log, sqrt

import pytest

from emendo.memory.words import EVIDENCE, Prompt, Rarity, compare, ending, occurs, rarity, words


def evidence(edit: str, query: str, subject: str | None = None) -> dict[str, float]:
    return dict(zip(EVIDENCE, compare(Prompt.read(edit, subject), Prompt.read(query)), strict=True))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The capital of Côte d'Ivoire is", ("the", "capital", "of", "côte", "d", "ivoire", "is")),
        ("法国的首都是", ("法", "国", "的", "首", "都", "是")),
        ("Windows 98, a product of", ("windows", "98", "a", "product", "of")),
        ("e\u0301a", ("éa",)),
        ("…", ()),
    ],
)
def test_words_are_normalised(text: str, found: tuple[str, ...]) -> None:
    assert words(text) == found


def test_rarity_is_the_log_of_the_share() -> None:
    texts = ["a b", "a c", "a b", "d"]
    rare = Rarity.of(texts, least=2)
    assert rare("a") == pytest.approx(log(4 / 3), abs=0.005)
    assert rare("b") == pytest.approx(log(2), abs=0.005)
    assert rare("c") == rare("never seen") == pytest.approx(log(4), abs=0.005)


def test_cosine_and_mass_are_those_of_sparse_vectors() -> None:
    edit, query = "The capital of Australia is", "Tourists in Australia visit the capital called"
    one, two = ({word: rarity()(word) for word in words(text)} for text in (edit, query))
    dot = sum(one[word] * two[word] for word in one if word in two)
    lengths = [sqrt(sum(value**2 for value in vector.values())) for vector in (one, two)]
    found = evidence(edit, query)
    assert found["cosine"] == pytest.approx(dot / lengths[0] / lengths[1])
    assert found["mass"] == pytest.approx(sum(one[w] for w in one if w in two) / sum(one.values()))
    own = words("Australia")
    one, two = ({w: v for w, v in vector.items() if w not in own} for vector in (one, two))
    lengths = [sqrt(sum(value**2 for value in vector.values())) for vector in (one, two)]
    dot = sum(one[word] * two[word] for word in one if word in two)
    assert found["rest"] == pytest.approx(dot / lengths[0] / lengths[1])


@pytest.mark.parametrize(
    ("subject", "query", "stands", "inside"),
    [
        ("Malik", "The religion of Malik is", 1, 0),
        ("Malik", "The religion of Abd al-Malik is", 1, 1),
        ("Honorius", "The father of Pope Honorius was", 1, 1),
        ("Honorius", "Pope Honorius was born in", 1, 0),  # a word that begins a sentence may be no name
        ("Danielle Darrieux", "Where Danielle Darrieux is from, people speak", 1, 0),
        ("Danielle Darrieux", "It rained. Danielle Darrieux speaks", 1, 0),
        ("Danielle Darrieux", "Danielle speaks", 0, 0),
        ("Japan", "Where is Japan? It is located in", 1, 0),
        ("Paris", "Paris, Texas lies in the state of. And Paris is", 1, 0),
        ("Ivory Coast", "the IVORY coast borders", 1, 0),
        ("Bridge", "The length of the Birthplace Bridge is", 1, 0),  # a word of the edit's prompt
    ],
)
def test_a_name_may_stand_within_a_longer_one(subject: str, query: str, stands: int, inside: int) -> None:
    found = evidence(f"The birthplace of {subject} is", query, subject)
    assert (found["subject"], found["inside"]) == (stands, inside)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("In Samoa, people speak", ("samoa",)),
        ("The law in Posio declares the language", ("posio",)),
        ("U2 was formulated in", ("u2",)),  # the longest word is a common one
        ("Big Love premieres on", ("big", "love")),  # and "premieres" is rare, but no name
    ],
)
def test_the_guessed_subject_is_a_name(prompt: str, subject: tuple[str, ...]) -> None:
    assert Prompt.read(prompt).subject == subject


def test_an_abbreviation_has_the_letters_of_the_name() -> None:
    assert evidence("The capital of France is", "The capital of the country with the ISO code FRA is")[
        "abbreviation"
    ]
    assert not evidence("The capital of Peru is", "The capital of the country with the ISO code FRA is")[
        "abbreviation"
    ]


def test_occurrences_have_no_gaps() -> None:
    assert occurs(("new", "york"), words("In New York it rains"))
    assert not occurs(("new", "york"), words("The new mayor of York"))
    assert not occurs((), ("a",))


def test_evidence_is_a_share() -> None:
    for edit, query in [("", "a"), ("a", ""), ("…", "…"), ("The capital of X is", "The capital of X is")]:
        assert all(0 <= value <= 1 + 1e-9 for value in compare(Prompt.read(edit), Prompt.read(query)))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("The capital of Peru is", "The capital of Peru is"),
        ("  Two\n lines ", "  Two\n lines "),
        ("long " * 50 + "Peru", "long " * 50 + "Peru"),  # one sentence
        ("A word. " * 30 + "The capital of Peru is", "A word. " * 17 + "The capital of Peru is"),
        ("Peru. " + "long " * 45 + "ago. It rains.\nSo", "It rains.\nSo"),
        (
            "秘鲁在南美洲。" * 5 + "首都是利马。" * 5 + "秘鲁的首都是",
            "秘鲁在南美洲。" + "首都是利马。" * 5 + "秘鲁的首都是",
        ),
    ],
)
def test_of_a_long_text_the_last_sentences_are_read(text: str, end: str) -> None:
    assert ending(text) == end
    assert Prompt.read(text).text == end
