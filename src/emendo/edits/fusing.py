"""Many edits as one, by least squares: each keeps its effect at its own texts, and the effect elsewhere stays small.

Adding edits up (:func:`emendo.edits.edit.compose`) adds what they have in common once for each edit, and a handful may
ruin a model that each of them leaves intact. Fusing solves, for each matrix::

    min over dW    sum_i ||dW x_i - y_i||^2  +  keep * mean_j ||dW p_j||^2

    x_i     the matrix's input at the edits' prompts and targets, and at paraphrases where they are given
    y_i     the output that the edit of row i adds there when applied alone, dW_e x_i
    p_j     the matrix's input at running text and at built-in facts, where nothing should change

    dW = Y^T X (X^T X + keep * P^T P / n)^-1

The matrices are solved in the order in which they run, each on its inputs once those before it are changed, so that no
matrix relies on an effect that another no longer has. Without the second term this is RegMean (Jin et al.,
ICLR 2023) for changes of weights; the second term and the order are those of MEMIT (Meng et al., ICLR 2023, section 4).

Nothing is trained, and the order of the edits does not matter. To remove an edit, fuse the others.
"""

from __future__ import annotations

import warnings
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
"""Weight of running text; 10 to 100 work equally well (docs/log.md)."""
_PASSAGES = 256
_FACTS = 500
_TOKENS = 64  # of a passage, at most
_TOGETHER = 64  # passages whose rows are held at once
_BATCH_TOKENS = 512
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
    _check(lm, edits, paraphrases, keep)
    names = {name for edit in edits for name in edit.deltas}
    sites = tuple(site for site in all_sites(lm.model) if site.name in names)
    store = TrunkCache(Trunk(lm.model, sites), dtype=lm.model.dtype)
    more = paraphrases or [()] * len(edits)
    own = [_own_texts(lm, edit, prompts) for edit, prompts in zip(edits, more, strict=True)]
    texts = [text for group in own for text in group]
    running = passage_texts(lm, passages or _default_passages(lm, folder), _TOKENS)
    if not running:
        raise RequestError("The running text has no passage of at least two tokens.")
    store.ensure([*texts, *running])

    moments = _second_moments(store, running)
    targets = _targets(lm, store, edits, own)
    fused: dict[str, LowRank] = {}
    missed = total = 0.0
    for name, moment in moments.items():
        with applied(lm.model, fused):
            x = _rows(store, texts)[name]
        y = targets.pop(name)
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


def _check(lm: LM, edits: Sequence[Edit], paraphrases: Sequence[Sequence[str]], keep: float) -> None:
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


def _second_moments(store: TrunkCache, texts: Sequence[Text]) -> dict[str, Tensor]:
    """For each matrix, in the order in which they run, the mean of ``p p^T`` over its inputs ``p`` at some texts."""
    sums: dict[str, Tensor] = {}
    for start in range(0, len(texts), _TOGETHER):
        for name, p in _rows(store, texts[start : start + _TOGETHER]).items():
            sums[name] = sums.get(name, 0) + p.T @ p
    count = sum(len(text.inputs) for text in texts)
    return {name: total / count for name, total in sums.items()}


def _targets(
    lm: LM, store: TrunkCache, edits: Sequence[Edit], texts: Sequence[Sequence[Text]]
) -> dict[str, Tensor]:
    """For each matrix, the output that each edit adds at its own texts when applied alone."""
    d_out = {name: len(delta.left) for edit in edits for name, delta in edit.deltas.items()}
    found: dict[str, list[Tensor]] = {}
    for edit, own in zip(edits, texts, strict=True):
        with edit.applied(lm):
            for name, x in _rows(store, own).items():
                change = edit.deltas.get(name)
                added = x.new_zeros(len(x), d_out[name]) if change is None else change.to(x.device)(x)
                found.setdefault(name, []).append(added)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _default_passages(lm: LM, folder: Path | None) -> list[str]:
    """Text that the model generates, and short statements of facts, whose answers an edit changes first."""
    facts = [f"{fact.prompt} {fact.answer}" for fact in atlas.load("train")]
    return [*own_passages(lm, _PASSAGES, folder), *facts[:: max(1, len(facts) // _FACTS)]]


def _own_texts(lm: LM, edit: Edit, paraphrases: Sequence[str]) -> list[Text]:
    """The requests of an edit, and their paraphrases with the target of the first one."""
    requests = edit.origin.requests
    asked = [*requests, *(requests[0].asking(prompt) for prompt in paraphrases)]
    return to_texts(lm.reading(chat=edit.origin.chat), [request.pair for request in asked])


def _rows(store: TrunkCache, texts: Sequence[Text]) -> dict[str, Tensor]:
    """The input of each matrix at some texts, in float64; the matrices in the order in which they run."""
    found: dict[str, dict[int, Tensor]] = {}
    for places in length_buckets(range(len(texts)), lambda i: texts[i].size, _BATCH_TOKENS):
        chosen = [texts[i] for i in places]
        relevant = store.trunk.relevant_rows(collate(chosen))

        def keep(
            name: str, places: Sequence[int] = places, relevant: Mapping[str, Rows] = relevant
        ) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                index, owner = relevant[name].index, relevant[name].owner
                rows = args[0].flatten(0, -2)[index.to(args[0].device)].double()
                own = rows.split(torch.bincount(owner, minlength=len(places)).tolist())
                found.setdefault(name, {}).update(zip(places, own, strict=True))

            return hook

        with ExitStack() as stack:
            for name in relevant:
                stack.callback(store.model.get_submodule(name).register_forward_hook(keep(name)).remove)
            store.logits(chosen)
    return {name: torch.cat([own[i] for i in range(len(texts))]) for name, own in found.items()}


def _solved(x: Tensor, y: Tensor, moment: Tensor) -> LowRank:
    """``argmin ||x dW^T - y||^2 + tr(dW moment dW^T)`` as factors, for ``x [n, d_in]`` and ``y [n, d_out]``."""
    both = x.T @ x + moment
    both.diagonal().add_(_RIDGE * both.diagonal().mean())
    right = torch.linalg.solve(both, x.T).T
    return LowRank(y.T, right).compact()
