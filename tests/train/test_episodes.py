"""What an edit is trained on: a function of the seed and the step alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from cases import build_lm, records
from emendo.data import Probe, Record
from emendo.errors import RequestError, TrainingError
from emendo.models.lm import LM
from emendo.models.text import Text
from emendo.models.tokenization import encode
from emendo.train import episodes as module
from emendo.train.config import TrainConfig
from emendo.train.episodes import Episodes


@pytest.fixture(scope="module")
def lm() -> LM:
    return build_lm("llama")


def _two_relations(count: int) -> list[Record]:
    """Half of the records are of another relation, so that siblings can be told."""
    made = records(count)
    return [
        replace(r, relation="river", prompt=r.prompt.replace("capital", "river")) if i % 2 else r
        for i, r in enumerate(made)
    ]


def _encoded(lm: LM, prompt: str, answer: str) -> Text:
    return encode(lm.tokenizer, [(prompt, answer)])[0]


def test_a_step_is_the_same_batch_again_and_in_another_object(lm: LM) -> None:
    config = TrainConfig(batch=4, near=1, sibling=1, unrelated=2, seed=5)
    one, other = Episodes(lm, records(10), config), Episodes(lm, records(10), config)
    steps = [one.batch(step) for step in range(8)]
    assert [other.batch(step) for step in reversed(range(8))] == steps[::-1]
    assert [one.batch(step) for step in range(8)] == steps


def test_another_seed_is_another_order(lm: LM) -> None:
    batches = [Episodes(lm, records(20), TrainConfig(batch=8, seed=seed)).batch(0) for seed in (0, 1)]
    assert batches[0] != batches[1]


def test_every_record_once_in_every_epoch(lm: LM) -> None:
    episodes = Episodes(lm, records(12), TrainConfig(batch=4))
    for epoch in range(3):
        seen = Counter(e.edit for step in range(3) for e in episodes.batch(3 * epoch + step))
        assert set(seen.values()) == {1} and len(seen) == 12
    assert [e.edit for e in episodes.batch(0)] != [e.edit for e in episodes.batch(3)]  # shuffled anew


def test_a_batch_may_span_two_epochs(lm: LM) -> None:
    episodes = Episodes(lm, records(5), TrainConfig(batch=4))
    seen = Counter(e.edit for step in range(5) for e in episodes.batch(step))
    assert set(seen.values()) == {4} and len(seen) == 5


def test_paraphrases_are_of_the_record_and_take_its_target(lm: LM) -> None:
    made = {_encoded(lm, r.prompt, r.target): r for r in records(8)}
    episodes = Episodes(lm, records(8), TrainConfig(batch=8))
    used = set()
    for step in range(20):
        for episode in episodes.batch(step):
            record = made[episode.edit]
            own = [_encoded(lm, text, record.target) for text in record.paraphrases]
            used.add(own.index(episode.paraphrase))
    assert used == {0, 1}


def test_without_a_paraphrase_the_edit_stands_in(lm: LM) -> None:
    bare = [replace(r, paraphrases=()) for r in records(4)]
    for episode in Episodes(lm, bare, TrainConfig(batch=4)).batch(0):
        assert episode.paraphrase == episode.edit


def test_siblings_share_the_relation_and_are_never_the_own_fact(lm: LM) -> None:
    made = _two_relations(24)
    relation = {_encoded(lm, r.prompt, r.target): r.relation for r in made}
    relation |= {_encoded(lm, r.neighbours[0].prompt, r.neighbours[0].answer): r.relation for r in made}
    episodes = Episodes(lm, made, TrainConfig(batch=8, near=0, sibling=2))
    for step in range(30):
        for episode in episodes.batch(step):
            assert len(episode.locality) == 2
            for text in episode.locality:
                assert relation[text] == relation[episode.edit]
                assert text != episode.edit


def test_a_lonely_relation_takes_any_other_fact(lm: LM) -> None:
    made = [*records(4), replace(records(5)[4], relation="alone")]
    lonely = _encoded(lm, made[4].prompt, made[4].target)
    episodes = Episodes(lm, made, TrainConfig(batch=5, near=0, sibling=1))
    for step in range(10):
        for episode in episodes.batch(step):
            assert episode.locality[0] != episode.edit
            if episode.edit != lonely:  # the other four have siblings
                assert episode.locality[0] != lonely


def test_the_relation_is_the_wording_where_none_is_given(lm: LM) -> None:
    made = [replace(r, relation=None) for r in _two_relations(8)]
    own = {_encoded(lm, r.prompt, r.target): "river" in r.prompt for r in made}
    own |= {_encoded(lm, r.neighbours[0].prompt, r.neighbours[0].answer): "river" in r.prompt for r in made}
    for step in range(10):
        for episode in Episodes(lm, made, TrainConfig(batch=8, near=0, sibling=1)).batch(step):
            assert own[episode.locality[0]] == own[episode.edit]


def test_the_mix_is_as_asked(lm: LM) -> None:
    record = records(1)[0]
    near = {_encoded(lm, p.prompt, p.answer) for p in record.neighbours}
    far = {_encoded(lm, p.prompt, p.answer) for p in record.unrelated}
    passages = ["one two three four five six seven eight nine ten eleven", "x"]
    config = TrainConfig(batch=1, near=2, sibling=0, unrelated=1, text=1)
    episodes = Episodes(lm, [record], config, passages)
    assert len(episodes.passages) == 1  # the other one is too short to keep anything
    locality = episodes.batch(0)[0].locality
    assert len(locality) == 4
    assert set(locality[:2]) == near
    assert locality[2] in far
    assert locality[3] in episodes.passages


def test_passages_are_cut_at_many_lengths_and_keep_their_last_tokens(lm: LM) -> None:
    long = " ".join(["one two three four five six seven eight nine ten"] * 8)
    texts = [f"{i} {long}" for i in range(60)]
    config = TrainConfig(batch=1, near=0, sibling=0, text=1)
    found = Episodes(lm, records(2), config, texts).passages
    lengths = {len(text.ids) for text in found}
    assert min(lengths) >= 8
    assert max(lengths) <= 32
    assert len(lengths) > 10
    assert {len(text.labels) for text in found} <= {4, 5, 6}
    assert found == Episodes(lm, records(2), config, texts).passages


def test_a_record_without_what_was_asked_still_has_a_locality_text(lm: LM) -> None:
    bare = [replace(r, neighbours=(), unrelated=()) for r in records(3)]
    for episode in Episodes(lm, bare, TrainConfig(batch=3, near=1, sibling=0)).batch(0):
        assert len(episode.locality) == 1
        assert episode.locality[0] != episode.edit


def test_windows_cover_every_step_once(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(module, "GROUP", 1)
    episodes = Episodes(lm, records(30), TrainConfig(batch=4))
    for first in (0, 2, 4):
        window = episodes.window(first)
        assert window == [*episodes.batch(first), *episodes.batch(first + 1)]
        assert episodes.window(first + 1) is None


def test_the_first_epoch_needs_only_texts_of_windows_so_far(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the trunk runs just ahead of the training, not over everything at the start."""
    monkeypatch.setattr(module, "WINDOW", 8)
    monkeypatch.setattr(module, "GROUP", 1)
    made = [replace(r, neighbours=(), unrelated=()) for r in records(32)]
    episodes = Episodes(lm, made, TrainConfig(batch=4, near=0, sibling=1))
    edits: set[Text] = set()
    for step in range(8):
        if (window := episodes.window(step)) is not None:
            edits |= {episode.edit for episode in window}
        for episode in episodes.batch(step):
            assert set(episode.locality) <= edits


def test_what_cannot_be_learnt_is_refused(lm: LM) -> None:
    with pytest.raises(TrainingError, match="no records"):
        Episodes(lm, [], TrainConfig())
    lonely = [replace(records(1)[0], neighbours=(), unrelated=())]
    with pytest.raises(TrainingError, match="locality needs another text"):
        Episodes(lm, lonely, TrainConfig())
    with pytest.raises(TrainingError, match="no passage of at least 4 tokens"):
        Episodes(lm, records(3), TrainConfig(), ["x", "y"])
    with pytest.raises(TrainingError, match="--text is for decoders, and tiny-bart is none"):
        Episodes(build_lm("bart"), records(3), TrainConfig(), ["a passage of some length"])
    long = [replace(records(1)[0], target="word " * 100), *records(3)]
    with pytest.raises(RequestError, match="context is 96"):
        Episodes(lm, long, TrainConfig())
    empty = [replace(records(1)[0], neighbours=(Probe("The capital of X is", " "),)), *records(3)]
    with pytest.raises(RequestError, match="empty"):
        Episodes(lm, empty, TrainConfig())
