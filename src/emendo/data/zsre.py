"""zsRE in the layout of the MEND code.

Keys: `subject, src, pred, rephrase, alt, answers, loc, loc_ans, cond`. The true answer is `answers[0]`,
or `pred` (a model's old prediction) where `answers` is missing or empty; `cond` is not read.
Locality prompts keep the "nq question: " that the files put before them.
"""

from emendo.data.schema import Fields, Record

KEYS = frozenset({"src", "alt", "rephrase", "loc_ans"})
PARAPHRASE = "rephrase"


def to_record(fields: Fields) -> Record:
    """Maps a zsRE object to a record."""
    paraphrase = fields.optional("rephrase")
    answers = fields.texts("answers")
    answer = answers[0] if answers else fields.optional("pred")
    return Record(
        prompt=fields.text("src").rstrip(),
        target=fields.text("alt").strip(),
        subject=fields.optional("subject"),
        paraphrases=() if paraphrase is None else (paraphrase.rstrip(),),
        unrelated=fields.pair("loc", "loc_ans"),
        answer=answer and answer.strip(),
    )
