"""The time from text to edit and of each of its parts, compared with one pass of the model.

The editor is untrained, which takes the same time. ``64 facts`` is one call of ``editor.edit`` for all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Spread, facts, interleaved, load, machine, parser, ratio, table, threads
from torch.nn import functional as F

from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import collate
from emendo.models.trunk import Trunk


def forward(lm: LM, prompt: str, target: str, backward: bool) -> None:
    """One plain pass of the whole model over the text; with ``backward`` also the gradient of every parameter."""
    ids = lm.tokenizer(f"{prompt} {target}", return_tensors="pt")["input_ids"].to(lm.device)
    lm.model.requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        logits = lm.model(input_ids=ids, use_cache=False).logits
        if backward:
            F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    lm.model.zero_grad(set_to_none=True)
    lm.model.requires_grad_(False)


def phases(lm: LM, editor: Mend, prompt: str, target: str) -> dict[str, Callable[[], Any]]:
    """The steps of making an edit, each on the result of the one before."""
    trunk = Trunk(lm.model, editor.sites)
    texts = editor.texts(lm, _requests([(prompt, target)]))
    hidden = trunk.run(collate(texts))
    factors = edit_factors(trunk, editor.sites, texts, hidden)
    with torch.no_grad():
        deltas = editor(factors)
    return {
        "tokenise": lambda: editor.texts(lm, _requests([(prompt, target)])),
        "trunk": lambda: trunk.run(collate(texts)),
        "suffix, forward and backward": lambda: edit_factors(trunk, editor.sites, texts, hidden),
        "editor": torch.no_grad()(lambda: editor(factors)),
        "assembly": lambda: ({n: d.sum() for n, d in deltas.items()}, editor.origin(lm, [])),
    }


def _requests(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    from emendo.editors.base import as_requests

    return as_requests(pairs)


def measure(lm: LM, options: argparse.Namespace) -> None:
    """Print the tables for one thread and for all."""
    editor = Mend(find_sites(lm.model), MendConfig(rank=options.rank)).eval()
    records = facts(options, options.many)
    pairs = [(record.prompt, record.target) for record in records]
    prompt, target = pairs[0]
    cases: dict[str, Callable[[], Any]] = {
        "one fact, text to edit": lambda: editor.edit(lm, prompt, target),
        "one forward pass of the model": lambda: forward(lm, prompt, target, False),
        "one forward and backward pass": lambda: forward(lm, prompt, target, True),
        f"{options.many} facts in one call": lambda: editor.edit(lm, pairs),
    }
    parts = phases(lm, editor, prompt, target)
    for count in sorted({1, options.threads}):
        with threads(count):
            times = interleaved({**cases, **parts}, options)
        whole, plain, full, many = (times[name] for name in cases)
        rows: list[tuple[Any, ...]] = [
            (name, Spread.of(times[name]).scaled(1e3), ratio(times[name], full)) for name in list(cases)[:3]
        ]
        each = [t / len(pairs) for t in many]
        rows.append(
            (f"one of {options.many} facts in one call", Spread.of(each).scaled(1e3), ratio(each, full))
        )
        rows += [
            (f"- {name}", Spread.of(times[name]).scaled(1e3), ratio(times[name], full)) for name in parts
        ]
        plural = "" if count == 1 else "s"
        table(f"Edit latency, {count} thread{plural}", ("case", "ms", "over forward and backward"), rows)
        print(
            f"one of {options.many} in one call over one alone: {ratio(each, whole)}; "
            f"one edit over one forward pass: {ratio(whole, plain)}\n"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=11)
    made.add_argument("--rank", type=int, default=MendConfig().rank)
    made.add_argument("--many", type=int, default=64)
    options = made.parse_args(arguments)
    machine(options)
    measure(load(options), options)


if __name__ == "__main__":
    main()
