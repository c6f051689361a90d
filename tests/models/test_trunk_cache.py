"""Kept trunk outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import build_lm, build_model, plain_logits, random_texts, records, records_for, unchanged
from emendo.low_rank import LowRank
from emendo.models._packing import Packing, applied_to_texts
from emendo.models.lm import LM
from emendo.models.losses import TokenLoss, token_kl, token_margin, token_nll
from emendo.models.sites import find_sites
from emendo.models.text import Text, TokenBatch, collate
from emendo.models.tokenization import encode, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache


def facts(lm: LM, n: int) -> list[Text]:
    return encode(lm.tokenizer, [(record.prompt, record.target) for record in records(n)])


def trunk_of(lm: LM) -> Trunk:
    return Trunk(lm.model, find_sites(lm.model, last=2))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of `Trunk.run` got."""
    calls: list[int] = []
    run = Trunk.run

    def counted(self: Trunk, batch: TokenBatch) -> Tensor:
        calls.append(len(batch))
        return run(self, batch)

    monkeypatch.setattr(Trunk, "run", counted)
    monkeypatch.setattr(Trunk, "_test", lambda self: True)  # it runs two texts of its own
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_rows_are_the_output_of_the_trunk(tiny_llama: LM, dtype: torch.dtype) -> None:
    store, texts = TrunkCache(trunk_of(tiny_llama), dtype=dtype), facts(tiny_llama, 12)
    assert store.ensure(texts) == 12 == len(store)
    asked = [texts[7], texts[0], texts[7], texts[3]]
    found = store.gather(asked)
    assert found.dtype == dtype
    assert found.shape[:2] == (4, max(len(text.inputs) for text in asked))
    for row, text in zip(found, asked, strict=True):
        alone = collate([text])
        expected = store.trunk.run(alone)[0]
        torch.testing.assert_close(row[: len(text.inputs)], expected.to(dtype), rtol=1e-2, atol=1e-4)
        assert not row[len(text.inputs) :].any()


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        ("gpt2", "mlp"),
        ("t5-gated", "mlp"),
        ("t5", "*decoder*"),
        ("bart", "mlp"),
        ("bart", "*decoder*"),
        ("bert", "mlp"),
    ],
)
def test_resumed_from_the_store_the_logits_are_those_of_the_full_pass(kind: str, which: str) -> None:
    lm = build_lm(kind)
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model, which, last=2)), dtype=torch.float32)
    texts = to_texts(lm, [(record.prompt, record.target) for record in records_for(lm, 6)])
    assert store.ensure(texts) == 6
    with torch.no_grad():
        batch, found = store.logits(texts[::-1])
        torch.testing.assert_close(found, plain_logits(lm.model, batch), rtol=1e-4, atol=1e-4)


def test_every_text_is_computed_once(tiny_llama: LM, computed: list[int]) -> None:
    store, texts = TrunkCache(trunk_of(tiny_llama)), facts(tiny_llama, 8)
    heard: list[int] = []
    assert store.ensure([*texts[:5], *texts[:5]], heard.append) == 5
    assert sum(computed) == sum(heard) == 5
    assert store.missing([*texts, texts[6]]) == texts[5:]
    assert store.ensure(texts) == 3
    assert sum(computed) == 8
    assert store.ensure(texts, heard.append) == 0
    assert sum(heard) == 5


def test_long_work_is_cut_into_batches_of_similar_length(
    tiny_llama: LM, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emendo.models.trunk_cache._BATCH_TOKENS", 40)
    texts = facts(tiny_llama, 20)
    small, whole = TrunkCache(trunk_of(tiny_llama), dtype=torch.float32), TrunkCache(trunk_of(tiny_llama))
    small.ensure(texts)
    assert len(computed) > 4
    assert sum(computed) == 20
    monkeypatch.undo()
    whole.ensure(texts)
    torch.testing.assert_close(small.gather(texts).bfloat16(), whole.gather(texts), rtol=1e-2, atol=1e-4)


def test_the_last_token_is_only_predicted_so_it_does_not_matter(tiny_llama: LM) -> None:
    store = TrunkCache(trunk_of(tiny_llama))
    store.ensure([Text((5, 6, 7, 8), 3)])
    assert store.missing([Text((5, 6, 7, 9), 2)]) == []
    assert store.missing([Text((5, 6, 8, 8), 3)]) != []


@pytest.mark.parametrize("kind", ["t5", "bart", "bert"])
def test_what_is_kept_is_what_the_trunk_reads(kind: str, computed: list[int]) -> None:
    """Of an encoder-decoder the source, of a classifier the prompt: another answer to it is nothing new."""
    lm = build_lm(kind)
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model)))
    answers = lm.labels[:2] if lm.kind == "classifier" else ("Paris", "Old Town")
    first, second = (to_texts(lm, [("Where is Fosoba?", answer)])[0] for answer in answers)
    assert first != second
    store.ensure([first])
    assert store.missing([second]) == []
    assert store.ensure([second, *to_texts(lm, [("Where is Bababa?", answers[0])])]) == 1
    assert sum(computed) == 2
    rows = store.gather([first, second])
    assert rows.shape[:2] == (2, len(first.trunk))
    assert torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_on_disk_it_is_the_same_bit_for_bit(
    tiny_llama: LM, tmp_path: Path, computed: list[int], dtype: torch.dtype
) -> None:
    texts = facts(tiny_llama, 10)
    memory = TrunkCache(trunk_of(tiny_llama), dtype=dtype)
    disk = TrunkCache(trunk_of(tiny_llama), tmp_path / "store", dtype)
    for store in (memory, disk):
        store.ensure(texts[:6])
        store.ensure(texts[4:])
    computed.clear()
    again = TrunkCache(trunk_of(tiny_llama), tmp_path / "store", dtype)
    assert len(again) == 10
    assert again.ensure(texts) == 0
    assert computed == []
    for store in (disk, again):
        assert torch.equal(store.gather(texts[::-1]), memory.gather(texts[::-1]))


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: halve(next(folder.glob("*.bin"))),
        lambda folder: halve(next(folder.glob("*.npz"))),
        lambda folder: next(folder.glob("*.npz")).write_bytes(b""),
        lambda folder: next(folder.glob("*.bin")).unlink(),
    ],
    ids=["short rows", "short index", "empty index", "no rows"],
)
def test_what_is_damaged_is_computed_anew(
    tiny_llama: LM, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    texts, trunk = facts(tiny_llama, 5), trunk_of(tiny_llama)
    store = TrunkCache(trunk, tmp_path)
    store.ensure(texts)
    wanted = store.gather(texts).clone()
    del store
    damage(tmp_path)
    healed = TrunkCache(trunk, tmp_path)
    assert healed.ensure(texts) == 5
    assert torch.equal(healed.gather(texts), wanted)
    assert TrunkCache(trunk, tmp_path).ensure(texts) == 0


def changed(model: Any, scale: float = 1.0) -> dict[str, LowRank]:
    """One change for all texts at each of the last two blocks' sites, with a gradient."""
    torch.manual_seed(5)
    dtype = next(model.parameters()).dtype
    return {
        site.name: LowRank(
            (scale * torch.randn(1, site.d_out, 1)).to(dtype).requires_grad_(),
            torch.randn(1, 1, site.d_in).to(dtype),
        )
        for site in find_sites(model, last=2)
    }


def under(model: Any, change: dict[str, LowRank], texts: list[Text]) -> Callable[[Packing], Any]:
    return lambda packing: applied_to_texts(model, change, torch.zeros(len(texts), dtype=torch.long), packing)


def drift(store: TrunkCache, texts: list[Text]) -> Tensor:
    """KL between the cached answers of the unedited model and those of an edited one, label by label."""
    with torch.no_grad():
        return store.label_losses(texts, len(texts), under(store.model, changed(store.model, 0.1), texts))[1]


@pytest.mark.parametrize("token_loss", [token_nll, token_margin])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "t5", "bart", "bert"])
def test_texts_are_compared_as_by_whole_logits(kind: str, token_loss: TokenLoss) -> None:
    """Also with what follows the vocabulary projection: a softcap, a bias of the logits."""
    model = build_model(kind, torch.float64)
    if kind == "bart":
        model.final_logits_bias.normal_()
    store = TrunkCache(Trunk(model, find_sites(model, last=2)), dtype=torch.float64)
    assert (store.trunk.projection is None) == (kind in ("gemma2", "bart", "bert"))
    texts = random_texts(kind, 9, 12, 7, 11)
    store.ensure(texts)
    change = changed(model)
    leaves = [delta.left for delta in change.values()]
    with unchanged(model):
        batch, values, right = store.label_losses(texts, 2, under(model, change, texts), token_loss)
        before = plain_logits(model, batch)
        _, after = store.packed_logits(texts, under(model, change, texts))
    wanted = int((batch.owner < 2).sum())
    expected = torch.cat(
        [token_loss(after[:wanted], batch.labels[:wanted]), token_kl(before[wanted:], after[wanted:])]
    )
    assert values[wanted:].min() > 1e-4
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    best = torch.cat([batch.labels[:wanted], before[wanted:].argmax(-1)])
    assert right.equal(after.argmax(-1) == best)
    found = torch.autograd.grad(values.sum(), leaves)
    for one, other in zip(found, torch.autograd.grad(expected.sum(), leaves), strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


def test_without_texts_that_must_stay_or_that_are_wanted(tiny_llama: LM) -> None:
    store, texts = TrunkCache(trunk_of(tiny_llama), dtype=torch.float32), facts(tiny_llama, 4)
    store.ensure(texts)
    change = changed(tiny_llama.model)
    both, wanted, kept = (
        store.label_losses(part, count, under(tiny_llama.model, change, part))[1]
        for part, count in ((texts, 2), (texts[:2], 0), (texts[2:], 2))
    )
    torch.testing.assert_close(torch.cat([wanted, kept]), both, rtol=1e-4, atol=1e-5)


def test_unedited_answers_do_not_depend_on_what_they_were_asked_with(tiny_llama: LM) -> None:
    texts = facts(tiny_llama, 12)
    together, alone = (TrunkCache(trunk_of(tiny_llama), dtype=torch.float32) for _ in range(2))
    together.ensure(texts)
    together.ensure_unedited(texts)
    for text in texts:
        alone.ensure([text])
        assert alone.ensure_unedited([text]) == 1
    torch.testing.assert_close(drift(together, texts), drift(alone, texts), rtol=1e-4, atol=1e-5)


def test_answers_are_known_by_what_is_read_and_where_they_start() -> None:
    lm = build_lm("t5")
    store = TrunkCache(Trunk(lm.model, find_sites(lm.model)))
    first = Text((0, 5, 6, 7), 2, (8, 9))
    same, others = (
        Text((0, 5, 6, 9), 2, (8, 9)),
        [
            Text((0, 5, 6, 7), 1, (8, 9)),
            Text((0, 5, 9, 7), 2, (8, 9)),
            Text((0, 5, 6, 7), 2, (8,)),
            Text((9, 0, 5, 6, 7), 2, (8,)),
        ],
    )
    store.ensure([first, *others])
    assert store.ensure_unedited([first]) == 1
    assert store.ensure_unedited([same]) == 0
    assert store.ensure_unedited([*others, *others]) == 4


def test_unedited_answers_outlive_the_store_and_are_made_anew_where_damaged(
    tiny_llama: LM, tmp_path: Path
) -> None:
    texts, trunk = facts(tiny_llama, 10), trunk_of(tiny_llama)
    store = TrunkCache(trunk, tmp_path)
    store.ensure(texts)
    assert [store.ensure_unedited(part) for part in (texts[:6], texts[4:])] == [6, 4]
    wanted = drift(store, texts)
    del store
    again = TrunkCache(trunk, tmp_path)
    assert again.ensure(texts) == again.ensure_unedited(texts) == 0
    assert torch.equal(drift(again, texts), wanted)
    del again
    halve(max(tmp_path.glob("expected/*.bin"), key=lambda file: file.stat().st_size))
    healed = TrunkCache(trunk, tmp_path)
    assert healed.ensure(texts) == 0
    assert healed.ensure_unedited(texts) == 6
    assert torch.equal(drift(healed, texts), wanted)
    assert TrunkCache(trunk, tmp_path).ensure_unedited(texts) == 0


def test_rows_of_another_dtype_are_not_misread(tiny_llama: LM, tmp_path: Path) -> None:
    texts, trunk = facts(tiny_llama, 5), trunk_of(tiny_llama)
    TrunkCache(trunk, tmp_path, torch.bfloat16).ensure(texts)
    exact = TrunkCache(trunk, tmp_path, torch.float32)
    assert exact.ensure(texts) == 5
    assert exact.gather(texts).dtype == torch.float32
