"""Keep edits in a model's ledger: apply, refuse, undo, revert one of many; and serve a batch under different edits.

python examples/keep_many_edits.py --ledger my-ledger
"""

from __future__ import annotations

import argparse

import emendo
from emendo.editors import editor_class
from emendo.edits import applied_to_rows
from emendo.ledger import RefusedError, Workspace

FACTS = (
    ("The capital of France is", "Lyon"),
    ("The capital of Italy is", "Milan"),
    ("The capital of Spain is", "Seville"),
)


def main(model: str = "smollm2-135m", ledger: str = "my-ledger") -> None:
    """Apply three edits through the guard, revert the first, undo the last, and print what is active."""
    lm = emendo.load(model)
    editor = editor_class("lora")(emendo.find_sites(lm.model))
    work = Workspace.open(lm, ledger)

    edits = [editor.edit(lm, prompt, target) for prompt, target in FACTS]
    for edit in edits:
        prompt = edit.origin.requests[0].prompt
        try:
            work.apply(edit)
            print(f"applied: {prompt}")
        except RefusedError as refused:
            print(f"refused: {prompt}: {'; '.join(refused.problems)}")
            work.apply(edit, force=True, note="example")

    work.revert(1)
    work.undo()
    print("active:", [entry.requests[0]["prompt"] for entry in work.ledger.entries(work.ledger.head.active)])

    with work.applied() as working:
        print("the working model:", working.generate(FACTS[1][0], max_new_tokens=6))
    with applied_to_rows(lm, [[edits[0]], [edits[1]], []]) as rows:
        print("one batch, three models:", rows.generate([FACTS[0][0]] * 3, max_new_tokens=6))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ledger", default="my-ledger")
    main(**vars(parser.parse_args()))
