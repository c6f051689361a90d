"""A memory of edits on tiny models: the right edit answers, all else is the base model bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cases import build_lm
from emendo.edits.edit import Edit, Origin, Request
from emendo.errors import MismatchError, RequestError
from emendo.low_rank import LowRank
from emendo.memory import EditMemory, bank
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.tokenization import to_texts

FACTS = [
    ("The capital of Fosoba is", "Oslo"),
    ("The river in Dorumi is called", "it"),
    ("Kel Madrun was born in", "Rome"),
]
OUT_OF_SCOPE = ["The capital of Pelanto is", "A word on the weather", "Hello, how are you?"]


def an_edit(lm: LM, *requests: tuple[str, str], seed: int = 0) -> Edit:
    random = torch.Generator().manual_seed(seed)
    deltas = {
        site.name: LowRank(
            torch.randn(site.d_out, 2, generator=random), torch.randn(2, site.d_in, generator=random)
        ).scale(0.3)
        for site in find_sites(lm.model)
    }
    wanted = tuple(Request(*request) for request in requests)
    return Edit(deltas, Origin(lm.fingerprint, lm.name, "mend", {}, wanted, "2025-01-31"))


def a_memory(lm: LM) -> EditMemory:
    memory = EditMemory(lm)
    for seed, fact in enumerate(FACTS):
        memory.add(an_edit(lm, fact, seed=seed))
    return memory


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_each_prompt_is_answered_by_its_edit_or_by_the_base_model(kind: str) -> None:
    lm = build_lm(kind, torch.float64)
    memory = a_memory(lm)
    prompts = [*(prompt for prompt, _ in FACTS), *OUT_OF_SCOPE]
    want = []
    for seed, fact in enumerate(FACTS):
        with an_edit(lm, fact, seed=seed).applied(lm):
            want.append(lm.generate(fact[0], 6))
    want += [lm.generate(prompt, 6) for prompt in OUT_OF_SCOPE]
    with memory.applied() as routed:
        assert routed.generate(prompts, 6) == want
        assert [routed.generate(prompt, 6) for prompt in prompts] == want
    assert [choice.edit for choice in memory.route(prompts)] == [1, 2, 3, None, None, None]


def test_out_of_scope_is_the_base_model_bit_for_bit(tiny_llama: LM) -> None:
    memory = a_memory(tiny_llama)
    texts = to_texts(tiny_llama, [(prompt, "it", None) for prompt in OUT_OF_SCOPE])
    with memory.applied() as routed:
        found = routed.logits(texts)
    assert all(map(torch.equal, found, tiny_llama.logits(texts)))


def test_taking_an_edit_out_leaves_the_others_bit_for_bit(tiny_llama: LM) -> None:
    memory = a_memory(tiny_llama)
    texts = to_texts(tiny_llama, [(prompt, "it", None) for prompt, _ in FACTS])
    with memory.applied() as routed:
        before = routed.logits(texts)
        memory.remove(2)
        after = routed.logits(texts)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])
    assert torch.allclose(after[1], tiny_llama.logits([texts[1]])[0], atol=1e-5)  # in another batch


def test_a_choice_names_the_edit_the_runner_up_and_the_threshold(tiny_llama: LM) -> None:
    memory = a_memory(tiny_llama)
    memory.add(an_edit(tiny_llama, ("The currency of Fosoba is the", "Oslo"), seed=9))
    choice = memory.why("The capital of Fosoba is")
    assert (choice.edit, choice.runner_up) == (1, 4)
    assert choice.score >= choice.threshold
    assert choice.score > choice.runner_up_score
    nothing = EditMemory(tiny_llama).why("The capital of Fosoba is")
    assert (nothing.edit, nothing.best, nothing.score) == (None, None, 0.0)


def test_of_two_edits_of_one_fact_the_later_one_wins(tiny_llama: LM) -> None:
    memory = a_memory(tiny_llama)
    later = memory.add(an_edit(tiny_llama, (FACTS[0][0], "Rome"), seed=8))
    assert memory.why(FACTS[0][0]).edit == later
    memory.remove(later)
    assert memory.why(FACTS[0][0]).edit == 1


def test_paraphrases_and_aliases_are_in_scope(tiny_llama: LM) -> None:
    memory = EditMemory(tiny_llama)
    asked = ["Where do the Fosobans' ministers sit?", "The capital of Old Fosland is"]
    assert memory.add(an_edit(tiny_llama, FACTS[0])) == 1
    assert [choice.edit for choice in memory.route(asked)] == [None, None]
    memory.remove(1)
    memory.add(an_edit(tiny_llama, FACTS[0]), number=7, paraphrases=asked[:1], aliases=["Old Fosland"])
    assert [choice.edit for choice in memory.route(asked)] == [7, 7]


def test_an_edit_of_several_facts_is_in_force_for_each(tiny_llama: LM) -> None:
    memory = EditMemory(tiny_llama)
    memory.add(an_edit(tiny_llama, *FACTS))
    assert [choice.edit for choice in memory.route([prompt for prompt, _ in FACTS])] == [1, 1, 1]


class Maker:
    """Makes the edits of :func:`a_memory`, and counts."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def edit(self, lm: LM, prompt: Sequence[Request]) -> Edit:
        (request,) = prompt
        assert torch.is_grad_enabled()
        self.made.append(request.prompt)
        fact = (request.prompt, request.target)
        return an_edit(lm, fact, seed=FACTS.index(fact))


def test_a_fact_is_made_an_edit_when_a_prompt_first_asks_for_it(
    tiny_llama: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "_MADE", 1)
    memory, maker = EditMemory(tiny_llama), Maker()
    assert memory.add_facts(maker, [Request(*fact) for fact in FACTS]) == [1, 2, 3]
    with memory.applied() as routed, a_memory(tiny_llama).applied() as stored:
        assert maker.made == []
        texts = to_texts(tiny_llama, [(prompt, "it", None) for prompt in (FACTS[1][0], *OUT_OF_SCOPE)])
        assert all(map(torch.equal, routed.logits(texts), stored.logits(texts)))
        assert routed.generate(FACTS[1][0], 4) == stored.generate(FACTS[1][0], 4)
        assert maker.made == [FACTS[1][0]]  # kept
        routed.generate(FACTS[2][0], 4)
        assert routed.generate(FACTS[1][0], 4) == stored.generate(FACTS[1][0], 4)
        assert maker.made == [FACTS[n][0] for n in (1, 2, 1)]
    memory.remove(2)
    assert memory.why(FACTS[1][0]).edit is None


def test_the_last_turn_of_a_conversation_decides(tiny_llama: LM) -> None:
    memory = a_memory(tiny_llama)
    capital, river = "What is the capital of Fosoba?", "How is the river in Dorumi called?"
    talks = [
        [capital, river],
        ["Tell me about Fosoba.", "What is the capital of it?"],
        [capital, "Hello, how are you?"],
        [],
        river,
    ]
    choices = memory.route(talks)
    assert [choice.edit for choice in choices] == [2, 1, None, None, 2]
    assert choices[1].prompt == capital
    assert memory.why(talks[0]) == choices[0]


def test_the_question_after_a_long_conversation_counts(tiny_llama: LM) -> None:
    memory, talk = a_memory(tiny_llama), "It rained. The mayor went home. Nobody was there to see it. " * 12
    assert memory.why(f"{talk}{FACTS[0][0]}").edit == 1
    assert memory.why(f"{FACTS[0][0]} Oslo. {talk}").edit is None


def test_what_cannot_be_routed_is_refused(tiny_llama: LM, tiny_gpt2: LM) -> None:
    memory = EditMemory(tiny_llama)
    with pytest.raises(RequestError, match="names no prompt"):
        memory.add(an_edit(tiny_llama))
    with pytest.raises(MismatchError):
        memory.add(an_edit(tiny_gpt2, FACTS[0]))
    memory.add(an_edit(tiny_llama, FACTS[0]), number=3)
    with pytest.raises(RequestError, match="edit 3 already"):
        memory.add(an_edit(tiny_llama, FACTS[1]), number=3)
    with pytest.raises(RequestError, match="no edit 5"):
        memory.remove(5)
    with pytest.raises(RequestError, match="from 0 to 1"):
        EditMemory(tiny_llama, false_fires=2)
    assert len(memory) == 1
