"""Train the router that ships with emendo for smollm2-135m, and the lexical one for all other models.

    python scripts/train_router.py --data FOLDER --out runs/router --install

FOLDER holds ``counterfact-train.json``, ``counterfact-dev.json`` (whose subjects are left out) and ``pararel.jsonl``.
First the key encoder is trained on the hidden states of some 90,000 prompts, then the judge is fitted on facts that
were kept from it, and its threshold set on their neighbours. Half an hour on one core with AMX. With ``--judge-only``
the encoder that ships is kept and the judges are fitted anew: five minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import emendo
from emendo.data import Record, read_records
from emendo.memory.encoder import KeyEncoder, hidden_states
from emendo.memory.key_file import KeyFile
from emendo.memory.router import SHIPPED, Floats, Judge, Router, index_of
from emendo.memory.words import IDF_FILE, Prompt, Rarity
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.loading import cache_folder
from router_negatives import passages_about, remarks, with_longer_names
from router_prompts import KINDS, Fact, make_facts

MODEL, BLOCK, SIZE = "smollm2-135m", 14, 128
COUNTS = {"counterfact": 8_000, "pararel": 9_000, "atlas": 5_500}
HELD = 1_500
"""Facts kept from the encoder, to fit the judge on."""
CALIBRATED_ON = 1_000
"""Edits in the memory on which the threshold is set."""
HIDDEN = 16
"""Of the judge."""
WEIGHTS = {"edit": 0.25, "query": 1.0, "other": 0.25, "near": 1.5, "longer": 0.2, "remark": 0.1, "text": 0.1}
"""Of the queries in the judge's loss: with equal weights it is too strict with rare wordings of a relation."""
STRONGEST = 6
"""Candidates of a query that the judge is fitted on."""
OTHERS = 3.0
"""Questions about another relation of an edited subject that fire, as a multiple of the neighbours that do."""
QUANTILES = 1000
"""Numbers that stand for the calibration."""


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
    """The evidence for every candidate of many queries: ``x [n, numbers]``, whether it is right, and its query.

    Args:
        router: gives the evidence.
        lm: the model.
        keys: keeps the keys of the prompts.
    """

    def __init__(self, router: Router, lm: LM, keys: KeyFile | None) -> None:
        self.router, self.lm, self.keys = router, lm, keys
        self.x: list[Floats] = []
        self.right: list[float] = []
        self.query: list[int] = []
        self.weight: list[float] = []

    def add(
        self, edits: Sequence[Prompt], asked: Sequence[str], wanted: Sequence[set[int]], weight: float
    ) -> None:
        """Add queries of one kind, each with the edits that it means, if any."""
        index = index_of(self.router, self.lm, edits, self.keys)
        for query, own in zip(self.router.read(self.lm, asked, self.keys), wanted, strict=True):
            if rows := index.candidates(query.prompt, query.key):
                right = np.array([index.edit(row) in own for row in rows])
                self.keep(self.router.evidence(query, index, rows), right, weight)

    def keep(self, x: Floats, right: NDArray[np.bool_], weight: float) -> None:
        """Keep the candidates of a query that are right, and the others with the most evidence."""
        order = np.argsort(-(x.sum(1) + x.shape[1] * right), kind="stable")[:STRONGEST]
        self.x.append(x[order])
        self.right += right[order].astype(float).tolist()
        self.query += [len(self.weight)] * len(order)
        self.weight.append(weight)


def fit(found: Evidence, steps: int = 800) -> tuple[Floats, ...]:
    """Fit the judge: for each query the right candidate, or none of them, has the highest score."""
    x, right, query = (
        torch.from_numpy(np.concatenate(found.x)),
        torch.tensor(found.right),
        torch.tensor(found.query),
    )
    torch.manual_seed(0)  # the same judge, whatever was trained before
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


def evidence(
    router: Router, lm: LM, facts: Sequence[Fact], passages: Sequence[str], keys: KeyFile | None
) -> Evidence:
    """The evidence that a judge is fitted on: each prompt against all facts, subjects guessed and given."""
    by_fact: dict[tuple[int, int], set[int]] = {}
    for number, fact in enumerate(facts):
        by_fact.setdefault(fact.labels("edit"), set()).add(number)
    out_of_scope = {
        "longer": with_longer_names(facts),
        "remark": remarks(facts),
        "text": passages_about(facts, passages),
    }
    found = Evidence(router, lm, keys)
    for given in (False, True):
        edits = [Prompt.read(fact.edit, fact.name if given else None) for fact in facts]
        for kind in KINDS:
            wanted = [by_fact.get(fact.labels(kind), set()) for fact in facts]
            found.add(edits, [getattr(fact, kind) for fact in facts], wanted, WEIGHTS[kind])
        for kind, asked in out_of_scope.items():
            found.add(edits, asked, [set()] * len(asked), WEIGHTS[kind])
    return found


def fitted(
    router: Router, lm: LM, facts: Sequence[Fact], passages: Sequence[str], keys: KeyFile | None
) -> Judge:
    """The judge for the evidence of a router, with its calibration."""
    numbers = fit(evidence(router, lm, facts, passages, keys))
    router.judge = Judge(*numbers, np.zeros(1, np.float32))
    return Judge(*numbers, calibration(router, lm, facts[:CALIBRATED_ON], keys))


def calibration(router: Router, lm: LM, facts: Sequence[Fact], keys: KeyFile | None) -> Floats:
    """Ascending scores, of which the given share of false fires reaches the threshold.

    They are those of the strongest edit for the neighbours of the facts, or where these are higher, for questions about
    another relation of an edited subject (the built-in facts' validation split, every wording), of which
    :data:`OTHERS` times as many may fire. A lexical router cannot tell relations apart, so it is calibrated on
    neighbours alone.
    """
    edited = {fact.labels("edit") for fact in facts}
    near = [fact.near for fact in facts if fact.labels("near") not in edited]
    rates = np.linspace(1, 0, QUANTILES)
    found = np.quantile(strongest(router, lm, [fact.edit for fact in facts], near, keys), 1 - rates)
    if router.encoder is not None:
        pairs = list(two_relations(read_records("atlas", split="validation").records))
        asked = [text for _, other in pairs for text in (other.prompt, *other.paraphrases)]
        others = strongest(router, lm, [first.prompt for first, _ in pairs], asked, keys)
        found = np.maximum(found, np.quantile(others, 1 - np.minimum(OTHERS * rates, 1)))
    return found.astype(np.float32)


def strongest(
    router: Router, lm: LM, edits: Sequence[str], asked: Sequence[str], keys: KeyFile | None
) -> list[float]:
    """The highest score of an edit for each prompt."""
    index = index_of(router, lm, [Prompt.read(text) for text in edits], keys)
    queries = router.read(lm, asked, keys)
    return [max(router.scores(query, index).values(), default=0.0) for query in queries]


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
    parser.add_argument("--judge-only", action="store_true", help="keep the encoder that ships")
    parser.add_argument("--install", action="store_true", help="put both where they ship from")
    asked = parser.parse_args()
    torch.manual_seed(0)
    lm = emendo.load(MODEL, dtype=asked.dtype)
    passages = own_passages(lm, 1024, cache_folder() / "written")
    sentences = [text.split(".")[0].strip() + "." for text in passages if 20 < len(text.split(".")[0]) < 120]
    facts = make_facts(asked.data, sentences, COUNTS)[: asked.limit]
    prompts = [getattr(fact, kind) for fact in facts for kind in KINDS]
    if asked.install and not asked.judge_only:
        Rarity.of(prompts, least=3).save(IDF_FILE)
    held = min(HELD, len(facts) // 4)
    kept = asked.out / "encoder.pt"
    asked.out.mkdir(parents=True, exist_ok=True)
    shipped = Router.from_pretrained(SHIPPED / MODEL).encoder if asked.judge_only else None
    if shipped is not None:
        encoder = shipped
    elif kept.exists():
        encoder = KeyEncoder(lm.model.config.hidden_size, BLOCK, SIZE)
        encoder.load_state_dict(torch.load(kept))
        encoder.requires_grad_(False)
    else:
        encoder = train_encoder(Pool(lm, prompts, BLOCK), facts, held, asked.steps, asked.batch)
        torch.save(encoder.state_dict(), kept)
    unfitted = Judge(*[np.zeros(1, np.float32)] * 5)
    info = {
        "data": "counterfact-train, pararel, atlas",
        "facts": len(facts),
        "steps": asked.steps,
        "model": MODEL,
        "judge": WEIGHTS,
    }
    for name, router in (
        (MODEL, Router(unfitted, encoder, lm.fingerprint, info)),
        ("lexical", Router(unfitted, info={**info, "model": None})),
    ):
        router.judge = fitted(router, lm, facts[:held], passages, router.key_file(asked.out))
        router.save_pretrained(asked.out / name)
        if asked.install:
            router.save_pretrained(SHIPPED / name)


if __name__ == "__main__":
    main()
