"""How time and memory grow: with the edits made at once, the text's length, the sites, the model's depth and width.

``exponent`` is the slope of log(time) over log(size): 1 is linear. The peak is that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import (
    CLOCKS,
    Spread,
    exponent,
    facts,
    in_child,
    interleaved,
    load,
    machine,
    parser,
    peak,
    table,
)
from transformers import LlamaConfig, LlamaForCausalLM

from emendo.editors.gradient import GradientEditor, edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.models.lm import LM
from emendo.models.sites import find_sites
from emendo.models.text import Text
from emendo.models.trunk import Trunk

LENGTH = 12  # tokens of a text where its length is not what varies


def editor_of(lm: LM, last: int = 3) -> Mend:
    """An untrained editor of the last blocks' MLPs."""
    return Mend(find_sites(lm.model, last=last), MendConfig()).eval()


def random_text(lm: LM, length: int) -> Text:
    """Random tokens, the last two of them the answer."""
    ids = torch.randint(0, lm.model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    return Text(tuple(ids.tolist()), length - 2)


@torch.no_grad()
def make(lm: LM, editor: GradientEditor, text: Text) -> None:
    """The change for one tokenised text."""
    editor(edit_factors(Trunk(lm.model, editor.sites), editor.sites, [text]))


def random_lm(like: LM, depth: int, width: int) -> LM:
    """A random Llama with another model's tokenizer."""
    config = LlamaConfig(
        vocab_size=len(like.tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        tie_word_embeddings=True,
    )
    return LM(LlamaForCausalLM(config).eval().requires_grad_(False), like.tokenizer, f"{depth}x{width}")


def curve(title: str, name: str, cases: dict[int, Callable[[], Any]], options: argparse.Namespace) -> None:
    """Time the cases and print them with the exponent."""
    times = interleaved({str(size): run for size, run in cases.items()}, options)
    rows = [(size, Spread.of(times[str(size)]).scaled(1e3)) for size in cases]
    slope = exponent(list(cases), [Spread.of(times[str(size)]).median for size in cases])
    table(f"{title}: exponent {slope:.2f}", (name, "ms"), rows)


def at_once(options: argparse.Namespace) -> None:
    """Facts edited in one call, each number in a process of its own."""
    found = {count: in_child(__file__, options, count) for count in options.edits}
    few = found[min(options.edits, key=lambda count: abs(count - 10))]["peak"]
    rows = [
        (count, one["seconds"], one["seconds"] / count * 1e3, one["peak"], one["peak"] / few, one["rank"])
        for count, one in found.items()
    ]
    slope = exponent(list(found), [one["seconds"] for one in found.values()])
    head = ("facts", "seconds", "ms each", "peak, MiB", "over 10 facts", "rank")
    table(f"Facts edited in one call: exponent {slope:.2f}", head, rows)


def child(options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Edit so many facts in one call; the fastest of two."""
    lm = load(options)
    editor = editor_of(lm)
    pairs = [(record.prompt, record.target) for record in facts(options, count)]
    editor.edit(lm, *pairs[0])
    seconds, rank = float("inf"), 0
    for _ in range(2):
        before = CLOCKS[options.clock]()
        edit: Any = editor.edit(lm, pairs)
        seconds, rank = min(seconds, CLOCKS[options.clock]() - before), edit.rank
        del edit
    return {"seconds": seconds, "peak": peak(), "rank": rank}


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, rounds=5)
    made.add_argument("--edits", type=int, nargs="+", default=[1, 10, 100, 1000])
    made.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    made.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    made.add_argument("--depths", type=int, nargs="+", default=[6, 12, 24, 48])
    made.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    options = made.parse_args(arguments)
    if options.child is not None:
        print(json.dumps(child(options, json.loads(options.child))))
        return
    machine(options)
    at_once(options)
    lm = load(options)
    editor = editor_of(lm)

    def case(lm: LM, editor: Mend, length: int = LENGTH) -> Callable[[], None]:
        text = random_text(lm, length)
        return lambda: make(lm, editor, text)

    curve("Length of the text", "tokens", {n: case(lm, editor, n) for n in options.lengths}, options)
    blocks = {n: editor_of(lm, last=n) for n in options.blocks}
    curve("Sites", "sites", {len(own.sites): case(lm, own) for own in blocks.values()}, options)
    for name, sizes in (("blocks", options.depths), ("width", options.widths)):
        models = {n: random_lm(lm, *((n, 512) if name == "blocks" else (8, n))) for n in sizes}
        title = (
            "Depth, random Llamas of width 512" if name == "blocks" else "Width, random Llamas of 8 blocks"
        )
        curve(title, name, {n: case(own, editor_of(own)) for n, own in models.items()}, options)


if __name__ == "__main__":
    main()
