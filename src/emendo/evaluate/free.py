"""Free generation: greedy continuations of prompts by the clean and the edited model, and whether they are right."""

from __future__ import annotations

from collections.abc import Sequence

from emendo.evaluate.asking import Asked
from emendo.evaluate.batches import Continuations
from emendo.evaluate.cases import by_budget
from emendo.evaluate.forced import Row
from emendo.evaluate.metrics import answer_match, full_match, same_answer


def speak(rows: Sequence[Row], asked: Asked, clean: Continuations) -> None:
    """Let every prompt be continued under its edit and note what was said in the cases.

    Args:
        rows: the prompts; those for which no token is to be generated are left out.
        asked: the edits.
        clean: the clean model's continuations.
    """
    wanted = [(row, case) for row, case in rows if case.budget]
    clean.ensure([case for _, case in wanted])
    for part in by_budget(wanted, lambda item: item[1]):
        prompts = [case.prompt for _, case in part]
        texts = asked.generate([row for row, _ in part], prompts, part[0][1].budget)
        for (_, case), text in zip(part, texts, strict=True):
            case.found["text_after"] = text
            if case.local:
                case.found["generated"] = same_answer(case.found["text_before"], text, case.answer)
            else:
                case.found["generated"] = answer_match(text, case.answer)
                case.found["exact"] = full_match(text, case.answer)
