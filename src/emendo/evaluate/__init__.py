"""Measuring editors, and showing what an edit did."""

from emendo.evaluate.before_after import Answer, Question, Row, before_after, questions
from emendo.evaluate.evaluation import Evaluation
from emendo.evaluate.results import Outcome, Result
from emendo.evaluate.run import evaluate

__all__ = [
    "Answer",
    "Evaluation",
    "Outcome",
    "Question",
    "Result",
    "Row",
    "before_after",
    "evaluate",
    "questions",
]
