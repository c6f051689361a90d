"""Measuring editors: scores of many edits, and one edit before and after."""

from emendo.evaluate.before_after import Answer, Question, Row, before_after, edit_with_answers, questions
from emendo.evaluate.evaluation import Evaluation, SequentialEvaluation
from emendo.evaluate.intervals import Interval
from emendo.evaluate.results import Outcome, Result
from emendo.evaluate.run import evaluate
from emendo.evaluate.sequential import evaluate_sequence

__all__ = [
    "Answer",
    "Evaluation",
    "Interval",
    "Outcome",
    "Question",
    "Result",
    "Row",
    "SequentialEvaluation",
    "before_after",
    "edit_with_answers",
    "evaluate",
    "evaluate_sequence",
    "questions",
]
