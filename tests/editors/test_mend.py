"""MEND against its equations, its start, and its ablations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import records
from emendo.editors._nets import RunningStats
from emendo.editors.gradient import edit_factors
from emendo.editors.mend import Mend, MendConfig
from emendo.errors import RequestError
from emendo.models.capture import Factors
from emendo.models.lm import LM
from emendo.models.sites import Site, find_sites
from emendo.models.tokenization import encode
from emendo.models.trunk import Trunk


def site(index: int, d_in: int, d_out: int) -> Site:
    return Site(f"blocks.{index}.w", d_in, d_out, "blocks", index, attention=False, transposed=False)


SITES = (site(0, 3, 4), site(1, 4, 3), site(2, 3, 4), site(3, 4, 3), site(4, 3, 4))


def random_factors(sites: tuple[Site, ...] = SITES, examples: int = 3) -> dict[str, Factors]:
    """Rows as capture gives them: some for each example, at every site another number."""
    made = {}
    for index, s in enumerate(sites):
        owner = torch.arange(examples).repeat_interleave(torch.arange(examples) + 1 + index % 2)
        made[s.name] = Factors(
            torch.randn(len(owner), s.d_in) + 1, 0.1 * torch.randn(len(owner), s.d_out), owner, examples
        )
    return made


def filled(editor: Mend, std: float = 0.5) -> Mend:
    """Random parameters and statistics, in eval mode: as after training."""
    editor.train()(random_factors(editor.sites))
    for parameter in editor.parameters():
        nn.init.normal_(parameter, std=std)
    return editor.eval()


def by_hand(editor: Mend, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Eq. 2 and 3, one row at a time, into a dense change for each example."""
    config, result = editor.config, {}
    modes: dict[str, int] = {}
    for index, s in enumerate(editor.sites):
        key = f"{s.d_in}x{s.d_out}" if config.shared else str(index)
        mode = modes[key] = modes.get(key, -1) + 1
        net: Any = editor.nets[key]
        rows = factors[s.name]
        dense = torch.zeros(rows.examples, s.d_out, s.d_in)
        for u, delta, owner in zip(rows.u, rows.delta, rows.owner.tolist(), strict=True):
            if config.norm:
                u = ((u - net.u_stats.mean) / (net.u_stats.std() + 1e-7)).float()
                delta = ((delta - net.delta_stats.mean) / (net.delta_stats.std() + 1e-7)).float()
            smaller = "u" if s.d_in <= s.d_out else "delta"
            uses = smaller if config.factors == "smaller" else config.factors
            z = {"both": torch.cat([u, delta]), "u": u, "delta": delta}[uses]
            for block in net.blocks:
                pre = block.u @ (block.v @ z) + block.bias
                if config.shared:
                    pre = block.scale[mode] * pre + block.shift[mode]
                z = torch.relu(pre) + (z if config.identity else 0)
            if uses == "both":
                u, delta = z[: s.d_in], z[s.d_in :]
            elif uses == "u":
                u = z
            else:
                delta = z
            dense[owner] -= editor.alpha[index] * torch.outer(delta, u)
        result[s.name] = dense
    return result


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.to(found), rtol=tolerance, atol=tolerance)


ABLATIONS = [
    MendConfig(rank=2, norm=norm, identity=identity, shared=shared, factors=factors)  # type: ignore[arg-type]
    for norm, identity, shared, factors in itertools.product(
        (True, False), (True, False), (True, False), ("both", "u", "delta", "smaller")
    )
]


@pytest.mark.parametrize(
    "config", [*ABLATIONS, MendConfig(rank=9, blocks=1), MendConfig(rank=3, blocks=3)], ids=str
)
@torch.no_grad()
def test_every_setting_follows_the_equations(config: MendConfig) -> None:
    editor, factors = filled(Mend(SITES, config)), random_factors()
    expected = by_hand(editor, factors)
    for name, delta in editor(factors).items():
        assert delta.batched
        close(delta.dense(), expected[name])


# -------------------------------------------------------------------------------------------- start


@torch.no_grad()
def test_it_starts_as_the_normalised_plain_step(tiny_gpt2: LM) -> None:
    """``dW = -alpha * sum_i delta_bar_i u_bar_i^T`` on a real pass, by hand."""
    sites = find_sites(tiny_gpt2.model)
    facts = encode(tiny_gpt2.tokenizer, [(record.prompt, record.target) for record in records(4)])
    factors = edit_factors(Trunk(tiny_gpt2.model, sites), sites, facts)
    editor = Mend(sites, MendConfig(alpha=0.03))
    deltas = editor(factors)  # in training mode: the statistics are taken before they are used
    for shape in {s.shape for s in sites}:
        same = [factors[s.name] for s in sites if s.shape == shape]
        us, ds = torch.cat([f.u for f in same]), torch.cat([f.delta for f in same])
        for s in sites:
            if s.shape != shape:
                continue
            f = factors[s.name]
            u = (f.u - us.mean(0)) / (us.std(0) + 1e-7)
            delta = (f.delta - ds.mean(0)) / (ds.std(0) + 1e-7)
            for example in range(4):
                mine = f.owner == example
                expected = -0.03 * sum(torch.outer(d, x) for d, x in zip(delta[mine], u[mine], strict=True))
                close(deltas[s.name].dense()[example], expected, 1e-4)


def test_everything_learns_from_the_first_step_on() -> None:
    """U, b, o and alpha at once; V, s as soon as U is not zero."""
    editor = Mend(SITES, MendConfig(rank=2))
    factors = random_factors()
    for step in range(2):
        editor.zero_grad()
        sum((delta.dense() ** 3).sum() for delta in editor(factors).values()).backward()  # type: ignore[union-attr]
        for name, parameter in editor.named_parameters():
            assert parameter.grad is not None, name
            first = name.endswith((".u", ".bias", ".shift", "alpha"))
            assert bool(parameter.grad.any()) == (first or step > 0), (name, step)
        with torch.no_grad():
            for parameter in editor.parameters():
                parameter -= 0.1 * parameter.grad.sign()  # type: ignore[union-attr]


# ----------------------------------------------------------------------------------------- settings


def test_parameters_by_the_formula_of_the_paper() -> None:
    """2 shapes x 2 blocks x (2 d r + d + 2 n_modes d) + one alpha for each matrix, r = min(1920, d)."""

    def count(width: int, inner: int, matrices: int, **settings: Any) -> int:
        sites = tuple(site(i, *((width, inner) if i % 2 == 0 else (inner, width))) for i in range(matrices))
        with torch.device("meta"):
            editor = Mend(sites, MendConfig(rank=1920, **settings))
        return sum(parameter.numel() for parameter in editor.parameters())

    assert count(768, 3072, 6) == 59_089_926  # BERT-base
    assert count(768, 3072, 8) == 59_120_648  # BART-base
    assert count(2560, 10240, 6) == 196_966_406  # GPT-Neo 2.7B
    assert count(4096, 16384, 6) == 315_146_246  # GPT-J
    assert count(1024, 4096, 8) == 78_827_528  # T5-large

    d, r = 3840, 1920
    assert count(768, 3072, 6, shared=False) == 6 * 2 * (2 * d * r + d) + 6
    assert count(768, 3072, 6, factors="u") == 6 + sum(
        2 * (2 * w * min(r, w) + w + 2 * 3 * w) for w in (768, 3072)
    )
    assert count(768, 3072, 6, factors="smaller") == 6 + 2 * 2 * (2 * 768 * 768 + 768 + 2 * 3 * 768)
    assert count(768, 3072, 6, blocks=1) == 6 + 2 * (2 * d * r + d + 2 * 3 * d)


def test_networks_are_shared_by_shape_or_not_at_all(tiny_llama: LM) -> None:
    sites = find_sites(tiny_llama.model)
    assert len(sites) == 9
    assert set(Mend(sites).nets) == {"32x48", "48x32"}
    unshared = Mend(sites, MendConfig(shared=False))
    assert len(unshared.nets) == 9
    assert not any(name.endswith((".scale", ".shift")) for name, _ in unshared.named_parameters())
    shared = dict(Mend(sites, MendConfig(rank=2)).named_parameters())
    assert shared["nets.32x48.blocks.0.scale"].shape == (6, 80)  # six of the nine have this shape
    assert shared["nets.48x32.blocks.1.shift"].shape == (3, 80)
    assert shared["alpha"].shape == (9,)


def stats(editor: Mend) -> list[Tensor]:
    return [
        buffer.clone()
        for module in editor.modules()
        if isinstance(module, RunningStats)
        for buffer in module.buffers()
    ]


def test_statistics_move_only_while_training_and_only_with_normalisation() -> None:
    def moved(editor: Mend) -> bool:
        before = stats(editor)
        editor(random_factors())
        return any(not torch.equal(a, b) for a, b in zip(before, stats(editor), strict=True))

    assert moved(Mend(SITES).train())
    assert not moved(Mend(SITES).eval())
    assert not moved(Mend(SITES, MendConfig(norm=False)).train())


def test_statistics_are_shared_by_shape() -> None:
    editor, factors = Mend(SITES), random_factors()
    editor(factors)
    rows = torch.cat([factors[s.name].u for s in SITES if s.shape == (3, 4)])
    net: Any = editor.nets["3x4"]
    assert net.u_stats.count == len(rows)
    close(net.u_stats.mean, rows.mean(0))
    close(net.u_stats.std(), rows.std(0))


@pytest.mark.parametrize("shared", [True, False])
def test_statistics_of_the_train_set_are_those_of_all_rows_and_stay(shared: bool) -> None:
    """Observed chunk by chunk, against the mean and deviation of all rows at once, with a row that is not finite."""
    chunks = [random_factors() for _ in range(3)]
    editor = Mend(SITES, MendConfig(statistics="train-set", statistics_on=7, shared=shared)).train()
    assert editor.observes == 7
    for chunk in chunks:
        bad = chunk[SITES[0].name]
        spoilt = Factors(
            torch.cat([bad.u, torch.full((1, 3), torch.nan)]),
            torch.cat([bad.delta, torch.ones(1, 4)]),
            torch.cat([bad.owner, torch.tensor([2])]),
            3,
        )
        editor.observe({**chunk, SITES[0].name: spoilt})
    assert editor.observes == 0
    for index, s in enumerate(SITES):
        net: Any = editor.nets[f"{s.d_in}x{s.d_out}" if shared else str(index)]
        same = [t.name for t in SITES if (t.shape == s.shape if shared else t is s)]
        for own, factor in ((net.u_stats, "u"), (net.delta_stats, "delta")):
            rows = torch.cat([getattr(chunk[name], factor) for chunk in chunks for name in same]).double()
            torch.testing.assert_close(own.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(own.std(), rows.std(0), rtol=1e-12, atol=1e-12)
    before = stats(editor)
    factors = random_factors()
    expected = by_hand(editor, factors)  # normalised by what was observed, in training mode too
    for name, delta in editor(factors).items():
        close(delta.dense(), expected[name])
    assert all(a.equal(b) for a, b in zip(before, stats(editor), strict=True))


@pytest.mark.parametrize("kept", ["u", "delta"])
def test_the_factor_that_is_not_transformed_passes_through_normalised(kept: str) -> None:
    """One row, so the change is an outer product and shows its factors."""
    other = "delta" if kept == "u" else "u"
    editor = filled(Mend(SITES[:1], MendConfig(rank=2, factors=other)))  # type: ignore[arg-type]
    rows = Factors(torch.randn(1, 3), torch.randn(1, 4), torch.zeros(1, dtype=torch.long), 1)
    change = editor({SITES[0].name: rows})[SITES[0].name]
    net: Any = editor.nets["3x4"]
    if kept == "u":
        close(change.right[0, 0], (rows.u[0] - net.u_stats.mean) / net.u_stats.std())
    else:
        close(
            change.left[0, :, 0],
            -editor.alpha[0] * (rows.delta[0] - net.delta_stats.mean) / net.delta_stats.std(),
        )


def test_alpha_has_a_learning_rate_of_its_own() -> None:
    editor = Mend(SITES, MendConfig(alpha=0.5, alpha_lr=0.25))
    assert torch.equal(editor.alpha, torch.full((5,), 0.5))
    networks, alpha = editor.parameter_groups(0.1)
    assert networks["lr"] == 0.1
    assert alpha["lr"] == pytest.approx(0.025)
    assert alpha["params"] == [editor.alpha]
    together = {id(p) for group in (networks, alpha) for p in group["params"]}
    assert together == {id(p) for p in editor.parameters()}
    assert len(networks["params"]) == len(list(editor.parameters())) - 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "at least 1"),
        ({"blocks": 0}, "blocks must be between 1 and 64, not 0"),
        ({"factors": "none"}, "both, u, delta, smaller"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        MendConfig(**settings)


@pytest.mark.parametrize("which", ["mlp", "attention", "all"])
def test_any_sites(tiny_llama: LM, tiny_gpt2: LM, which: str) -> None:
    for lm in (tiny_llama, tiny_gpt2):
        editor = filled(Mend(find_sites(lm.model, which, last=2), MendConfig(rank=4)), 0.05)
        edit = editor.edit(lm, "The capital of Fosoba is", "Oslo")
        assert set(edit.deltas) == {s.name for s in editor.sites}
        assert all(norm > 0 for norm in edit.relative_norms(lm).values())
