"""Generation with edits: tokens a second of the bare model, with edits beside its matrices, and merged into them.

The edits are those of an untrained editor, which have the ranks of any other. Every case generates the same number of
tokens from the same prompt, greedily.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from _common import Spread, facts, interleaved, load, machine, parser, ratio, table

from emendo.editors.mend import Mend, MendConfig
from emendo.edits.edit import Edit, compose
from emendo.models.lm import LM
from emendo.models.sites import find_sites

PROMPT = "The capital of France is"


def generate(lm: LM, tokens: int) -> None:
    """So many new tokens, whatever they say."""
    inputs = lm.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False).to(lm.device)
    with torch.no_grad():
        lm.model.generate(
            **inputs,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id,
        )


def beside(lm: LM, edits: Sequence[Edit], tokens: int) -> None:
    """Generate with every edit attached by itself."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(lm))
        generate(lm, tokens)


def merged(lm: LM, edit: Edit, tokens: int) -> Callable[[], None]:
    """Generation by a copy of the model whose weights took the edit in."""
    import copy

    own = LM(copy.deepcopy(lm.model), lm.tokenizer, lm.name)
    own.__dict__["fingerprint"] = lm.fingerprint
    edit.merge_(own, keep=False)
    return lambda: generate(own, tokens)


def attach_and_detach(lm: LM, edits: Sequence[Edit]) -> None:
    """Every edit on and off again."""
    for attachment in [edit.attach(lm) for edit in edits]:
        attachment.detach()


def measure(lm: LM, options: argparse.Namespace) -> None:
    """Print both tables."""
    editor = Mend(find_sites(lm.model), MendConfig(rank=options.rank)).eval()
    records = facts(options, max(options.edits))
    edits = [editor.edit(lm, record.prompt, record.target) for record in records]
    assert all(isinstance(edit, Edit) for edit in edits)
    tokens = options.tokens
    cases: dict[str, Callable[[], Any]] = {"bare": lambda: generate(lm, tokens)}
    for count in options.edits:
        own: list[Any] = edits[:count]
        cases[f"{count} attached"] = lambda own=own: beside(lm, own, tokens)
        if count > 1:
            whole = compose(own)
            small = whole.compact(tolerance=0.01)
            cases[f"{count} composed (rank {whole.rank})"] = lambda e=whole: beside(lm, [e], tokens)
            cases[f"{count} composed, compacted to 1% (rank {small.rank})"] = lambda e=small: beside(
                lm, [e], tokens
            )
    cases[f"{max(options.edits)} merged"] = merged(lm, compose(edits), tokens)
    times = interleaved(cases, options)
    rows = [
        (name, Spread.of([tokens / t for t in values]), ratio(times["bare"], values))
        for name, values in times.items()
    ]
    table("Generation", ("edits", "tokens/s", "speed over bare"), rows)
    hooks: dict[str, Callable[[], Any]] = {
        f"{count} attached and detached": lambda own=edits[:count]: attach_and_detach(lm, own)
        for count in options.edits
    }
    rows = [(name, Spread.of(values).scaled(1e3)) for name, values in interleaved(hooks, options).items()]
    table("Attaching and detaching", ("edits", "ms"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=7)
    made.add_argument("--rank", type=int, default=MendConfig().rank)
    made.add_argument("--tokens", type=int, default=32)
    made.add_argument("--edits", type=int, nargs="+", default=[1, 10, 100])
    options = made.parse_args(arguments)
    machine(options)
    measure(load(options), options)


if __name__ == "__main__":
    main()
