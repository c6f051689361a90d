"""Second moments of a matrix over running text: ``A = E[u u^T]`` of inputs, ``S = E[delta delta^T]`` of gradients.

``delta`` is the gradient of the text's NLL, summed over its tokens, with respect to the matrix's outputs; the means are
over tokens. With text that the model wrote itself the labels are drawn from the model, so ``S`` (x) ``A`` is the
Kronecker-factored Fisher information (K-FAC) per token.

Text is streamed: the memory does not depend on its length. In a folder the moments of each matrix are a file, found
again by the model's fingerprint, the matrix and the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emendo._storage import cache_folder, digest, local_path, new_file, read_tensors, reason, write_tensors
from emendo.errors import DataError, RequestError
from emendo.models._sampling import own_passages
from emendo.models.capture import capture
from emendo.models.lm import LM
from emendo.models.losses import token_nll
from emendo.models.sites import Site
from emendo.models.text import Text, length_buckets
from emendo.models.tokenization import passage_texts
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

PASSAGES = 256
"""Of the model's own, where no text is given."""
TOKENS = 64
"""Read of a passage."""
_PASS_TOKENS = 512
_WORDS = 8  # the fewest in a passage of a file
_AT_ONCE = 64  # passages whose trunk outputs are held


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The second moments of one matrix.

    Attributes:
        inputs: ``A [d_in, d_in]``.
        outputs: ``S [d_out, d_out]``.
        tokens: how many tokens they are means over.
    """

    inputs: Tensor
    outputs: Tensor
    tokens: int

    def averaged(self, other: Moments | None, weight: float = 1.0) -> Moments:
        """The moments over the tokens of both, those of the other counted ``weight`` times."""
        if other is None or not weight:
            return self
        more = weight * other.tokens
        own, theirs = self.tokens / (self.tokens + more), more / (self.tokens + more)
        return Moments(
            self.inputs * own + other.inputs.to(self.inputs) * theirs,
            self.outputs * own + other.outputs.to(self.outputs) * theirs,
            self.tokens + other.tokens,
        )


def second_moments(lm: LM, sites: tuple[Site, ...], texts: Sequence[Text]) -> dict[str, Moments]:
    """The moments of each matrix over some texts, in float64.

    Raises:
        RequestError: there are no texts, or the model is no decoder.
    """
    if lm.kind != "causal":
        raise RequestError(f"Moments are taken over running text, and {lm.name} is a {lm.kind}.")
    if not texts:
        raise RequestError("There is no text of at least two tokens to take the moments over.")
    trunk = Trunk(lm.model, sites)
    sums = {site.name: [torch.zeros(d, d, dtype=torch.float64) for d in site.shape] for site in sites}
    for start in range(0, len(texts), _AT_ONCE):
        some = texts[start : start + _AT_ONCE]
        store = TrunkCache(trunk, dtype=lm.model.dtype)
        store.ensure(some)
        for part in length_buckets(some, lambda text: text.size, _PASS_TOKENS):
            for name, (u, delta) in _rows(store, sites, part).items():
                for total, rows in zip(sums[name], (u, delta), strict=True):
                    total.addmm_(rows.mT, rows)
    count = sum(len(text.inputs) for text in texts)
    return {name: Moments(a / count, s / count, count) for name, (a, s) in sums.items()}


def _rows(
    store: TrunkCache, sites: tuple[Site, ...], texts: Sequence[Text]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The inputs and the gradients of each matrix at the tokens of some texts, in float64 and on the processor."""

    def loss() -> Tensor:
        batch, logits = store.logits(texts)
        nll = token_nll(logits, batch.labels.to(logits.device))
        return nll.new_zeros(len(texts)).index_add(0, batch.owner.to(nll.device), nll)

    factors = capture(store.model, sites, loss)[1]
    return {name: (own.u.cpu().double(), own.delta.cpu().double()) for name, own in factors.items()}


def kept_moments(
    lm: LM,
    sites: tuple[Site, ...],
    passages: Sequence[str] = (),
    folder: Path | None = None,
) -> dict[str, Moments]:
    """The moments of each matrix over passages, in float32; computed once where there is a folder.

    Args:
        lm: a decoder.
        sites: the matrices.
        passages: running text; by default what the model writes itself.
        folder: where they are kept; None keeps nothing.

    Raises:
        RequestError: there is no text, or the model is no decoder.
    """
    if lm.kind != "causal":
        raise RequestError(f"Moments are taken over running text, and {lm.name} is a {lm.kind}.")
    if _edited(lm):
        folder = None  # these are not the moments of its fingerprint
    chosen = list(passages) or own_passages(
        lm, PASSAGES, None if folder is None else folder.parent / "written"
    )
    key = digest([lm.fingerprint, lm.dtype, TOKENS, chosen])
    files = (
        {}
        if folder is None
        else {site.name: folder / f"{digest([key, site.name])}.safetensors" for site in sites}
    )
    found = {name: _read(file) for name, file in files.items() if file.exists()}
    missing = tuple(site for site in sites if site.name not in found)
    if missing:
        fresh = second_moments(lm, missing, passage_texts(lm, chosen, TOKENS))
        found |= {name: Moments(m.inputs.float(), m.outputs.float(), m.tokens) for name, m in fresh.items()}
        for site in missing if folder is not None else ():
            with new_file(files[site.name]) as temporary:
                own = found[site.name]
                tensors = {"inputs": own.inputs, "outputs": own.outputs, "tokens": torch.tensor([own.tokens])}
                write_tensors(temporary, tensors)
    return {site.name: found[site.name] for site in sites}


def moments_over(lm: LM, sites: tuple[Site, ...], text: str) -> dict[str, Moments]:
    """The moments of each matrix over a file of plain text, kept in the cache folder.

    Args:
        lm: a decoder.
        sites: the matrices.
        text: the file; empty for what the model writes itself.
    """
    return kept_moments(lm, sites, passages_of(text) if text else (), cache_folder() / "moments")


def running_text(lm: LM, text: str, count: int) -> list[str]:
    """The passages of a file of plain text, or those that the model writes itself, kept in the cache folder.

    Args:
        lm: a decoder.
        text: the file; empty for what the model writes itself.
        count: passages that the model writes.
    """
    return (
        passages_of(text)
        if text
        else own_passages(lm, count, None if _edited(lm) else cache_folder() / "written")
    )


def _edited(lm: LM) -> bool:
    """Whether the model holds an edit, and so is not the one of its fingerprint."""
    return any(module._forward_hooks for module in lm.model.modules())


def _read(file: Path) -> Moments:
    tensors: Mapping[str, Tensor] = read_tensors(file)
    return Moments(tensors["inputs"], tensors["outputs"], int(tensors["tokens"]))


def spread(moment: Tensor) -> float:
    """How many directions carry most of a moment: ``(sum of eigenvalues)^2 / sum of their squares``."""
    own = moment.double()
    return float(own.trace().square() / own.square().sum().clamp(min=torch.finfo(torch.float64).tiny))


def passages_of(file: str | Path) -> list[str]:
    """The lines of a plain text file that have at least eight words.

    Raises:
        DataError: the file cannot be read, or has no such line.
    """
    try:
        lines = local_path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {reason(error)}") from error
    found = [line.strip() for line in lines if len(line.split()) >= _WORDS]
    if not found:
        raise DataError(
            f"{file} has no line of at least {_WORDS} words; give plain text, one paragraph per line."
        )
    return found
