"""A fused edit that takes single edits in and lets them go, in closed form.

:func:`emendo.edits.fusing.fuse` solves for all edits anew. A :class:`FusedEdits` keeps, for each matrix, the solution
and the inverse of its system (recursive least squares), so that taking an edit in, or out again, costs a product with
its few rows (Woodbury)::

    P = (X^T X + keep * A)^-1        gain = (X P X^T + I)^-1 X P
    D <- D + (Y - X D^T)^T gain      P <- P - P X^T gain

To within rounding the change does not depend on the order, and an edit that went in and out again leaves no trace. The
rows ``x`` of every edit are those of the clean model, since rows that depended on the edits before them could not be
taken out; so ``fuse``, which solves each matrix on the inputs that it gets once those before it are changed, fits its
edits somewhat better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from emendo.edits.edit import Edit, common_origin
from emendo.edits.fusing import (
    KEEP,
    TOKENS,
    check_fusible,
    default_passages,
    input_moments,
    own_texts,
    rows_of,
    with_ridge,
)
from emendo.errors import RequestError
from emendo.least_squares import RecursiveLeastSquares
from emendo.low_rank import LowRank
from emendo.models._experts import ExpertMatrix
from emendo.models.lm import LM
from emendo.models.sites import Site
from emendo.models.tokenization import passage_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache


class FusedEdits:
    """Edits fused into one, which come and go in closed form.

    Args:
        lm: the model of the edits, a decoder.
        sites: the matrices that they change.
        keep: weight of running text against the edits' own texts.
        passages: running text that should not change; by default text that the model generates and built-in facts.
        folder: a cache for the model's generated passages.

    Attributes:
        edits: the edits that are in, by the names they were given.

    Raises:
        RequestError: the model is not a decoder, or a matrix is an expert of a mixture.
    """

    def __init__(
        self,
        lm: LM,
        sites: tuple[Site, ...],
        *,
        keep: float = KEEP,
        passages: Sequence[str] = (),
        folder: Path | None = None,
    ) -> None:
        if routed := [site.name for site in sites if isinstance(site.module(lm.model), ExpertMatrix)]:
            raise RequestError(
                f"{routed[0]} is an expert, which sees some tokens only: fuse its edits with fuse()."
            )
        check_fusible(lm, (), (), keep)
        self.lm, self.sites, self.keep = lm, sites, keep
        self.edits: dict[str, Edit] = {}
        self._rows: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        running = passage_texts(lm, passages or default_passages(lm, folder), TOKENS)
        store = self._store()
        store.ensure(running)
        moments = input_moments(store, running)
        self._solutions = {
            site.name: RecursiveLeastSquares.start(with_ridge(keep * moments[site.name]), site.d_out)
            for site in sites
        }

    @torch.no_grad()
    def add(self, name: str, edit: Edit, paraphrases: Sequence[str] = ()) -> None:
        """Take an edit in.

        Args:
            name: to take it out by.
            edit: an edit with requests.
            paraphrases: more prompts at which it keeps its effect, with the target of its first request.

        Raises:
            RequestError: there is an edit of that name, it has no requests, or it changes another matrix.
            MismatchError: it belongs to another model.
        """
        if name in self.edits:
            raise RequestError(f"There is an edit named {name!r} already.")
        if others := set(edit.deltas) - self._solutions.keys():
            raise RequestError(
                f"The edit changes {min(others)}, which is not among the matrices that are fused."
            )
        check_fusible(self.lm, (edit,), (), self.keep)
        texts = own_texts(self.lm, edit, paraphrases)
        store = self._store()
        store.ensure(texts)
        inputs = rows_of(store, texts)
        with edit.applied(self.lm):
            wanted = rows_of(store, texts)
        rows = {}
        for site in self.sites:
            x = inputs[site.name].rows
            change = edit.deltas.get(site.name)
            y = (
                x.new_zeros(len(x), site.d_out)
                if change is None
                else change.to(x.device)(wanted[site.name].rows)
            )
            rows[site.name] = x, y
        self._update(rows, "add")
        self.edits[name], self._rows[name] = edit, rows

    def remove(self, name: str) -> None:
        """Take an edit out.

        Raises:
            RequestError: there is none of that name.
        """
        if name not in self.edits:
            raise RequestError(f"There is no edit named {name!r}.")
        self._update(self._rows.pop(name), "remove")
        del self.edits[name]

    def edit(self) -> Edit:
        """The fused edit.

        Raises:
            RequestError: no edit is in.
        """
        origin = common_origin(list(self.edits.values()), "fused", {"keep": self.keep})
        dtype = torch.promote_types(self.lm.model.dtype, torch.float32)
        deltas = {name: LowRank.from_dense(own.change.to(dtype)) for name, own in self._solutions.items()}
        return Edit(deltas, origin, {"fused": {"edits": len(self.edits)}})

    def _update(self, rows: Mapping[str, tuple[Tensor, Tensor]], how: str) -> None:
        for name, (x, y) in rows.items():
            getattr(self._solutions[name], how)(x, y)

    def _store(self) -> TrunkCache:
        return TrunkCache(Trunk(self.lm.model, self.sites), dtype=self.lm.model.dtype)
