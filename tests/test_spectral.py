"""Methods on singular vectors: against slow restatements, worked examples, their properties and their cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evomerge import registry
from evomerge.errors import CandidateFailure
from evomerge.methods import Inputs, Merge, Tables, _spectral
from evomerge.methods.doge import _learn, _shared_basis
from evomerge.methods.r_tsvm import _ranks, _Statistics
from evomerge.recipe import Recipe, TensorPlan
from tests import slow_spectral as slow

QUIET = settings(max_examples=120, derandomize=True, deadline=None, database=None)
FEW = settings(max_examples=25, derandomize=True, deadline=None, database=None)
NAME = "model.layers.0.mlp.up_proj.weight"
SHAPES = [(), (1,), (7,), (5, 1), (1, 6), (2, 2), (6, 9), (9, 6), (8, 8), (12, 5), (2, 3, 4)]
TSV, RTSV, ISO, CTS, OPCM, DOGE, WUDI = (
    registry.get("methods", name) for name in ("tsv_m", "r_tsvm", "iso_c", "iso_cts", "opcm", "doge", "wudi")
)
ALL = (TSV, RTSV, ISO, CTS, OPCM, DOGE, WUDI)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])


def inputs(base: Tensor, experts: list[Tensor], name: str = NAME, **extra: Any) -> Inputs:
    return Inputs(name, base, tuple(experts), **extra)


def deltas(base: Tensor, experts: list[Tensor]) -> list[np.ndarray[Any, Any]]:
    """The float32 task vectors, widened: what float32 rounds away is no method's business."""
    return [(e.float() - base.float()).double().numpy() for e in experts]


def agree(result: Tensor, base: Tensor, tau: np.ndarray[Any, Any], tolerance: float = 2e-6) -> None:
    expected = base.double().numpy() + tau
    size = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert result.dtype == torch.float32 and result.shape == base.shape
    assert np.allclose(result.double().numpy(), expected, rtol=0, atol=tolerance * size)


def family_of(base: Tensor, kinds: list[str], generator: torch.Generator) -> list[Tensor]:
    """Experts of several kinds: independent, equal to the base or to each other, of low rank, much larger."""
    experts: list[Tensor] = []
    for kind in kinds:
        noise = torch.randn(base.shape, generator=generator)
        if kind == "low" and base.ndim == 2:
            noise = torch.outer(noise[:, 0], torch.randn(base.shape[1], generator=generator))
        step = {"base": 0.0, "large": 30.0}.get(kind, 0.3)
        expert = (base.float() + step * noise).to(base.dtype)
        experts.append(experts[0].clone() if kind == "same" and experts else expert)
    return experts


@st.composite
def merges(draw: st.DrawFn, max_experts: int = 4, shapes: Any = SHAPES) -> tuple[Tensor, list[Tensor], list[float]]:
    """A base and experts with generic singular values (equal ones have no unique vectors), and weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    base = torch.randn(draw(st.sampled_from(shapes)), generator=generator).to(dtype)
    kind = st.sampled_from(["new", "new", "new", "base", "same", "low", "large"])
    kinds = draw(st.lists(kind, min_size=1, max_size=max_experts))
    weights = st.sampled_from([-0.5, 0.0, 0.25, 0.75, 1.0, 1.0, 1.5])
    return base, family_of(base, kinds, generator), draw(st.lists(weights, min_size=len(kinds), max_size=len(kinds)))


LAMBDAS = st.sampled_from([0.0, 0.5, 1.0, -0.75, 1.5])


# ---- against the slow restatements ---------------------------------------------------------------


@QUIET
@given(merges(), LAMBDAS, st.sampled_from([0.3, 0.5, 0.9, 1.0]))
def test_tsv_m(merge: Any, lam: float, rank: float) -> None:
    base, experts, weights = merge
    result = TSV(inputs(base, experts), weight=weights, lambda_=lam, rank=rank)
    agree(result.float(), base, lam * slow.tsv_m(deltas(base, experts), weights, rank))


@QUIET
@given(
    merges(), LAMBDAS, st.sampled_from([0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 2.0])
)
def test_r_tsvm(merge: Any, lam: float, rank: float, outlier: float, kappa: float) -> None:
    base, experts, weights = merge
    result = RTSV(inputs(base, experts), weight=weights, lambda_=lam, rank=rank, outlier=outlier, kappa=kappa)
    agree(result.float(), base, lam * slow.r_tsvm(deltas(base, experts), weights, rank, outlier, kappa), 5e-6)


@QUIET
@given(merges(), LAMBDAS)
def test_iso_c(merge: Any, lam: float) -> None:
    base, experts, _ = merge
    agree(ISO(inputs(base, experts), lambda_=lam).float(), base, lam * slow.iso_c(deltas(base, experts)))


@QUIET
@given(merges(), LAMBDAS, st.sampled_from([0.0, 0.4, 0.5, 0.8, 1.0]))
def test_iso_cts(merge: Any, lam: float, common: float) -> None:
    base, experts, _ = merge
    result = CTS(inputs(base, experts), lambda_=lam, common=common)
    agree(result.float(), base, lam * slow.iso_cts(deltas(base, experts), common), 5e-6)


@QUIET
@given(merges(), LAMBDAS, st.sampled_from([1e-6, 1e-3, 0.1, 100.0]))
def test_wudi(merge: Any, lam: float, ridge: float) -> None:
    base, experts, _ = merge
    expected = deltas(base, experts)[0] if len(experts) == 1 else slow.wudi(deltas(base, experts), ridge)
    agree(WUDI(inputs(base, experts), lambda_=lam, ridge=ridge).float(), base, lam * expected, 2e-5)


@QUIET
@given(merges(), LAMBDAS, st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95]))
def test_opcm_of_one_tensor(merge: Any, lam: float, alpha: float) -> None:
    base, experts, _ = merge
    (expected,) = slow.opcm([deltas(base, experts)], alpha)
    agree(OPCM(inputs(base, experts), lambda_=lam, alpha=alpha).float(), base, lam * expected)


MATRICES = [(2, 2), (6, 9), (9, 6), (8, 8), (12, 5), (5, 1)]


@FEW
@given(merges(3, MATRICES), LAMBDAS, st.sampled_from([0.1, 0.3, 1.0]), st.sampled_from([2.0, 6.0]), st.booleans())
def test_doge_of_one_tensor(merge: Any, lam: float, keep: float, subspace: float, absolute: bool) -> None:
    base, experts, weights = merge
    settings = {"keep": keep, "eta": 0.3, "lr": 0.01, "subspace": subspace, "steps": 30, "absolute": absolute}
    result = DOGE(inputs(base, experts), weight=weights, lambda_=lam, **settings)
    d = deltas(base, experts)
    expected = slow.doge([d], weights, **settings)[0] if any(one.any() for one in d) else np.zeros(base.shape)
    agree(result.float(), base, lam * expected, 1e-5)


# ---- worked examples -----------------------------------------------------------------------------

A1, A3 = torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2, 2)
ZEROS = torch.zeros(2, 2)


def test_tsv_m_micro_example() -> None:
    tau = TSV(inputs(ZEROS, [A1, A3]))
    assert torch.allclose(tau, torch.tensor([[2.853553, -0.353553], [-0.353553, 2.146447]]), atol=1e-6)
    assert float(tau.square().sum()) == pytest.approx(13.0, rel=1e-6)


def test_iso_c_micro_example() -> None:
    assert torch.allclose(ISO(inputs(ZEROS, [A1, A3])), 3.0 * torch.eye(2), atol=1e-6)


def test_opcm_micro_example() -> None:
    expected = torch.tensor([[2.235332, 0.745111], [0.745111, 0.745111]])
    assert torch.allclose(OPCM(inputs(ZEROS, [A1, A3]), alpha=0.5), expected, atol=1e-6)


def test_opcm_counts_a_direction_that_just_reaches_alpha() -> None:
    x = inputs(torch.zeros(3, 3), [torch.diag(torch.tensor([4.0, 3.0, 1.0])), torch.ones(3, 3)])
    for alpha, block in ((0.874, 1), (0.875, 2), (0.876, 2)):  # 7 / 8 of the singular values
        expected = torch.ones(3, 3) - torch.eye(3)
        expected[:block, :block] = 0.0
        expected += torch.diag(torch.tensor([4.0, 3.0, 1.0]))
        expected *= (math.sqrt(26.0) + 3.0) / 2 / expected.norm()
        assert torch.allclose(OPCM(x, alpha=alpha), expected, atol=1e-6)


# ---- properties ----------------------------------------------------------------------------------


def example(shape: tuple[int, ...] = (10, 14), count: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return base, family_of(base, ["new"] * count, generator)


def test_tsv_m_keeps_the_energy_of_the_kept_singular_values() -> None:
    base, experts = example()
    tau = (TSV(inputs(base, experts)) - base).double().numpy()
    kept = [np.linalg.svd(d)[1][:3] for d in deltas(base, experts)]
    assert np.linalg.norm(tau) == pytest.approx(np.linalg.norm(kept), rel=1e-6)


def test_weights_scale_singular_values_before_the_svd() -> None:
    base, experts = example()
    weights = [0.5, 2.0, 1.25]
    scaled = [base.double() + w * (e.double() - base.double()) for e, w in zip(experts, weights, strict=True)]
    before = TSV(inputs(base.double(), scaled))
    assert torch.allclose(TSV(inputs(base, experts), weight=weights).double(), before, atol=2e-6)


def test_an_expert_at_weight_zero_keeps_its_directions() -> None:
    base, experts = example()
    at_zero = TSV(inputs(base, experts), weight=[1.0, 1.0, 0.0])
    assert torch.allclose(at_zero, TSV(inputs(base, experts), weight=[1.0, 1.0, 1e-9]), atol=1e-6)


@pytest.mark.parametrize("chosen", [TSV, RTSV], ids=lambda m: m.name)
def test_duplicates_get_the_mean(chosen: Any) -> None:
    base, experts = example(count=2)
    result = chosen(inputs(base, [experts[0], experts[1], experts[0].clone()]))
    assert torch.allclose(result, base + (2 * (experts[0] - base) + experts[1] - base) / 3, atol=1e-6)


def test_a_shared_leading_direction_gets_the_mean() -> None:
    base = torch.zeros(6, 6)
    u, v = torch.eye(6)[0], torch.eye(6)[1]
    shared = torch.outer(u, v) * 9
    experts = [shared + torch.diag(torch.arange(6.0) * s) * 0.1 for s in (0.0, 1.0)]
    assert torch.allclose(TSV(inputs(base, experts), rank=0.3), (experts[0] + experts[1]) / 2, atol=1e-5)


def test_iso_c_flattens_the_spectrum_and_keeps_the_nuclear_norm() -> None:
    base, experts = example()
    spectrum = np.linalg.svd((ISO(inputs(base, experts)) - base).double().numpy())[1]
    before = np.linalg.svd(sum(deltas(base, experts)))[1]
    assert np.ptp(spectrum) < 1e-5 and spectrum.sum() == pytest.approx(before.sum(), rel=1e-6)


def test_iso_c_of_low_rank_experts_stays_in_their_span() -> None:
    random = np.random.default_rng(0)  # whole numbers: rounded factors would fill the other directions with noise
    low = [torch.tensor(np.outer(*(random.integers(-5, 6, n) for n in (10, 14))), dtype=torch.float32) for _ in "ab"]
    spectrum = np.linalg.svd(ISO(inputs(torch.zeros(10, 14), low)).double().numpy())[1]
    before = np.linalg.svd(sum(one.double().numpy() for one in low))[1]
    assert spectrum[:2] == pytest.approx([before.sum() / 2] * 2, rel=1e-5) and spectrum[2] < 1e-5


def test_iso_cts_with_everything_common_is_iso_c_and_its_spectrum_is_flat() -> None:
    base, experts = example()
    x = inputs(base, experts)
    assert torch.equal(CTS(x, common=1.0), ISO(x))
    spectrum = np.linalg.svd((CTS(x, common=0.4) - base).double().numpy())[1]
    assert np.ptp(spectrum) < 1e-5


def test_iso_cts_takes_no_direction_from_an_expert_inside_the_common_subspace() -> None:
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(6, 6)))[0] for _ in "ab")
    first = left @ np.diag([9.0, 0, 0, 0, 0, 0]) @ right
    second = left @ np.diag([0.0, 6, 5, 4, 3, 2]) @ right
    x = inputs(torch.zeros(6, 6, dtype=torch.float64), [torch.tensor(first), torch.tensor(second)])
    spectrum = np.linalg.svd(CTS(x, common=0.6).numpy())[1]  # four common directions, one of each task
    assert spectrum == pytest.approx([(9 + 6 + 5 + 4 + 3) / 5] * 5 + [0.0], abs=1e-6)


def test_r_tsvm_shares_ranks_out_by_density() -> None:
    def ranks(dense: tuple[float, ...], kappa: float, full: int, rank: float = 1.0) -> tuple[int, ...]:
        return _ranks([_Statistics(0.0, one) for one in dense], rank, kappa, full)

    assert ranks((0.5, 0.5, 0.5), 1.0, 12) == (4, 4, 4)
    assert ranks((0.9, 0.6, 0.1), 0.0, 12) == (4, 4, 4)
    assert ranks((0.9, 0.6, 0.3), 1.0, 12) == (6, 4, 2)
    assert ranks((0.9, 0.6, 0.1), 2.0, 12) == (8, 3, 1)  # 11.4, 5.1, 0.1: more than there is
    assert ranks((0.9, 0.9, 0.0), 1.0, 3) == (1, 1, 1)
    assert ranks((0.0, 0.0), 2.0, 8) == (4, 4)
    assert ranks((0.5, 0.5), 1.0, 8, rank=0.5) == (2, 2)


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
def test_without_a_change_the_base_remains(chosen: Any) -> None:
    base, _ = example()
    assert torch.equal(chosen(inputs(base, [base.clone()] * 3)), base)


def test_wudi_is_the_minimiser() -> None:
    base, experts = example((6, 9))
    d = deltas(base, experts)
    tau = (WUDI(inputs(base.double(), [e.double() for e in experts]), ridge=1e-10) - base.double()).numpy()
    best = slow.wudi_loss(tau, d)
    random = np.random.default_rng(0)
    for step in (1e-2, 1e-3):
        for _ in range(20):
            assert slow.wudi_loss(tau + step * random.normal(size=tau.shape), d) > best
    assert best < slow.wudi_loss(sum(d), d) and best < slow.wudi_loss(sum(d) / 3, d)


def test_a_large_ridge_of_wudi_gives_the_sum() -> None:
    base, experts = example()
    total = sum((e - base for e in experts), base)
    assert torch.allclose(WUDI(inputs(base, experts), ridge=1e6), total, atol=1e-4)


def test_an_unsolvable_system_fails_the_candidate() -> None:
    base = torch.zeros(1, 64)
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CandidateFailure, match="ridge") as caught:
        WUDI(inputs(base, [row, 2 * row]), ridge=1e-18)
    assert caught.value.reason == "singular"


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
def test_scaling_all_task_vectors_scales_the_merge(chosen: Any) -> None:
    base, experts = example()
    zero = torch.zeros_like(base)
    small = chosen(inputs(zero, [(e - base) * 2.0**-12 for e in experts]))
    assert torch.allclose(small * 2.0**12, chosen(inputs(zero, [e - base for e in experts])), rtol=1e-4, atol=1e-5)


def test_absolute_settings_of_doge_do_not_scale() -> None:
    base, experts = example()
    zero, parameters = torch.zeros_like(base), {"eta": 0.07, "lr": 1e-4, "absolute": True, "steps": 0, "keep": 1.0}
    tau = DOGE(inputs(zero, [experts[0] - base]), **parameters)
    assert float(tau.norm()) == pytest.approx(0.07, rel=1e-5)


def test_the_correction_of_doge_lowers_its_loss_and_spares_the_shared_subspace() -> None:
    base, experts = example((18, 12))
    d = deltas(base, experts)
    still, _ = slow.doge_learn(d, 0.3, 0.01, 6.0, 0, False)
    x = inputs(base, experts)
    learnt = _learn(x, 0.3, 0.01, 6.0, 400, False)
    assert not still.any() and loss_of_doge(d, learnt.delta.double().numpy(), learnt.scales) < 0.5 * loss_of_doge(
        d, still, learnt.scales
    )
    basis = _shared_basis(x, [0, 1, 2], 2.0)
    assert basis.shape == (18, 6)
    shares = []
    for subspace in (2.0, 1e6):  # six directions kept out, and none
        delta = _learn(x, 0.3, 0.01, subspace, 400, False).delta.double()
        shares.append(float((basis.T @ delta).norm() / delta.norm()))
    assert shares[0] < 0.6 * shares[1]


def loss_of_doge(d: list[np.ndarray[Any, Any]], delta: np.ndarray[Any, Any], scales: tuple[float, ...]) -> float:
    merged = sum(s * (one + delta) for s, one in zip(scales, d, strict=True))
    return float(sum(((one * (one - merged)).sum(axis=1) ** 2).sum() for one in d))


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
def test_lambda_is_linear(chosen: Any) -> None:
    base, experts = example()
    x = inputs(base, experts)
    one, two = chosen(x, lambda_=1.0), chosen(x, lambda_=2.0)
    assert torch.allclose(two - base, 2 * (one - base), atol=1e-5)


# ---- copies, exceptions and failures -------------------------------------------------------------


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pure_copies_keep_every_bit(chosen: Any, dtype: torch.dtype) -> None:
    base, experts = example((6, 9), 2)
    base, experts = base.to(dtype), [e.to(dtype) for e in experts]
    base[0, :2] = experts[0][1, :2] = torch.tensor([-0.0, 0.0])
    x = inputs(base, experts)
    assert chosen(x, lambda_=0.0) is base
    if chosen.parameter("weight"):
        assert chosen(x, weight=0.0) is base
    if chosen.identity:
        assert chosen(inputs(base, experts[:1])) is experts[0]


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_values_reach_the_result_even_in_float16(chosen: Any, bad: float) -> None:
    base, experts = example((6, 9), 2)
    experts[1][2, 3] = bad
    result = chosen(inputs(base.half(), [e.half() for e in experts]))
    assert not result[2, 3].isfinite()


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
def test_embeddings_and_heads_are_left_out_unless_asked(chosen: Any) -> None:
    base, experts = example(count=2)
    head, inside = inputs(base, experts, "lm_head.weight"), inputs(base, experts)
    average = base + ((experts[0] - base) + (experts[1] - base)) / 2
    expected = base if chosen is DOGE else average
    if chosen is OPCM:  # whole task vectors, at the mean norm
        total = 2 * (average - base).double()
        norms = [float((e - base).double().norm()) for e in experts]
        expected = base + (total * (sum(norms) / 2 / float(total.norm()))).float()
    assert torch.allclose(chosen(head), expected, atol=1e-6)
    assert torch.equal(chosen(head, heads=True), chosen(inside))
    assert not torch.allclose(chosen(inside), expected, atol=1e-3)


def test_matrices_too_small_for_all_experts_get_the_mean() -> None:
    base, experts = example((2, 9), 3)
    expected = base + sum(e - base for e in experts) / 3
    assert torch.allclose(TSV(inputs(base, experts)), expected, atol=1e-6)
    assert torch.allclose(RTSV(inputs(base, experts)), expected, atol=1e-6)


def test_an_svd_that_does_not_converge_fails_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    base, experts = example()
    for chosen in (TSV, ISO, OPCM):
        with pytest.raises(CandidateFailure, match="converge") as caught:
            chosen(inputs(base, experts))
        assert caught.value.reason == "svd_failed"


@pytest.mark.parametrize("chosen", ALL, ids=lambda m: m.name)
def test_bits_do_not_depend_on_the_number_of_threads(chosen: Any) -> None:
    base, experts = example((200, 300), 2)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            extra = {"steps": 5} if chosen is DOGE else {}
            found.append(chosen(inputs(base, experts), **extra))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
    assert torch.equal(bits(found[0]), bits(found[1]))


# ---- whole models, and what a candidate costs ----------------------------------------------------


@dataclass
class Model:
    """Five tensors of a base and experts, merged by one method with one set of tables."""

    method: str
    count: int = 3
    tables: Tables = field(default_factory=Tables)
    times: int = 1
    tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    NAMES = (
        ("model.embed_tokens.weight", (20, 8)),
        ("model.layers.0.mlp.up_proj.weight", (12, 8)),
        ("model.layers.0.norm.weight", (8,)),
        ("model.layers.1.mlp.up_proj.weight", (12, 8)),
        ("model.layers.1.mlp.down_proj.weight", (8, 12)),
    )

    def __post_init__(self) -> None:
        for number, (name, shape) in enumerate(self.NAMES):
            base, experts = example(tuple(n * self.times for n in shape), self.count, seed=number)
            for model, tensor in zip(("base", *"abcd"), (base, *experts), strict=False):
                self.tensors[model, name] = tensor

    def merge(self, **parameters: Any) -> dict[str, Tensor]:
        each = {k: v for k, v in parameters.items() if isinstance(v, list)}
        shared = {k: v for k, v in parameters.items() if k not in each}
        experts = "abcd"[: self.count]
        plans = [
            TensorPlan(
                name,
                self.method,
                ("base", name),
                tuple((expert, name) for expert in experts),
                tuple(range(self.count)),
                shared,
                tuple({k: v[i] for k, v in each.items()} for i in range(self.count)),
            )
            for name, _ in self.NAMES
        ]
        sources = [
            {"model": model, "parameters": {k: v[i] for k, v in each.items()}} for i, model in enumerate(experts)
        ]
        recipe = Recipe.from_dict(
            {
                "merge_method": self.method,
                "base_model": "base",
                "models": sources,
                "parameters": shared,
                "compat": "paper",
            }
        )
        merge = Merge(recipe, plans, lambda model, name: self.tensors[model, name], self.tables)
        return {plan.name: merge.tensor(plan) for plan in plans}

    def deltas(self) -> dict[str, list[np.ndarray[Any, Any]]]:
        return {
            name: deltas(self.tensors["base", name], [self.tensors[e, name] for e in "abcd"[: self.count]])
            for name, _ in self.NAMES
        }


@pytest.mark.parametrize("count", [1, 2, 4])
def test_opcm_scales_the_whole_model_to_the_mean_norm(count: int) -> None:
    model = Model("opcm", count)
    d = model.deltas()
    # embeddings are added whole: to the restatement they are just another tensor that is no matrix
    flat = [[one.reshape(-1) for one in v] if "embed" in name else v for name, v in d.items()]
    merged = model.merge(alpha=0.6)
    for (name, result), tau in zip(merged.items(), slow.opcm(flat, 0.6), strict=True):
        agree(result, model.tensors["base", name], tau.reshape(result.shape))
    moved = [(merged[name] - model.tensors["base", name]).double().numpy() for name in d]
    norms = [slow.norm([one[i] for one in d.values()]) for i in range(count)]
    assert slow.norm(moved) == pytest.approx(sum(norms) / count, rel=1e-5)


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_doge_masks_all_matrices_of_the_model_together(keep: float) -> None:
    model = Model("doge", 2)
    for name, _ in model.NAMES:  # a coarse grid: ties within and across tensors, zeros
        for owner in ("base", "a", "b"):
            model.tensors[owner, name] = (model.tensors[owner, name] * 8).round() / 8
    d = {name: value for name, value in model.deltas().items() if ".mlp." in name}
    settings = {"keep": keep, "eta": 0.3, "lr": 0.01, "subspace": 6.0, "steps": 10, "absolute": False}
    merged = model.merge(weight=[1.0, 0.5], **settings)
    for (name, _), tau in zip(d.items(), slow.doge(list(d.values()), [1.0, 0.5], **settings), strict=True):
        agree(merged[name], model.tensors["base", name], tau, 1e-5)
    for name in set(merged) - set(d):
        assert torch.equal(bits(merged[name]), bits(model.tensors["base", name]))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts factorisations and descents."""
    counts = {"svd": 0, "cholesky": 0, "descent": 0}

    def count(owner: Any, attribute: str, key: str) -> None:
        original = getattr(owner, attribute)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, wrapped)

    count(torch.linalg, "svd", "svd")
    count(torch.linalg, "cholesky_ex", "cholesky")
    count(sys.modules["evomerge.methods.doge"], "_descend", "descent")
    yield counts


FIRST: dict[str, tuple[int, int]] = {  # SVDs and Cholesky factors of three matrices and three experts
    "tsv_m": (3 * (3 + 2), 0),
    "r_tsvm": (3 * (3 + 2), 0),
    "iso_c": (3, 0),
    "iso_cts": (3 * (1 + 3 + 2), 0),
    "opcm": (3 * 2, 0),
    "doge": (3 * (3 + 1), 0),
    "wudi": (0, 3),
}


@pytest.mark.parametrize("name", FIRST)
def test_candidates_with_other_weights_factor_nothing(name: str, counted: dict[str, int]) -> None:
    model = Model(name)
    weights = "weight" in {param.name for param in registry.get("methods", name).parameters}
    one = {"lambda": 0.5} | ({"weight": [1.0, 0.5, 0.25]} if weights else {})
    two = {"lambda": 1.5} | ({"weight": [0.1, 0.2, 0.9]} if weights else {})
    if name == "iso_cts":
        one["common"] = two["common"] = 0.5
    model.merge(**one)
    assert (counted["svd"], counted["cholesky"]) == FIRST[name]
    for key in counted:
        counted[key] = 0
    second = model.merge(**two)
    assert counted == {key: 0 for key in counted}
    fresh = Model(name).merge(**two)
    assert all(torch.equal(bits(second[key]), bits(fresh[key])) for key in fresh)


def test_another_rank_orthogonalises_again_but_keeps_the_parents_svds(counted: dict[str, int]) -> None:
    model = Model("tsv_m")
    model.merge(rank=1.0)
    counted["svd"] = 0
    model.merge(rank=0.5)
    assert counted["svd"] == 3 * 2


@pytest.mark.parametrize("name", FIRST)
def test_a_small_budget_costs_time_and_says_so_but_no_bits(name: str, counted: dict[str, int]) -> None:
    roomy, tight = Model(name), Model(name, tables=Tables(budget_bytes=600))
    for lam in (0.5, 1.5):
        expected, found = roomy.merge(**{"lambda": lam}), tight.merge(**{"lambda": lam})
        assert all(torch.equal(bits(found[key]), bits(expected[key])) for key in found)
    before = dict(counted)
    tight.merge(**{"lambda": 1.0})
    assert counted != before
    assert tight.tables.report()["dropped"] > 0 and roomy.tables.report()["dropped"] == 0
    assert tight.tables.n_bytes <= 600


@pytest.mark.parametrize("name", FIRST)
def test_half_a_budget_keeps_half_of_the_tables(name: str, counted: dict[str, int]) -> None:
    # two of three matrices (96, 64): their stacks of 64 * 160 numbers or merged task vectors of 96 * 64
    n_bytes = (2 * 64 * 160 if name in ("tsv_m", "r_tsvm") else 2 * 96 * 64) * 4 / 0.95 + 8000  # and small ones
    model = Model(name, tables=Tables(budget_bytes=int(n_bytes)), times=8)
    steps = {"steps": 2} if name == "doge" else {}
    model.merge(**steps)
    for _ in "ab":
        counted.update(svd=0, cholesky=0)
        model.merge(**{"lambda": 0.5}, **steps)
        # one matrix is factored for every candidate; OPCM does so for the scale of the model, once, and for itself
        assert counted["svd"] + counted["cholesky"] == sum(FIRST[name]) / 3


def test_without_room_for_everything_parents_are_not_kept(counted: dict[str, int]) -> None:
    stacks = 3 * 64 * 160 * 4
    model = Model("tsv_m", tables=Tables(budget_bytes=2 * stacks), times=8)
    model.merge()
    assert stacks < model.tables.n_bytes < 1.1 * stacks
    counted["svd"] = 0
    model.merge(weight=[0.1, 0.2, 0.3])
    assert counted["svd"] == 0
    model.merge(rank=0.5)
    assert counted["svd"] == FIRST["tsv_m"][0]


def test_methods_share_the_parents_svds(counted: dict[str, int]) -> None:
    model = Model("tsv_m")
    model.merge()
    counted["svd"] = 0
    model.method = "doge"
    model.merge(steps=1)
    assert counted["svd"] == 3  # the stacked bases only


def test_tables_of_a_float64_model_are_float64() -> None:
    base, experts = example()
    x = inputs(base.double(), [e.double() for e in experts])
    bases = _spectral.stack(x, (2, 2, 2), 3)
    assert bases is not None and bases.u.dtype == torch.float64
    assert TSV(x).dtype == torch.float64
    assert TSV(replace(x, base=base)).dtype == torch.float64
