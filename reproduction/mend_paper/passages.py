"""Edits of free text: passages of a Wikitext file, and for each a continuation that the model would not give.

MEND's data take the continuation from a second language model. Here it is sampled from the same model, which sees
only the second half of the passage, so the text is plausible but not the model's continuation of the whole passage.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from emendo._storage import cache_folder, digest
from emendo.data.records import read_records, write_records
from emendo.data.schema import Record
from emendo.errors import DataError
from emendo.models._sampling import sample_tokens
from emendo.models.lm import LM
from emendo.models.tokenization import to_texts
from emendo.progress import Progress

_SEED = 0
_TOKENS = 10  # of a continuation
_WORDS = (20, 40)  # of a prompt
_PASSAGE_WORDS = (40, 80)  # of a passage for locality: at least, and at most
_PARAPHRASES = 3
_TOGETHER = 32  # prompts that are continued at once
_HEADING = re.compile(r"(= )+.*( =)+")
_UNKNOWN = re.compile(r"\S*<unk>\S*")
_SPACED = (  # Wikitext's tokenisation, undone
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([,.;:!?%)\]]|'s\b|n't\b|'\w\w?\b)"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r'" ([^"]*) "'), r'"\1"'),
)


@dataclass(frozen=True, slots=True)
class Passages:
    """The parts of a Wikitext file: texts for locality, and prompts from other paragraphs."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    prompts: tuple[str, ...]


def read_passages(path: Path, train: int = 300, test: int = 150) -> Passages:
    """Cut a file with one paragraph a line: each paragraph serves once, by the longest part without unknown words.

    Args:
        path: a tokenised Wikitext file.
        train: the number of passages for locality in training.
        test: the number of passages for locality in tests.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a text with one paragraph a line: {error}") from error
    parts = [_known_part(line) for line in lines if not _HEADING.fullmatch(line)]
    random = Random(_SEED)
    random.shuffle(parts)
    long = [part for part in parts if len(part) >= _PASSAGE_WORDS[0]][: train + test]
    taken = {id(part) for part in long}
    rest = [part for part in parts if len(part) >= _WORDS[0] and id(part) not in taken]
    passages = [" ".join(part[: _PASSAGE_WORDS[1]]) for part in long]
    prompts = [" ".join(part[: random.randint(*_WORDS)]) for part in rest]
    return Passages(tuple(passages[:train]), tuple(passages[train:]), tuple(prompts))


def continuations(
    prompts: Sequence[str], count: int, load: Callable[[], LM], key: str, progress: Progress
) -> tuple[Record, ...]:
    """Records for the first `count` prompts that can be used, sampled once and kept in the cache folder.

    Args:
        prompts: the passages to continue.
        count: the number of records to make.
        load: loads the model if it is needed.
        key: identifies the model and the source of the prompts.
        progress: receives the progress.

    Raises:
        DataError: there are not enough prompts.
    """
    made_of = [key, list(prompts), count, _SEED, _TOKENS, _PARAPHRASES]
    path = cache_folder() / "tasks" / f"{digest(made_of)}.jsonl"
    if path.exists():
        return read_records(path).records
    records: list[Record] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for record in sample(load(), prompts):
            records.append(record)
            progress.update("continuations", len(records), count)
            if len(records) == count:
                break
    if len(records) < count:
        raise DataError(
            f"Only {len(records)} of {len(prompts)} passages could be continued, but {count} are needed; "
            "give a longer text."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(records, path)
    return tuple(records)


@torch.no_grad()
def sample(lm: LM, prompts: Sequence[str]) -> Iterator[Record]:
    """A record for each prompt whose sampled continuation is clean: the prompt's tokens and then the sampled ones.

    The continuation begins a new word, and it is not the greedy one after the whole prompt.
    """
    barred, barred_first = _barred(lm)
    for start in range(0, len(prompts), _TOGETHER):
        part = prompts[start : start + _TOGETHER]
        halves = lm.tokenizer(
            [_without_words(prompt, len(prompt.split()) // 2) for prompt in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(lm.device)
        rows = sample_tokens(lm, halves, _TOKENS, suppress_tokens=barred, begin_suppress_tokens=barred_first)
        pairs = [
            (p, lm.tokenizer.decode(ids).strip(), ids) for p, ids in zip(part, rows.tolist(), strict=True)
        ]
        pairs = [(prompt, target, ids) for prompt, target, ids in pairs if target]
        texts = to_texts(lm, [(prompt, target) for prompt, target, _ in pairs])
        clean = [text.labels == tuple(ids) for text, (_, _, ids) in zip(texts, pairs, strict=True)]
        greedy = [row.argmax(-1).tolist() for row in lm.logits(texts)]
        for (prompt, target, ids), good, likely in zip(pairs, clean, greedy, strict=True):
            if good and ids != likely:
                yield Record(prompt, target, id=f"wikitext/{prompt[:40]}", paraphrases=_shortened(prompt))


def _known_part(line: str) -> list[str]:
    """The words of the longest part of a paragraph between unknown words, as they are usually written."""
    text = max(_UNKNOWN.split(line), key=len).lstrip(" ,.;:!?%)]'")
    for pattern, written in _SPACED:
        text = pattern.sub(written, text)
    return text.split()


def _shortened(prompt: str) -> tuple[str, ...]:
    """The prompt without its first words, up to half of them, in a few lengths."""
    random = Random(prompt)
    half = len(prompt.split()) // 2
    return tuple(
        _without_words(prompt, number) for number in sorted(random.sample(range(1, half + 1), _PARAPHRASES))
    )


def _without_words(text: str, number: int) -> str:
    return " ".join(text.split()[number:])


def _barred(lm: LM) -> tuple[list[int], list[int]]:
    """Tokens that no continuation may hold (special, line breaks, broken characters), and that none may begin with."""
    special = set(lm.tokenizer.all_special_ids)
    texts: list[Any] = [lm.tokenizer.decode([number]) for number in range(lm.model.config.vocab_size)]
    barred = [i for i, text in enumerate(texts) if i in special or not text.isprintable() or "\ufffd" in text]
    first = [i for i, text in enumerate(texts) if not re.match(r" [A-Za-z0-9]", text)]
    return barred, first
