"""Train the router that ships with emendo for smollm2-135m, and the lexical one for all other models.

    python scripts/train_router.py --data FOLDER --out runs/router --install

FOLDER holds ``counterfact-train.json``, ``counterfact-dev.json`` (whose subjects are left out) and ``pararel.jsonl``.
First the key encoder is trained on the hidden states of some 90,000 prompts, then the judge is fitted on facts that
were kept from it, and its threshold set on their neighbours. Half an hour on one core with AMX.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import emendo
from emendo.data import Record, read_records
from emendo.memory.encoder import KeyEncoder, hidden_states
from emendo.memory.router import SHIPPED, Floats, Judge, Router, index_of
from emendo.memory.words import IDF_FILE, Prompt, Rarity
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.loading import cache_folder
from router_prompts import KINDS, Fact, make_facts

MODEL, BLOCK, SIZE = "smollm2-135m", 14, 128
COUNTS = {"counterfact": 8_000, "pararel": 9_000, "atlas": 5_500}
HELD = 1_500
"""Facts kept from the encoder, to fit the judge on."""
CALIBRATED_ON = 1_000
"""Edits in the memory on which the threshold is set."""
HIDDEN = 16
"""Of the judge."""
WEIGHTS = {"query": 1.0, "other": 0.25, "near": 1.5}
"""Of the queries in the judge's loss: with equal weights it is too strict with rare wordings of a relation."""


class Pool:
    """The hidden states of many prompts, end to end.

    Args:
        lm: the model.
        prompts: the prompts.
        block: the block that the hidden states enter.
    """

    def __init__(self, lm: LM, prompts: Sequence[str], block: int) -> None:
        self.start = torch.zeros(len(prompts), dtype=torch.long)
        self.length = torch.zeros(len(prompts), dtype=torch.long)
        parts, at = [], 0
        for part, hidden, mask in hidden_states(lm, prompts, block):
            for place, row, own in zip(part, hidden, mask, strict=True):
                parts.append(row[own].to(torch.bfloat16))
                self.start[place], self.length[place] = at, len(parts[-1])
                at += len(parts[-1])
        self.rows = torch.cat(parts)

    def batch(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[texts, tokens, width]`` and mask ``[texts, tokens]`` of some prompts."""
        steps = torch.arange(int(self.length[places].max()))
        mask = steps < self.length[places][:, None]
        index = (self.start[places][:, None] + steps).clamp(max=len(self.rows) - 1)
        return self.rows[index.flatten()].unflatten(0, index.shape), mask

    def after_first(self) -> Tensor:
        """All tokens but the first of each prompt."""
        keep = torch.ones(len(self.rows), dtype=torch.bool)
        keep[self.start] = False
        return self.rows[keep]


def contrast(keys: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Supervised contrastive loss: every key finds those with its label among all others (Khosla et al. 2020)."""
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    logs = (scale.exp() * keys @ keys.T).fill_diagonal_(-1e4).log_softmax(1)
    some = same.any(1)
    return -((logs * same).sum(1)[some] / same.sum(1)[some]).mean()


def train_encoder(pool: Pool, facts: Sequence[Fact], first: int, steps: int, batch: int) -> KeyEncoder:
    """Train the key encoder on the prompts of all facts from ``first`` on."""
    rows = pool.after_first()
    encoder = KeyEncoder(rows.shape[1], BLOCK, SIZE)
    sample = rows[:: max(1, len(rows) // 100_000)].float()
    encoder.mean.copy_(sample.mean(0))
    encoder.std.copy_(sample.std(0).clamp(min=1e-4))
    labels = torch.tensor([[fact.labels(kind) for kind in KINDS] for fact in facts])  # [facts, kinds, 2]
    scales = nn.Parameter(torch.tensor([2.5, 2.5]))
    adam = torch.optim.AdamW([*encoder.parameters(), scales], weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        chosen = first + torch.randperm(len(facts) - first)[:batch]
        hidden, mask = pool.batch((chosen[:, None] * len(KINDS) + torch.arange(len(KINDS))).flatten())
        last = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask
        keys = encoder(hidden, mask & (torch.rand(mask.shape) > 0.05) | last)
        loss = sum(contrast(keys[:, i], labels[chosen].flatten(0, 1)[:, i], scales[i]) for i in range(2))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    return encoder.requires_grad_(False)


class Evidence:
    """The evidence for every candidate of many queries: ``x [n, numbers]``, whether it is right, and its query."""

    def __init__(self) -> None:
        self.x: list[Floats] = []
        self.right: list[float] = []
        self.query: list[int] = []
        self.weight: list[float] = []

    def add(
        self,
        router: Router,
        lm: LM,
        edits: Sequence[Prompt],
        asked: Sequence[str],
        wanted: Sequence[set[int]],
        weight: float,
    ) -> None:
        """Add queries of one kind, each with the edits that it means, if any."""
        index = index_of(router, lm, edits)
        for query, own in zip(router.read(lm, asked), wanted, strict=True):
            rows = index.candidates(query.prompt, query.key)
            if rows:
                self.x.append(router.evidence(query, index, rows))
                self.right += [float(index.edit(row) in own) for row in rows]
                self.query += [len(self.weight)] * len(rows)
                self.weight.append(weight)


def fit(found: Evidence, steps: int = 1200) -> tuple[Floats, ...]:
    """Fit the judge: for each query the right candidate, or none of them, has the highest score."""
    x, right, query = (
        torch.from_numpy(np.concatenate(found.x)),
        torch.tensor(found.right),
        torch.tensor(found.query),
    )
    net = nn.Sequential(nn.Linear(x.shape[1], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
    adam = torch.optim.Adam(net.parameters(), 2e-2, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    nothing, weight = torch.zeros(len(found.weight)), torch.tensor(found.weight)
    answered = nothing.index_add(0, query, right) > 0
    for step in range(steps):
        score = net(x).squeeze(1)
        every = nothing.exp().index_add(0, query, score.exp())  # with "none" at score 0
        good = nothing.index_add(0, query, score.exp() * right)
        chosen = torch.where(answered, good, nothing.exp()).log() - every.log()
        alone = nn.functional.binary_cross_entropy_with_logits(score, right)
        loss = 0.3 * alone - (chosen * weight).sum() / weight.sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 500 == 0 or step == steps - 1:
            print(f"judge, step {step}: loss {float(loss.detach()):.4f}", flush=True)
    inner, outer = net[0], net[2]
    return tuple(t.detach().numpy().copy() for t in (inner.weight, inner.bias, outer.weight[0], outer.bias))


def fitted(router: Router, lm: LM, facts: Sequence[Fact]) -> Judge:
    """The judge for the evidence of a router, with its calibration."""
    by_fact: dict[tuple[int, int], set[int]] = {}
    for number, fact in enumerate(facts):
        by_fact.setdefault(fact.labels("edit"), set()).add(number)
    found = Evidence()
    for given in (False, True):
        edits = [Prompt.read(fact.edit, fact.name if given else None) for fact in facts]
        for kind, weight in WEIGHTS.items():
            asked = [getattr(fact, kind) for fact in facts]
            found.add(
                router, lm, edits, asked, [by_fact.get(fact.labels(kind), set()) for fact in facts], weight
            )
    numbers = fit(found)
    router.judge = Judge(*numbers, np.zeros(1, np.float32))
    return Judge(*numbers, calibration(router, lm, facts[:CALIBRATED_ON]))


def calibration(router: Router, lm: LM, facts: Sequence[Fact]) -> Floats:
    """The highest score of an edit for each prompt that asks for none of the edited facts, ascending.

    The prompts are the neighbours of the facts, and of the built-in facts' validation split another relation of each
    subject: with neighbours alone every fifth question about another relation of an edited subject fires. A lexical
    router cannot tell relations apart, so it is calibrated on neighbours alone.
    """
    edited = {fact.labels("edit") for fact in facts}
    near = [fact.near for fact in facts if fact.labels("near") not in edited]
    records = read_records("atlas", split="validation").records if router.encoder is not None else ()
    pairs = list(two_relations(records))
    cases = (
        ([Prompt.read(fact.edit) for fact in facts], near),
        ([Prompt.read(first.prompt) for first, _ in pairs], [other.prompt for _, other in pairs]),
    )
    found = []
    for edits, asked in cases:
        index = index_of(router, lm, edits)
        found += [max(router.scores(query, index).values(), default=0.0) for query in router.read(lm, asked)]
    return np.sort(np.array(found, np.float32))


def two_relations(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """For each subject that has several relations, two of its records."""
    by_subject: dict[str | None, list[Record]] = {}
    for record in records:
        by_subject.setdefault(record.subject, []).append(record)
    for first, *rest in by_subject.values():
        if (other := next((one for one in rest if one.relation != first.relation), None)) is not None:
            yield first, other


def main() -> None:
    """Train both routers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="facts of a step")
    parser.add_argument("--limit", type=int, help="facts, to try the script")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--install", action="store_true", help="put both where they ship from")
    asked = parser.parse_args()
    torch.manual_seed(0)
    lm = emendo.load(MODEL, dtype=asked.dtype)
    passages = own_passages(lm, 1024, cache_folder() / "written")
    sentences = [text.split(".")[0].strip() + "." for text in passages if 20 < len(text.split(".")[0]) < 120]
    facts = make_facts(asked.data, sentences, COUNTS)[: asked.limit]
    prompts = [getattr(fact, kind) for fact in facts for kind in KINDS]
    if asked.install:
        Rarity.of(prompts, least=3).save(IDF_FILE)
    held = min(HELD, len(facts) // 4)
    kept = asked.out / "encoder.pt"
    if kept.exists():
        encoder = KeyEncoder(lm.model.config.hidden_size, BLOCK, SIZE)
        encoder.load_state_dict(torch.load(kept))
        encoder.requires_grad_(False)
    else:
        encoder = train_encoder(Pool(lm, prompts, BLOCK), facts, held, asked.steps, asked.batch)
        asked.out.mkdir(parents=True, exist_ok=True)
        torch.save(encoder.state_dict(), kept)
    unfitted = Judge(*[np.zeros(1, np.float32)] * 5)
    info = {
        "data": "counterfact-train, pararel, atlas",
        "facts": len(facts),
        "steps": asked.steps,
        "model": MODEL,
    }
    for name, router in (
        (MODEL, Router(unfitted, encoder, lm.fingerprint, info)),
        ("lexical", Router(unfitted, info={**info, "model": None})),
    ):
        router.judge = fitted(router, lm, facts[:held])
        router.save_pretrained(asked.out / name)
        if asked.install:
            router.save_pretrained(SHIPPED / name)


if __name__ == "__main__":
    main()
