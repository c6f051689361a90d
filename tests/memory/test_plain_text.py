"""With a thousand edits in memory plain text is answered by the base model, bit for bit, with the router that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import emendo
from emendo.data import read_records
from emendo.memory import EditMemory
from emendo.memory.bank import Remembered
from memory.test_bank import an_edit

SHARED = Path(__file__).parents[3] / "shared" / "data"
EDITS, PASSAGES, WORDS = 1000, 250, 100  # of 1,000 passages 2 fire (docs/memory.md)


@pytest.mark.slow
def test_plain_text_is_answered_by_the_base_model_bit_for_bit() -> None:
    file = SHARED / "wikitext2-valid.txt"
    if not file.exists():
        pytest.skip("Wikitext-2 is not in the shared data folder")
    lm = emendo.load("smollm2-135m")
    assert EditMemory(lm).router.encoder is not None
    memory = EditMemory(lm)
    change = an_edit(lm, ("A", "b"))
    records = read_records(SHARED / "counterfact-dev.json", limit=EDITS).records
    memory.add_all({i: Remembered(lambda: change, [record.prompt]) for i, record in enumerate(records)})
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 100]
    passages = [" ".join(line.split()[:WORDS]) for line in lines[:PASSAGES]]
    fired = [choice.edit is not None for choice in memory.route(passages)]
    assert sum(fired) <= 0.005 * PASSAGES
    with memory.applied() as routed:
        for passage, one in list(zip(passages, fired, strict=True))[::40]:
            texts = lm.prompt_texts([passage])
            assert torch.equal(routed.logits(texts)[0], lm.logits(texts)[0]) is not one
