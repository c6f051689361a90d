"""Many edits as one, by least squares: each keeps its effect at its own texts, and the effect elsewhere stays small.

Adding edits up (:func:`emendo.edits.edit.compose`) adds what they have in common once for each edit, and a handful may
ruin a model that each of them leaves intact. Fusing solves, for each matrix::

    min over dW    sum_i ||dW x_i - y_i||^2  +  keep * mean_j ||dW p_j||^2

    x_i     the matrix's input at the edits' prompts and targets, and at paraphrases where they are given
    y_i     the output that the edit of row i adds there when applied alone, dW_e x_i
    p_j     the matrix's input at running text and at built-in facts, where nothing should change

    dW = Y^T X (X^T X + keep * P^T P / n)^-1

With ``gradients`` a change counts, on running text, by what it does to the text's likelihood, not by its size:
``keep * mean_j ||S^(1/2) dW p_j||^2``, where ``S`` is the second moment of the gradients at the matrix's outputs,
scaled to a mean eigenvalue of 1 (K-FAC, :mod:`emendo.models.moments`).

An expert of a mixture has these rows for the tokens that are routed to it. Elsewhere its x_i and p_j count as zero, and
so does the y_i of an edit under which the token takes another way.

The matrices are solved in the order in which they run, each on its inputs once those before it are changed, so that no
matrix relies on an effect that another no longer has. Without the second term this is RegMean (Jin et al.,
ICLR 2023) for changes of weights; the second term and the order are those of MEMIT (Meng et al., ICLR 2023, section 4).

Nothing is trained, and the order of the edits does not matter. To remove an edit, fuse the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from emendo.data import atlas
from emendo.edits.edit import Edit, common_origin
from emendo.errors import RequestError
from emendo.least_squares import change_of_two_sides, solve
from emendo.low_rank import LowRank, applied
from emendo.models._experts import ExpertMatrix
from emendo.models._packing import Rows
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.moments import second_moments
from emendo.models.sites import Site, all_sites
from emendo.models.text import Text, collate, length_buckets
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

KEEP = 30.0
"""Weight of running text; 10 to 100 work equally well (docs/log.md)."""
_PASSAGES = 256
_FACTS = 500
TOKENS = 64  # of a passage, at most
_TOGETHER = 64  # passages whose rows are held at once
_BATCH_TOKENS = 512
_FLOOR = 0.01  # of the weight of an output, as a multiple of the mean
_RIDGE = 1e-6  # of the mean square of a feature, for directions that occur in no text


@torch.no_grad()
def fuse(
    lm: LM,
    edits: Sequence[Edit],
    *,
    paraphrases: Sequence[Sequence[str]] = (),
    keep: float = KEEP,
    passages: Sequence[str] = (),
    folder: Path | None = None,
    gradients: bool = False,
    rewordings: Sequence[Sequence[str]] = (),
) -> Edit:
    """Several edits as one that has, at each edit's own texts, the effect of that edit; see the module's docstring.

    Args:
        lm: the model of the edits.
        edits: edits with requests.
        paraphrases: for each edit, more prompts at which it keeps its effect, with the target of its first request.
        keep: weight of running text against the edits' own texts.
        passages: running text that should not change, one passage a string; by default text that the model generates
            and built-in facts.
        folder: a cache for the model's generated passages.
        gradients: weigh a change of running text by the gradients there; not for experts of a mixture.
        rewordings: the former name of ``paraphrases``.

    Returns:
        An edit whose card states the error under ``fused``: ``||dW x - y|| / ||y||`` over all rows and matrices.

    Raises:
        RequestError: there are no edits, an edit has no requests or holds NaN, the model is not a decoder, ``keep`` is
            negative, there are paraphrases for another number of edits, or the running text is empty.
        MismatchError: an edit belongs to another model.
    """
    if rewordings:
        warnings.warn("fuse(rewordings=...) is now fuse(paraphrases=...)", DeprecationWarning, stacklevel=2)
        paraphrases = rewordings
    origin = common_origin(edits, "fused", {"keep": keep})
    check_fusible(lm, edits, paraphrases, keep)
    names = {name for edit in edits for name in edit.deltas}
    sites = tuple(site for site in all_sites(lm.model) if site.name in names)
    store = TrunkCache(Trunk(lm.model, sites), dtype=lm.model.dtype)
    more = paraphrases or [()] * len(edits)
    own = [own_texts(lm, edit, prompts) for edit, prompts in zip(edits, more, strict=True)]
    texts = [text for group in own for text in group]
    running = passage_texts(lm, passages or default_passages(lm, folder), TOKENS)
    if not running:
        raise RequestError("The running text has no passage of at least two tokens.")
    store.ensure([*texts, *running])

    moments = input_moments(store, running)
    outputs = _output_moments(lm, sites, running) if gradients else {}
    targets = _targets(lm, store, edits, own)
    fused: dict[str, LowRank] = {}
    missed = total = 0.0
    for group in _groups(moments, lm.model):
        with applied(lm.model, fused):
            inputs = rows_of(store, texts, group)
        for name in group:
            x, y = inputs[name], targets.pop(name)
            wanted = y.at(x.place)
            total += float(y.rows.square().sum())
            missed += float(y.rows.square().sum() - wanted.square().sum())
            if len(x.rows):
                fused[name] = _solved(x.rows, wanted, keep * moments[name], outputs.get(name))
                missed += float((fused[name](x.rows) - wanted).square().sum())
    error = (missed / total) ** 0.5 if total else 0.0
    dtype = torch.promote_types(lm.model.dtype, torch.float32)
    return Edit(
        {name: delta.to(dtype) for name, delta in fused.items()},
        origin,
        {"fused": {"edits": len(edits), "error": error}},
    )


def check_fusible(lm: LM, edits: Sequence[Edit], paraphrases: Sequence[Sequence[str]], keep: float) -> None:
    """Refuse what cannot be fused; see :func:`fuse`."""
    for edit in edits:
        edit.check(lm)
        edit.check_numbers()
        if not edit.origin.requests:
            raise RequestError(
                f"An edit made by {edit.origin.editor!r} has no requests, so there is no text at which its effect "
                "could be kept."
            )
    if lm.kind != "causal":
        raise RequestError(f"Edits can be fused in decoders only, and {lm.name} is a {lm.kind}.")
    if paraphrases and len(paraphrases) != len(edits):
        raise RequestError(f"There are {len(edits)} edits, but paraphrases for {len(paraphrases)}.")
    if not keep >= 0:
        raise RequestError(f"keep must not be negative, but is {keep}.")


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Rows of a matrix at some texts: inputs, or outputs.

    Attributes:
        rows: ``[n, d]``, float64.
        place: ``[n]`` the number of each row's token among the relevant tokens of all texts, ascending. A matrix that
            is no expert has a row for every token.
        count: number of these tokens.
    """

    rows: Tensor
    place: Tensor
    count: int

    def at(self, place: Tensor) -> Tensor:
        """The rows of some tokens; zero where a token has none."""
        dense = self.rows.new_zeros(self.count, self.rows.shape[1]).index_copy(0, self.place, self.rows)
        return dense.index_select(0, place)

    @classmethod
    def concatenate(cls, parts: Sequence[_Rows]) -> _Rows:
        """The rows of several lists of texts."""
        starts = [sum(part.count for part in parts[:i]) for i in range(len(parts))]
        return cls(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.place + start for part, start in zip(parts, starts, strict=True)]),
            sum(part.count for part in parts),
        )


def input_moments(store: TrunkCache, texts: Sequence[Text]) -> dict[str, Tensor]:
    """For each matrix, in the order in which they run, the mean of ``p p^T`` over its inputs ``p`` at some texts."""
    sums: dict[str, Tensor] = {}
    for start in range(0, len(texts), _TOGETHER):
        for name, p in rows_of(store, texts[start : start + _TOGETHER]).items():
            sums[name] = sums.get(name, 0) + p.rows.T @ p.rows
    count = sum(len(text.inputs) for text in texts)
    return {name: total / count for name, total in sums.items()}


def _targets(
    lm: LM, store: TrunkCache, edits: Sequence[Edit], texts: Sequence[Sequence[Text]]
) -> dict[str, _Rows]:
    """For each matrix, the output that each edit adds at its own texts when applied alone."""
    d_out = {name: len(delta.left) for edit in edits for name, delta in edit.deltas.items()}
    found: dict[str, list[_Rows]] = {}
    for edit, own in zip(edits, texts, strict=True):
        with edit.applied(lm):
            for name, x in rows_of(store, own).items():
                change = edit.deltas.get(name)
                rows = x.rows
                added = (
                    rows.new_zeros(len(rows), d_out[name]) if change is None else change.to(rows.device)(rows)
                )
                found.setdefault(name, []).append(replace(x, rows=added))
    return {name: _Rows.concatenate(parts) for name, parts in found.items()}


def _groups(names: Iterable[str], model: nn.Module) -> list[list[str]]:
    """Matrices in the order in which they run; those that cannot change each other's inputs together.

    These are the matrices of one parameter of fused experts: a token's way through one expert does not depend on
    another.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, model), []).append(name)
    return list(groups.values())


def _group(name: str, model: nn.Module) -> str:
    if not isinstance(model.get_submodule(name), ExpertMatrix):
        return name
    owner, _, parameter = name.rsplit(".", 2)
    return f"{owner}.{parameter}"


def default_passages(lm: LM, folder: Path | None) -> list[str]:
    """Text that the model generates, and short statements of facts, whose answers an edit changes first."""
    facts = [f"{fact.prompt} {fact.answer}" for fact in atlas.load("train")]
    return [*own_passages(lm, _PASSAGES, folder), *facts[:: max(1, len(facts) // _FACTS)]]


def own_texts(lm: LM, edit: Edit, paraphrases: Sequence[str]) -> list[Text]:
    """The requests of an edit, and their paraphrases with the target of the first one."""
    requests = edit.origin.requests
    asked = [*requests, *(requests[0].asking(prompt) for prompt in paraphrases)]
    return to_texts(lm.reading(chat=edit.origin.chat), [request.pair for request in asked])


def rows_of(store: TrunkCache, texts: Sequence[Text], names: Sequence[str] = ()) -> dict[str, _Rows]:
    """The inputs of matrices (by default all of them) at some texts; the matrices in the order in which they run."""
    sites = [site for site in store.trunk.sites if not names or site.name in names]
    found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {site.name: {} for site in sites}
    counts: dict[str, dict[int, int]] = {site.name: {} for site in sites}
    order: dict[str, None] = {}  # of the groups
    for places in length_buckets(range(len(texts)), lambda i: texts[i].size, _BATCH_TOKENS):
        chosen = [texts[i] for i in places]
        relevant = store.trunk.relevant_rows(collate(chosen))

        def keep(
            name: str, places: Sequence[int] = places, relevant: Mapping[str, Rows] = relevant
        ) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                order.setdefault(_group(name, store.model))
                rows, place, owner = _relevant(args[0].flatten(0, -2), module, relevant[name])
                own = torch.bincount(owner, minlength=len(places)).tolist()
                parts = zip(rows.double().split(own), place.split(own), strict=True)
                found[name].update(zip(places, parts, strict=True))

            return hook

        with ExitStack() as stack:
            for name, own in counts.items():
                own.update(
                    zip(
                        places,
                        torch.bincount(relevant[name].owner, minlength=len(places)).tolist(),
                        strict=True,
                    )
                )
                stack.callback(store.model.get_submodule(name).register_forward_hook(keep(name)).remove)
            store.logits(chosen)
    first = list(order)
    return {
        site.name: _in_order(found[site.name], [counts[site.name][i] for i in range(len(texts))], site.d_in)
        for site in sorted(sites, key=lambda site: first.index(_group(site.name, store.model)))
    }


def _relevant(x: Tensor, module: nn.Module, relevant: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The relevant ones among a matrix's inputs: the rows, their numbers among their text's, and their texts."""
    index, owner = relevant.index.to(x.device), relevant.owner.to(x.device)
    count = torch.bincount(owner)
    number = torch.arange(len(owner), device=x.device) - (count.cumsum(0) - count)[owner]
    routed = getattr(module, "rows", None)
    if routed is None:
        return x[index], number, owner
    token, tokens = routed
    row = index.new_full((tokens,), -1).index_copy(0, token, torch.arange(len(token), device=x.device))[index]
    seen = row >= 0
    return x[row[seen]], number[seen], owner[seen]


def _in_order(parts: Mapping[int, tuple[Tensor, Tensor]], counts: Sequence[int], d_in: int) -> _Rows:
    """The rows of all texts, from those of each text and the numbers of their tokens; an expert may have none."""
    nothing = torch.zeros(0, d_in, dtype=torch.float64), torch.zeros(0, dtype=torch.long)
    own = [_Rows(*parts.get(i, nothing), count) for i, count in enumerate(counts)]
    return _Rows.concatenate(own)


def _output_moments(lm: LM, sites: tuple[Site, ...], texts: Sequence[Text]) -> dict[str, Tensor]:
    """``S [d_out, d_out]`` of each matrix, with a mean eigenvalue of 1, and a floor so that no direction is free."""
    if routed := [site.name for site in sites if isinstance(site.module(lm.model), ExpertMatrix)]:
        raise RequestError(f"{routed[0]} is an expert, which sees some tokens only: leave gradients out.")
    found = second_moments(lm, sites, texts)
    return {
        name: own.outputs / own.outputs.diagonal().mean()
        + _FLOOR * torch.eye(len(own.outputs)).to(own.outputs)
        for name, own in found.items()
    }


def with_ridge(moment: Tensor) -> Tensor:
    """A moment with a small ridge for directions that occur in no text."""
    ridge = _RIDGE * moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return moment + ridge * torch.eye(len(moment)).to(moment)


def _solved(x: Tensor, y: Tensor, moment: Tensor, outputs: Tensor | None = None) -> LowRank:
    """``argmin ||x dW^T - y||^2 + tr(S dW moment dW^T)`` as factors, for ``x [n, d_in]`` and ``y [n, d_out]``.

    Without ``outputs``, ``S`` is the identity.
    """
    if outputs is not None:
        return LowRank.from_dense(change_of_two_sides(x, y, with_ridge(moment), outputs)).compact()
    both = with_ridge(x.T @ x + moment)
    return LowRank(y.T, solve(both, x.T).T).compact()
