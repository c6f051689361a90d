"""Memory while training, from a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from reproduction.mend_paper import memory
from reproduction.mend_paper.memory import Memory, highest_resident, peak, random_lm

from cases import build_lm, records
from emendo.models.tokenization import to_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, lm = tmp_path_factory.mktemp("model") / "tiny", build_lm("llama")
    lm.model.save_pretrained(place)
    lm.tokenizer.save_pretrained(place)
    return place


@pytest.mark.slow
def test_a_large_editor_takes_memory(folder: Path) -> None:
    found = peak(Memory("tiny", "meta-curvature", width=512, batch=2, steps=1), folder, records(4)).figures
    editor = 2 * (512**2 + 2048**2) * 4 / 2**20  # two shapes, and a square matrix for each side
    assert found["parameters"].mean * 4 / 2**20 == pytest.approx(editor, rel=1e-4)
    assert (
        3 * editor < found["memory"].mean < 12 * editor
    )  # itself, its gradient, Adam's two moments, and the rest
    assert found["memory_of_model"].mean == pytest.approx(found["model_parameters"].mean * 4 / 2**20)


def test_a_random_model_of_any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    like = build_lm("llama")
    lm = random_lm(like, 128)
    assert (lm.model.config.n_embd, lm.model.config.n_layer, lm.model.config.n_head) == (
        128,
        memory.BLOCKS,
        2,
    )
    assert lm.kind == "causal"
    assert lm.fingerprint == random_lm(like, 128).fingerprint
    assert not any(p.requires_grad for p in lm.model.parameters())
    (row,) = lm.logits(to_texts(lm, [("The capital of Bade is", "Oslo")]))
    assert row.shape[-1] == len(like.tokenizer)


@pytest.mark.slow
def test_the_most_that_was_held_counts_what_is_gone() -> None:
    size = int(highest_resident()) + 100  # MB, more than was ever held
    block = bytearray(size * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    del block
    assert highest_resident() > size - 10  # the kernel counts in steps


def test_a_plan_names_every_setting() -> None:
    assert Memory("a", "mend").plan() != Memory("a", "mend", width=8).plan()
    assert Memory("a", "mend", settings={"rank": 3}).plan()["settings"]["rank"] == 3
