"""Provable repair: the least change of one matrix with which the decoupled network gives every target.

Sotoudeh, Thakur: "Provable Repair of Deep Neural Networks", PLDI 2021 (arXiv 2104.04413), repair of points. A decoupled
network runs twice: the activation channel is the unedited model; in the value channel, which has the change ``D`` of
one matrix, everything behind that matrix is replaced by its linearisation at the activation channel's values. So its
logits are affine in ``D``::

    z(D) = z + J D        J: derivative of the logits by the matrix, in the unedited model

    minimise  ||D||_1 or ||D||_inf    subject to    z_target(D) - z_other(D) >= margin

for every token of every target and every other token. Neither the constraints nor the matrix's entries are written out:

1. Rows (cutting planes): the decoupled network is run, and the other tokens that come too close are added, until none
   do. A row of ``J`` is kept as the factors of a gradient.
2. Columns (Dantzig and Wolfe): ``D = sum_p lambda_p S_p``, ``lambda >= 0``, over corners ``S_p`` of the norm's unit
   ball: one signed entry for L1, and for L-inf the signs of a group of the matrix's rows. ``||D||`` is the sum of
   ``lambda``, for L-inf the largest of the groups' sums. HiGHS solves for ``lambda``; its multipliers ``y`` weigh the
   constraints' gradients ``G_k``, and the corners that ``sum_k y_k G_k`` points to are added. The dual norm of that sum
   bounds the distance to the optimum.

The guarantee holds for the decoupled network. An edit is a change of the true network, which has ``D`` in both
channels: the final norm (and, further down, every nonlinear layer) answers ``D`` as well. The edit's card says what
both networks do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emendo._settings import Settings, setting
from emendo.editors.base import Editor, as_requests
from emendo.edits.edit import Edit, Request
from emendo.errors import RequestError
from emendo.low_rank import LowRank, applied
from emendo.models._experts import ExpertMatrix
from emendo.models.capture import capture
from emendo.models.lm import LM
from emendo.models.losses import per_example
from emendo.models.sites import Site, all_sites, find_stacks
from emendo.models.text import Text, TokenBatch
from emendo.models.trunk import Trunk
from emendo.models.trunk_cache import TrunkCache

_CUTS = 4  # other tokens that are added for a label in one round
_ROUNDS = 100
_CORNERS = 1000  # solutions of one round
_PRICED = 32  # corners that are added after a solution, for L1
_GROUPS = 32  # of rows, for L-inf
_GAP = 1e-5  # between the norm and its lower bound, relative
_ENOUGH = 0.99  # of the margin
_DEAR = 1e4  # price of missing a constraint by what a change of norm 1 gives


@dataclass(frozen=True, slots=True)
class RepairConfig(Settings):
    """The settings of provable repair."""

    norm: Literal["l1", "linf"] = setting(
        "l1", "Norm of the change that is least: sum of its entries' sizes, or the largest of them."
    )
    margin: float = setting(1.0, "Logits by which each token of a target exceeds all others.", above=0)


@dataclass(frozen=True, slots=True)
class Proof:
    """The outcome of a repair.

    Attributes:
        norm: which norm is least.
        size: the change's norm.
        bound: no change that satisfies the constraints has a smaller norm.
        constraints: the number that were needed.
        decoupled: smallest lead of a target's token over another one in the decoupled network, in logits.
        true: the same in the edited model.
        held: share of the targets that the edited model gives at every token.
    """

    norm: str
    size: float
    bound: float
    constraints: int
    decoupled: float
    true: float
    held: float


class Repair(Editor):
    """Provable repair; see the module's docstring."""

    name = "repair"
    Config = RepairConfig
    config: RepairConfig
    needs_training = False

    @classmethod
    def default_sites(cls, model: nn.Module) -> tuple[Site, ...]:
        """The last matrix that writes into the hidden state: of the last MLP, or of attention before experts."""
        stack = find_stacks(model)[-1]
        last = [s for s in all_sites(model) if (s.stack, s.block) == (stack.name, stack.depth - 1)]
        plain = [s for s in last if not isinstance(s.module(model), ExpertMatrix)] or last
        width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
        found = [s for s in plain if not s.attention] or plain
        return (([s for s in found if s.d_out == width] or found)[-1],)

    def each(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute one change for each request, each from the clean model."""
        found = [self._repaired(lm, [request])[0] for request in requests]
        if not found:
            self.texts(lm, requests)  # says that there is nothing to edit
        return {self.sites[0].name: LowRank.stack(found)}

    def together(self, lm: LM, requests: Sequence[Request]) -> dict[str, LowRank]:
        """Compute the least change that satisfies all requests at once."""
        return {self.sites[0].name: self._repaired(lm, requests)[0]}

    def edit(
        self, lm: LM, prompt: str | Sequence[Request | tuple[str, str]], target: str | None = None
    ) -> Edit:
        """Make one edit of one fact or of several; see :meth:`emendo.editors.base.Editor.edit`.

        Its card has the fields of :class:`Proof` as ``repair``.

        Raises:
            RequestError: no change of the matrix satisfies all requests, or there is more than one matrix.
        """
        requests = as_requests(prompt, target)
        change, proof = self._repaired(lm, requests)
        return Edit({self.sites[0].name: change}, self.origin(lm, requests), {"repair": asdict(proof)})

    @torch.no_grad()
    def _repaired(self, lm: LM, requests: Sequence[Request]) -> tuple[LowRank, Proof]:
        texts = self.texts(lm, requests)
        if len(self.sites) != 1:
            raise RequestError(
                f"{self.name} changes one matrix, not {len(self.sites)}: name it with --sites, or leave --sites out."
            )
        network = Decoupled(lm, self.sites[0])
        network.store.ensure(texts)
        return _repair(network, texts, self.config)


class Decoupled:
    """The decoupled network of a model, with the change in the value channel of one matrix.

    Args:
        lm: the model.
        site: the matrix.
    """

    def __init__(self, lm: LM, site: Site) -> None:
        self.site, self.model = site, lm.model
        self.store = TrunkCache(Trunk(lm.model, (site,)), dtype=lm.model.dtype)

    def logits(self, texts: Sequence[Text], change: LowRank) -> tuple[TokenBatch, Tensor]:
        """The texts as one batch, and the logits ``[labels, vocabulary]`` of the value channel, in float64.

        ``J D`` is the derivative by ``s`` of the logits under ``s D``, taken as the derivative by ``w`` of ``w J D``.
        """
        size = torch.zeros((), dtype=self.model.dtype, requires_grad=True)

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output + size.to(output) * change(args[0].detach()).view(output.shape)

        # No fused attention kernel has a second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            with self.site.module(self.model).register_forward_hook(add):
                batch, logits = self.store.logits(texts)
            ones = torch.zeros_like(logits, requires_grad=True)
            (along,) = torch.autograd.grad(logits, size, ones, create_graph=True)
            (slope,) = torch.autograd.grad(along, ones)
        return batch, logits.detach().double() + slope.double()

    def gradients(self, texts: Sequence[Text], cuts: Sequence[tuple[int, int]]) -> LowRank:
        """The derivatives ``[cuts, d_out, d_in]`` of ``z_target - z_other`` by the matrix, in float64.

        Args:
            texts: all texts.
            cuts: the number of the label, counted over all texts, and the other token.
        """
        places = [(text, place) for text in texts for place in range(len(text.labels))]
        chosen = [places[label][0] for label, _ in cuts]

        def lead() -> Tensor:
            batch, logits = self.store.logits(chosen)
            first = torch.searchsorted(batch.owner, torch.arange(len(cuts)))
            rows = logits[first + torch.tensor([places[label][1] for label, _ in cuts])]
            own = torch.tensor([places[label][0].labels[places[label][1]] for label, _ in cuts])
            other = torch.tensor([token for _, token in cuts])
            index = torch.stack([own, other], 1).to(rows.device)
            pair = rows.gather(1, index)
            return pair[:, 0] - pair[:, 1]

        factors = capture(self.model, (self.site,), lead)[1][self.site.name]
        return factors.lowrank(factors.delta, factors.u).to(torch.float64)


def leads(logits: Tensor, batch: TokenBatch) -> Tensor:
    """``z_target - z_other`` of every label and other token ``[labels, vocabulary]``; infinite at the target itself."""
    labels = batch.labels.to(logits.device)[:, None]
    return (logits.gather(1, labels) - logits).scatter(1, labels, torch.inf)


def _repair(network: Decoupled, texts: Sequence[Text], config: RepairConfig) -> tuple[LowRank, Proof]:
    """The least change for some texts, and what it does."""
    program = Program(config.norm, network.site)
    cuts: list[tuple[int, int]] = []
    change = program.change()
    clean: Tensor | None = None
    for _ in range(_ROUNDS):
        batch, logits = network.logits(texts, change)
        lead = leads(logits, batch)
        clean = lead if clean is None else clean
        close, tokens = lead.topk(min(_CUTS, lead.shape[1] - 1), largest=False)
        pairs = [
            (label, int(tokens[label, i]))
            for label, i in (close < _ENOUGH * config.margin).nonzero().tolist()
        ]
        new = [pair for pair in pairs if pair not in cuts]
        if not new:
            break
        cuts += new
        missing = torch.tensor([config.margin - float(clean[label, token]) for label, token in new])
        program.add(network.gradients(texts, new), missing.double())
        if not program.solve():
            raise RequestError(
                f"No change of {network.site.name} gives all targets at once: two of them ask for different answers "
                "at the same place, or the model cannot be made to say a token of them there."
            )
        change = program.change()
    with applied(network.model, {network.site.name: change}):
        batch, logits = network.store.logits(texts)
    true = leads(logits.double(), batch)
    right = per_example((true.amin(1) > 0).double(), batch.owner.to(true.device), len(texts)) == 1
    return change, Proof(
        config.norm,
        program.size,
        program.bound,
        len(cuts),
        float(lead.min()),
        float(true.min()),
        float(right.double().mean()),
    )


class Program:
    """A linear program whose columns are corners of a norm's unit ball, added where they lower the cost.

    Args:
        norm: ``"l1"`` or ``"linf"``.
        site: the matrix.

    Attributes:
        size: the norm of the solution.
        bound: a lower bound of the norm of every solution.
    """

    def __init__(self, norm: str, site: Site) -> None:
        self.norm, self.shape = norm, (site.d_out, site.d_in)
        count = min(_GROUPS, site.d_out) if norm == "linf" else 1
        self.group = torch.arange(site.d_out) * count // site.d_out  # of each row
        self.rows: LowRank | None = None  # G_k / ||G_k||_*
        self.needed = torch.zeros(0, dtype=torch.float64)  # of each constraint
        self.corners: list[Tensor] = []  # signs [d_out, d_in], or (row, column, sign) for L1
        self.products: list[Tensor] = []  # of each corner: [constraints, groups]
        self.weights = torch.zeros(0, count, dtype=torch.float64)  # of each corner: [groups]
        self.size = self.bound = 0.0

    def add(self, gradients: LowRank, needed: Tensor) -> None:
        """Add constraints ``<G_k, D> >= needed_k``, each with the corner that serves it best.

        Args:
            gradients: ``G_k [n, d_out, d_in]``.
            needed: ``[n]``.
        """
        dense = [gradients[i].dense() for i in range(len(needed))]
        sizes = torch.stack([self._dual_norm(g) for g in dense]).clamp(min=1e-30)
        scaled = LowRank(gradients.left / sizes[:, None, None].to(gradients.left), gradients.right)
        parts = [*(self.rows[i] for i in range(len(self.needed)))] if self.rows is not None else []
        self.rows = LowRank.stack([*parts, *(scaled[i] for i in range(len(needed)))])
        self.needed = torch.cat([self.needed, needed / sizes.cpu()])
        used = self.weights.ne(0).any(1).tolist()
        self.corners = [corner for corner, is_used in zip(self.corners, used, strict=False) if is_used]
        self.products = [self._products(corner) for corner in self.corners]
        for g in dense:
            self._take(g, 1)

    def solve(self) -> bool:
        """Find the least change; False where there is none."""
        assert self.rows is not None
        count, groups = len(self.needed), self.weights.shape[1]
        for _ in range(_CORNERS):
            # columns: lambda of every corner and group, the norm, the price paid for each constraint
            table = torch.cat(self.products, 1).numpy()
            sums = np.tile(np.eye(groups), len(self.corners))
            needs = np.hstack([-table, np.zeros((count, 1)), -np.eye(count)])
            within = np.hstack([sums, -np.ones((groups, 1)), np.zeros((groups, count))])
            cost = np.concatenate([np.zeros(table.shape[1]), [1.0], np.full(count, _DEAR)])
            limits = np.concatenate([-self.needed.numpy(), np.zeros(groups)])
            found = linprog(cost, A_ub=np.vstack([needs, within]), b_ub=limits, method="highs")
            self.weights = torch.from_numpy(found.x[: table.shape[1]]).view(-1, groups)
            self.size, missed = float(found.x[table.shape[1]]), float(found.x[table.shape[1] + 1 :].max())
            multipliers = -torch.from_numpy(found.ineqlin.marginals[:count])
            weighed = self.rows.left * multipliers.to(self.rows.left)[:, None, None]
            direction = weighed.transpose(0, 1).flatten(1) @ self.rows.right.flatten(0, 1)
            steepness = max(1.0, float(self._dual_norm(direction)))
            self.bound = float(multipliers @ self.needed) / steepness
            if found.fun - self.bound <= _GAP * found.fun:
                break
            self._take(direction, _PRICED)
        return missed <= 1e-6 * max(1.0, float(self.needed.max()))

    def change(self) -> LowRank:
        """The solution, in float32: as few rows or columns as have entries, or for L-inf dense."""
        device = self.rows.left.device if self.rows is not None else torch.device("cpu")
        dense = torch.zeros(self.shape, dtype=torch.float64, device=device)
        for weights, corner in zip(self.weights, self.corners, strict=False):
            if self.norm == "linf":
                dense += weights[self.group, None].to(dense) * corner
            else:
                row, column, sign = corner.tolist()
                dense[row, column] += float(weights) * sign
        if not dense.any():
            return LowRank(torch.zeros(self.shape[0], 1), torch.zeros(1, self.shape[1])).to(device)
        if self.norm == "linf":
            return LowRank.from_dense(dense.float())
        rows, columns = (dense.any(dim).nonzero()[:, 0] for dim in (1, 0))
        eyes = [torch.eye(size, device=device) for size in self.shape]
        if len(rows) <= len(columns):
            return LowRank(eyes[0][:, rows], dense[rows].float())
        return LowRank(dense[:, columns].float(), eyes[1][columns])

    def _dual_norm(self, direction: Tensor) -> Tensor:
        return direction.abs().amax() if self.norm == "l1" else direction.abs().sum()

    def _take(self, direction: Tensor, count: int) -> None:
        """Add the corners of the unit ball that a matrix points to most, at most ``count`` of them."""
        if self.norm == "linf":
            corners = [torch.where(direction < 0, -1, 1).to(torch.int8)]
        else:
            flat = direction.flatten()
            places = flat.abs().topk(min(count, len(flat))).indices
            corners = [
                torch.tensor([*divmod(int(place), self.shape[1]), -1 if flat[place] < 0 else 1])
                for place in places
            ]
        self.corners += corners
        self.products += map(self._products, corners)

    def _products(self, corner: Tensor) -> Tensor:
        """``<G_k, S>`` of every constraint ``[constraints, groups]``, with the signs of one group of rows at a time."""
        assert self.rows is not None
        left, right = self.rows.left, self.rows.right
        if self.norm == "l1":
            row, column, sign = corner.tolist()
            return (left[:, row] * right[:, :, column]).sum(1, keepdim=True).mul(sign).cpu()
        by_row = (left * (corner.to(right) @ right.mT)).sum(2).cpu()
        return by_row.new_zeros(len(by_row), self.weights.shape[1]).index_add(1, self.group, by_row)
