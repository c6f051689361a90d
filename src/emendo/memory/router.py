"""The judgement whether a prompt is in the scope of an edit: a small function of lexical evidence and of learned keys.

For an edit ``e`` and a query ``q``::

    x = (lexical evidence of words.compare,  cosine of the subject keys,  cosine of the relation keys)
    score = sigmoid(w2^T tanh(W1 x + b1) + b2)

The numbers of this function are fitted on facts that the keys were not trained on. Its threshold is the quantile of the
scores of held-out neighbours with 1,000 edits in memory: at the rate ``false_fires``, that share of them fires. Without
keys (a model that no router was trained for) a second such function uses the lexical evidence alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from emendo._storage import read_json, read_tensors, write_json, write_tensors
from emendo.errors import RequestError
from emendo.memory.encoder import KeyEncoder
from emendo.memory.index import Index, Scope
from emendo.memory.key_file import KeyFile
from emendo.memory.words import EVIDENCE, Prompt, compare
from emendo.models._fingerprint import same_model
from emendo.models.lm import LM

SHIPPED = Path(__file__).with_name("shipped")
"""One folder for each router that ships with emendo, and ``lexical`` for all other models."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Judge:
    """The function of the evidence.

    Attributes:
        w1: ``[hidden, evidence]``.
        b1: ``[hidden]``.
        w2: ``[hidden]``.
        b2: ``[1]``.
        scores: ascending scores of the strongest edit for each of the neighbours of the calibration.
    """

    w1: Floats
    b1: Floats
    w2: Floats
    b2: Floats
    scores: Floats

    def __call__(self, evidence: Floats) -> Floats:
        """The scores ``[n]`` of ``evidence [n, numbers]``."""
        inner = np.tanh(evidence @ self.w1.T + self.b1)
        return 1 / (1 + np.exp(-(inner @ self.w2 + self.b2)))  # type: ignore[no-any-return]

    def threshold(self, false_fires: float) -> float:
        """The score that the given share of the calibration's neighbours reaches.

        Raises:
            RequestError: the share is not between 0 and 1.
        """
        if not 0 <= false_fires <= 1:
            raise RequestError(f"A share of false fires is from 0 to 1, not {false_fires}.")
        place = len(self.scores) - int(false_fires * len(self.scores))
        return (
            float(np.nextafter(self.scores[-1], inf))
            if place == len(self.scores)
            else float(self.scores[place])
        )


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt that is to be routed, with its key ``[2, size]`` if the model has a router of its own."""

    prompt: Prompt
    key: Floats | None


class Router:
    """Reads prompts and scores them against the edits of an index.

    Args:
        judge: the function of the evidence.
        encoder: makes the keys; None works lexically.
        fingerprint: of the model that the encoder was trained for.
        info: how it was trained, as JSON values.
    """

    def __init__(
        self,
        judge: Judge,
        encoder: KeyEncoder | None = None,
        fingerprint: str = "",
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.judge, self.encoder, self.fingerprint, self.info = judge, encoder, fingerprint, dict(info or {})

    @classmethod
    def shipped_for(cls, lm: LM) -> Router:
        """The router that ships for a model, or the lexical one."""
        for folder in sorted(path for path in SHIPPED.iterdir() if path.name != "lexical"):
            if same_model(str(read_json(folder / "router.json")["fingerprint"]), lm.fingerprint):
                return cls.from_pretrained(folder)
        return cls.from_pretrained(SHIPPED / "lexical")

    @property
    def key_size(self) -> int:
        """Numbers of each part of a key; 0 without keys."""
        return 0 if self.encoder is None else self.encoder.size

    def keys(self, lm: LM, prompts: Sequence[str], file: KeyFile | None = None) -> Floats | None:
        """The keys ``[prompts, 2, size]``, rounded to half precision; None without an encoder.

        Args:
            lm: the model.
            prompts: the prompts.
            file: keeps them.
        """
        if self.encoder is None or not prompts:
            return None
        if file is not None:
            return file.keys(prompts, partial(self._computed, lm))
        return self._computed(lm, prompts)

    def _computed(self, lm: LM, prompts: Sequence[str]) -> Floats:
        assert self.encoder is not None
        return self.encoder.keys(lm, prompts).half().float().numpy()

    def key_file(self, folder: Path) -> KeyFile | None:
        """The file in a folder that keeps the keys of this router; None without an encoder."""
        return None if self.encoder is None else KeyFile(folder / f"{self.name}.keys", self.key_size)

    @cached_property
    def name(self) -> str:
        """16 hex digits that identify the keys; ``lexical`` without an encoder."""
        if self.encoder is None:
            return "lexical"
        found = hashlib.sha256(self.fingerprint.encode())
        for name, value in self.encoder.state_dict().items():
            found.update(name.encode() + value.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def read(self, lm: LM, prompts: Sequence[str], file: KeyFile | None = None) -> list[Query]:
        """Read prompts, of a long one its end; the file keeps their keys."""
        found = [Prompt.read(text) for text in prompts]
        keys = self.keys(lm, [prompt.text for prompt in found], file)
        return [Query(prompt, None if keys is None else keys[i]) for i, prompt in enumerate(found)]

    def scores(self, query: Query, index: Index) -> dict[int, float]:
        """The scores of the edits that may be meant, by their number; the best of an edit's scopes counts.

        A wording of the edit itself scores 1, whatever the judge says.
        """
        rows = index.candidates(query.prompt, query.key)
        if not rows:
            return {}
        found: dict[int, float] = {}
        for row, score in zip(rows, self.judge(self.evidence(query, index, rows)), strict=True):
            edit = index.edit(row)
            same = index.prompt(row).words == query.prompt.words
            found[edit] = max(found.get(edit, 0.0), 1.0 if same else float(score))
        return found

    def evidence(self, query: Query, index: Index, rows: Sequence[int]) -> Floats:
        """The evidence ``[rows, numbers]`` for the scopes of some rows of an index."""
        lexical = [compare(index.prompt(row), query.prompt) for row in rows]
        if query.key is None:
            return np.array(lexical, np.float32)
        learned = (index.key(rows) * query.key).sum(-1)
        return np.concatenate([np.array(lexical, np.float32), learned], 1)

    # ------------------------------------------------------------------------------------------ storage

    def save_pretrained(self, folder: Path) -> None:
        """Write ``router.json`` and ``router.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"judge.{name}": torch.from_numpy(getattr(self.judge, name)) for name in Judge.__slots__}
        head: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "evidence": list(EVIDENCE),
            "info": self.info,
        }
        if (encoder := self.encoder) is not None:
            tensors |= {f"encoder.{name}": value.contiguous() for name, value in encoder.state_dict().items()}
            head["encoder"] = {name: getattr(encoder, name) for name in ("width", "block", "size", "heads")}
        write_json(folder / "router.json", head)
        write_tensors(folder / "router.safetensors", tensors)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Router:
        """Read a router."""
        head, tensors = read_json(folder / "router.json"), read_tensors(folder / "router.safetensors")
        judge = Judge(*(tensors[f"judge.{name}"].float().numpy() for name in Judge.__slots__))
        encoder = None
        if (shape := head.get("encoder")) is not None:
            encoder = KeyEncoder(**shape)
            own = {name: t.float() for name, t in tensors.items() if name.startswith("encoder.")}
            encoder.load_state_dict({name.removeprefix("encoder."): t for name, t in own.items()})
            encoder.requires_grad_(False)
        return cls(judge, encoder, str(head["fingerprint"]), head["info"])


def index_of(router: Router, lm: LM, prompts: Sequence[Prompt], file: KeyFile | None = None) -> Index:
    """An index of one scope for each edit, numbered from 0; the file keeps the keys."""
    index = Index(router.key_size)
    scopes = [Scope(i, prompt) for i, prompt in enumerate(prompts)]
    index.add(scopes, router.keys(lm, [prompt.text for prompt in prompts], file))
    return index
