"""Many edits as one, by least squares: what each does at its own texts stays, what they do elsewhere is kept small.

Adding edits up (:func:`emendo.edits.edit.compose`) adds what they share as often as there are edits, and a handful may
ruin a model that each of them leaves intact. Fusing asks for something else. For each matrix::

    min over dW    sum_i ||dW x_i - y_i||^2  +  keep * mean_j ||dW p_j||^2

    x_i     the rows that the edits' prompts and targets, and rewordings where they are given, send through the matrix
    y_i     what the edit of row i adds there when it stands alone, dW_e x_i
    p_j     the rows of running text and of built-in facts, which shall stay as they are

    dW = Y^T X (X^T X + keep * P^T P / n)^-1

The matrices are solved for in the order in which they run, each on the rows that it gets once those before it are
changed, so that no matrix relies on what another no longer does. Without the second term this is RegMean (Jin et al.,
ICLR 2023) for changes of weights; the second term and the order are MEMIT's (Meng et al., ICLR 2023, section 4).

Nothing is learnt and the order of the edits does not matter: to take one of them out again, fuse the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from emendo.data import atlas
from emendo.edits.edit import Edit, common_origin
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models._packing import Rows
from emendo.models._sampling import own_passages
from emendo.models.lm import LM
from emendo.models.sites import all_sites
from emendo.models.text import Text, collate, length_buckets
from emendo.models.tokenization import passage_texts, to_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

KEEP = 30.0
"""Weight of what must stay; 10 to 100 serve alike (docs/log.md)."""
_PASSAGES = 256
_FACTS = 500
_TOKENS = 64  # of a passage, at most
_TOGETHER = 64  # passages whose rows are held at once
_BATCH_TOKENS = 512
_RIDGE = 1e-6  # of the mean square of a row's numbers, where neither rows nor passages say anything


@torch.no_grad()
def fuse(
    lm: LM,
    edits: Sequence[Edit],
    *,
    rewordings: Sequence[Sequence[str]] = (),
    keep: float = KEEP,
    passages: Sequence[str] = (),
    folder: Path | None = None,
) -> Edit:
    """Several edits as one that does at each edit's own texts what that edit does there; see the module's text.

    Args:
        lm: the model that they were made for.
        edits: edits that know what they were asked for.
        rewordings: for each edit, more prompts at which it shall do what it does, with the target of its first request.
        keep: weight of the running text against the rows of the edits.
        passages: running text that shall stay, one passage a string; without any, what the model writes by itself, and
            built-in facts.
        folder: where the model's own passages are kept for the next time.

    Returns:
        An edit whose card says under ``fused`` how far it is from what the edits do, ``||dW x - y|| / ||y||`` over all
        rows and matrices.

    Raises:
        RequestError: no edit, one that does not say what it was asked for, a model that is no decoder, a negative
            weight, rewordings of another number of edits, or running text without any.
        MismatchError: an edit was made for another model.
    """
    origin = common_origin(edits, "fused", {"keep": keep})
    for edit in edits:
        edit.check(lm)
        if not edit.origin.requests:
            raise RequestError(
                f"An edit of {edit.origin.editor!r} does not say what it was asked for, so there is no text at which "
                "it could be held to what it does."
            )
    if lm.kind != "causal":
        raise RequestError(f"Edits are fused in decoders only, and {lm.name} is a {lm.kind}.")
    if rewordings and len(rewordings) != len(edits):
        raise RequestError(f"There are {len(edits)} edits, but rewordings of {len(rewordings)}.")
    if not keep >= 0:
        raise RequestError(f"keep must not be negative, but is {keep}.")
    names = {name for edit in edits for name in edit.deltas}
    sites = tuple(site for site in all_sites(lm.model) if site.name in names)
    store = TrunkCache(Trunk(lm.model, sites), dtype=lm.model.dtype)
    more = rewordings or [()] * len(edits)
    asked = [_asked(lm, edit, prompts) for edit, prompts in zip(edits, more, strict=True)]
    texts = [text for own in asked for text in own]
    running = passage_texts(lm, passages or _own(lm, folder), _TOKENS)
    if not running:
        raise RequestError("The running text has no passage of at least two tokens.")
    store.ensure([*texts, *running])

    stay = _second_moments(store, running)
    wanted = _wanted(lm, store, edits, asked)
    fused: dict[str, LowRank] = {}
    missed = total = 0.0
    for name, moment in stay.items():
        with applied(lm.model, fused):
            x = _rows(store, texts)[name]
        y = wanted.pop(name)
        fused[name] = _solved(x, y, keep * moment)
        missed += float((fused[name](x) - y).square().sum())
        total += float(y.square().sum())
    error = (missed / total) ** 0.5 if total else 0.0
    dtype = torch.promote_types(lm.model.dtype, torch.float32)
    return Edit(
        {name: delta.to(dtype) for name, delta in fused.items()},
        origin,
        {"fused": {"edits": len(edits), "error": error}},
    )


def _second_moments(store: TrunkCache, texts: Sequence[Text]) -> dict[str, Tensor]:
    """For each matrix, in the order in which they run, the mean of ``p p^T`` over the rows of some texts."""
    sums: dict[str, Tensor] = {}
    for start in range(0, len(texts), _TOGETHER):
        for name, p in _rows(store, texts[start : start + _TOGETHER]).items():
            sums[name] = sums.get(name, 0) + p.T @ p
    count = sum(len(text.inputs) for text in texts)
    return {name: total / count for name, total in sums.items()}


def _wanted(
    lm: LM, store: TrunkCache, edits: Sequence[Edit], asked: Sequence[Sequence[Text]]
) -> dict[str, Tensor]:
    """For each matrix, what each edit adds there to the rows of its own texts when it stands alone."""
    d_out = {name: len(delta.left) for edit in edits for name, delta in edit.deltas.items()}
    found: dict[str, list[Tensor]] = {}
    for edit, own in zip(edits, asked, strict=True):
        with edit.applied(lm):
            for name, x in _rows(store, own).items():
                change = edit.deltas.get(name)
                added = x.new_zeros(len(x), d_out[name]) if change is None else change.to(x.device)(x)
                found.setdefault(name, []).append(added)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _own(lm: LM, folder: Path | None) -> list[str]:
    """What the model writes by itself, and facts told shortly: answers are what an edit moves first."""
    told = [f"{fact.prompt} {fact.answer}" for fact in atlas.load("train")]
    return [*own_passages(lm, _PASSAGES, folder), *told[:: max(1, len(told) // _FACTS)]]


def _asked(lm: LM, edit: Edit, rewordings: Sequence[str]) -> list[Text]:
    """What the edit was asked for, and the same in other words."""
    requests = edit.origin.requests
    pairs = [(r.prompt, r.target) for r in requests] + [(prompt, requests[0].target) for prompt in rewordings]
    return to_texts(lm.reading(chat=edit.origin.chat), pairs)


def _rows(store: TrunkCache, texts: Sequence[Text]) -> dict[str, Tensor]:
    """What some texts send through each matrix, in float64; the matrices in the order in which they run."""
    found: dict[str, dict[int, Tensor]] = {}
    for places in length_buckets(range(len(texts)), lambda i: texts[i].size, _BATCH_TOKENS):
        chosen = [texts[i] for i in places]
        matter = store.trunk.relevant_rows(collate(chosen))

        def keep(
            name: str, places: Sequence[int] = places, matter: Mapping[str, Rows] = matter
        ) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                index, owner = matter[name].index, matter[name].owner
                rows = args[0].flatten(0, -2)[index.to(args[0].device)].double()
                own = rows.split(torch.bincount(owner, minlength=len(places)).tolist())
                found.setdefault(name, {}).update(zip(places, own, strict=True))

            return hook

        with ExitStack() as stack:
            for name in matter:
                stack.callback(store.model.get_submodule(name).register_forward_hook(keep(name)).remove)
            store.logits(chosen)
    return {name: torch.cat([own[i] for i in range(len(texts))]) for name, own in found.items()}


def _solved(x: Tensor, y: Tensor, stay: Tensor) -> LowRank:
    """``argmin ||x dW^T - y||^2 + tr(dW stay dW^T)`` as factors, for ``x [n, d_in]`` and ``y [n, d_out]``."""
    both = x.T @ x + stay
    both.diagonal().add_(_RIDGE * both.diagonal().mean())
    right = torch.linalg.solve(both, x.T).T
    return LowRank(y.T, right).compact()
