"""CounterFact in the one-paraphrase layout of the editing field.

Keys: `case_id, prompt, target_new, subject, ground_truth, rephrase_prompt, locality_prompt,
locality_ground_truth`. The relation is not part of this layout, so `Record.relation` stays None.
"""

from emendo.data.schema import Fields, Record

KEYS = frozenset({"target_new", "rephrase_prompt", "ground_truth", "locality_prompt"})
PARAPHRASE = "rephrase_prompt"


def to_record(fields: Fields) -> Record:
    """Maps a CounterFact object to a record."""
    paraphrase, answer = fields.optional("rephrase_prompt"), fields.optional("ground_truth")
    return Record(
        prompt=fields.text("prompt").rstrip(),
        target=fields.text("target_new").strip(),
        subject=fields.optional("subject"),
        id=fields.label("case_id"),
        paraphrases=() if paraphrase is None else (paraphrase.rstrip(),),
        neighbours=fields.pair("locality_prompt", "locality_ground_truth"),
        answer=answer and answer.strip(),
    )
