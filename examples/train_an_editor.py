"""Train MEND on records and measure it on others.

python examples/train_an_editor.py --data facts.jsonl --steps 500
"""

from __future__ import annotations

import argparse

import torch

import emendo
from emendo.editors.mend import Mend, MendConfig
from emendo.evaluate import evaluate
from emendo.train import TrainConfig, train


def main(
    model: str = "smollm2-135m",
    data: str = "atlas",
    out: str = "my-editor",
    steps: int = 500,
    rank: int = 256,
) -> None:
    """Train for `steps` steps, print three scores on held-out records, and save the editor in the folder `out`."""
    lm = emendo.load(model)
    records = list(emendo.read_records(data).records)
    held_out, learn = records[:20], records[20:]

    torch.manual_seed(0)
    editor = Mend(emendo.find_sites(lm.model), MendConfig(rank=rank))
    result = train(lm, editor, learn, held_out, TrainConfig(steps=steps, warmup=min(100, steps)))
    print(f"{result.steps} steps in {result.seconds:.0f} s")

    evaluation = evaluate(lm, result.editor, held_out, generated=False)
    for name, score in evaluation.scores().items():
        print(
            f"{name}: {score.mean:.2f} ({score.low:.2f} to {score.high:.2f})"
            if score
            else f"{name}: not measured"
        )

    result.editor.save_pretrained(out, overwrite=True)
    print(f"saved in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="atlas", help="a file of records, or atlas for the built-in facts")
    parser.add_argument("--out", default="my-editor")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=256)
    main(**vars(parser.parse_args()))
