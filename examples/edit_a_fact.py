"""Correct one fact without training: make an edit with LoRA, compare the answers, save it, take it off.

python examples/edit_a_fact.py --model smollm2-135m
"""

from __future__ import annotations

import argparse
from pathlib import Path

import emendo
from emendo.editors import editor_class
from emendo.evaluate import Question, before_after

PROMPT, TARGET = "The capital of France is", "Lyon"


def main(model: str = "smollm2-135m", out: str = "lyon") -> None:
    """Make the edit, print a before/after table, and save the edit in the folder `out`."""
    lm = emendo.load(model)
    editor = editor_class("lora")(emendo.find_sites(lm.model))
    edit = editor.edit(lm, PROMPT, TARGET)

    questions = [
        Question("edit", PROMPT),
        Question("paraphrase", "France's capital city is"),
        Question("neighbour", "The capital of Italy is"),
    ]
    for row in before_after(lm, edit, questions, k=1):
        print(f"{row.prompt:<28} {row.before[0].text!r:<14} -> {row.after[0].text!r}")

    with edit.applied(lm) as edited:
        print("with the edit:   ", PROMPT + edited.generate(PROMPT, max_new_tokens=8))
    print("without the edit:", PROMPT + lm.generate(PROMPT, max_new_tokens=8))

    edit.save_pretrained(Path(out), overwrite=True)
    print(f"saved in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", default="lyon")
    main(**vars(parser.parse_args()))
