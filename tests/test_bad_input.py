"""What is wrong with models, recipes and spaces is said at its line before any work; what is doubtful is a warning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evomerge import family as family_module
from evomerge.cli import main
from evomerge.errors import ConfigError
from evomerge.family import BLOCK, BLOCKS, Change, measure, sample, suspicious, unrelated
from evomerge.feasible import doubtful, drops_at_random, mixes, refused, slice_paths
from evomerge.recipe import Recipe
from evomerge.weights import Checkpoint

Tensors = dict[str, torch.Tensor]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; returns exit code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            main(list(args))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        out, err = capfd.readouterr()
        return code, out, err

    return call


def rewrite(name: str, change: Callable[[str, torch.Tensor], torch.Tensor], source: str = "base") -> None:
    """Make the checkpoint `name` from another's tensors."""
    if name != source:
        shutil.copytree(source, name, dirs_exist_ok=True)
    tensors = load_file(f"{source}/model.safetensors")
    torch.manual_seed(7)
    made = {n: change(n, t).contiguous() for n, t in tensors.items()}
    save_file(made, f"{name}/model.safetensors", metadata={"format": "pt"})


def fresh(name: str, t: torch.Tensor) -> torch.Tensor:
    """What another random initialisation has: other matrices, the same norms."""
    return torch.randn_like(t) * t.std() if t.ndim > 1 else t.clone()


# ---- strangers, copies and far relatives -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "distance", "cosine", "refusal"),
    [
        (lambda n, t: fresh(n, t), 2**0.5, 0.0, True),
        (lambda n, t: fresh(n, t) * 0.1, 1.0, 0.0, True),  # at a smaller scale: hardly farther than zeros
        (lambda n, t: t.flip(0), 2**0.5, 0.0, True),  # the same neurons in another order
        (lambda n, t: -t, 2.0, -1.0, True),
        (lambda n, t: t + 0.1 * fresh(n, t), 0.1, 0.995, False),
        (lambda n, t: t + 0.4 * fresh(n, t), 0.4, 0.928, False),
        (lambda n, t: t * 1.01, 0.01, 1.0, False),
    ],
)
def test_strangers_are_refused_and_fine_tunes_are_not(
    work: Path, change: Callable[[str, torch.Tensor], torch.Tensor], distance: float, cosine: float, refusal: bool
) -> None:
    rewrite("red", change)
    found = measure(Checkpoint("base"), Checkpoint("red"))
    assert found.distance == pytest.approx(distance, abs=0.05) and found.cosine == pytest.approx(cosine, abs=0.05)
    assert (found.tensors, found.matrices) == (20, 15)
    problems = unrelated({"red": found})
    assert bool(problems) == refusal
    if refusal:
        text = str(problems[0])
        assert text.startswith("red: not a fine-tune of the base: ")
        assert f"{found.differing} of 20 tensors differ, median relative distance {found.distance:.2g}" in text


def test_the_thresholds_lie_where_mathematics_puts_them() -> None:
    """A change of relative size r in a random direction: distance r, cosine 1/sqrt(1 + r^2)."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1 << 14, generator=generator, dtype=torch.float64)
    noise = torch.randn(1 << 14, generator=generator, dtype=torch.float64)
    for r, is_unlike in ((0.001, False), (0.1, False), (0.9, False), (1.1, True), (5.0, True)):
        expert = base + r * noise
        distance = float((expert - base).norm() / base.norm())
        cosine = float(expert @ base / (expert.norm() * base.norm()))
        assert distance == pytest.approx(r, rel=0.03) and cosine == pytest.approx((1 + r * r) ** -0.5, abs=0.02)
        assert (distance > family_module.UNLIKE_DISTANCE or cosine < family_module.UNLIKE_COSINE) == is_unlike


def test_a_minority_of_strange_matrices_is_no_reason_to_refuse(work: Path) -> None:
    rewrite("red", lambda n, t: fresh(n, t) if "layers.0" in n else t + 0.01 * fresh(n, t))
    found = measure(Checkpoint("base"), Checkpoint("red"))
    assert 0 < found.unlike <= found.matrices // 2
    assert unrelated({"red": found}) == []


def test_zeros_scalars_and_empty_tensors_have_no_say(work: Path) -> None:
    odd = {
        "model.a": torch.zeros(8, 8), "model.b": torch.zeros(0, 4), "model.c": torch.tensor(2.0),
        "model.d": torch.full((4, 4), float("nan")), "model.e": torch.arange(4),
    }  # fmt: skip
    for name in ("base", "red"):
        save_file(odd, f"{name}/model.safetensors", metadata={"format": "pt"})
    found = measure(Checkpoint("base"), Checkpoint("red"))
    assert (found.tensors, found.matrices, found.unlike, found.quantile) == (4, 0, 0, 0.0)
    assert unrelated({"red": found}) == []
    save_file({"model.e": torch.arange(4)}, "red/model.safetensors", metadata={"format": "pt"})
    assert measure(Checkpoint("base"), Checkpoint("red")) == Change(0, 0, 0, 0, 0.0, 1.0, 0.0)


def test_an_expert_that_equals_the_base_is_a_warning(work: Path) -> None:
    rewrite("red", lambda n, t: t)
    found = measure(Checkpoint("base"), Checkpoint("red"))
    assert (found.differing, str(found)) == (0, "equals the base in all 20 tensors")
    assert [str(w) for w in suspicious({"red": found}, drops=True)] == [
        "red: equals the base: all its weights do nothing"
    ]
    # One element outside the sample is a difference too.
    big = torch.zeros(BLOCK * BLOCKS * 2)
    for name, value in (("base", 0.0), ("red", 1.0)):
        big[BLOCK + 3] = value
        save_file({"model.a": big}, f"{name}/model.safetensors", metadata={"format": "pt"})
    assert torch.equal(sample(Checkpoint("base").tensor("model.a")), sample(Checkpoint("red").tensor("model.a")))
    assert measure(Checkpoint("base"), Checkpoint("red")).differing == 1


def test_a_far_expert_is_a_warning(work: Path) -> None:
    rewrite("red", lambda n, t: t + 0.7 * fresh(n, t))
    found = measure(Checkpoint("base"), Checkpoint("red"))
    assert unrelated({"red": found}) == []
    (warning,) = suspicious({"red": found}, drops=False)
    assert "far from the base: median relative distance 0.7" in str(warning)


# ---- the sample and its quantile --------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 200_000))
def test_a_sample_is_small_whole_or_evenly_spread(n: int) -> None:
    taken = sample(torch.arange(n, dtype=torch.float64))
    assert len(taken) == min(n, BLOCK * BLOCKS) and len(set(taken.tolist())) == len(taken)
    if n:
        assert taken[0] == 0 and taken[-1] == n - 1
        gaps = np.diff(taken.numpy())
        assert gaps.max() <= max(1, n // (BLOCKS - 1))


def test_a_sample_sees_every_column_of_a_wide_matrix() -> None:
    columns = torch.arange(1 << 10).repeat(1 << 10).reshape(1 << 10, 1 << 10)
    assert len(set(sample(columns).tolist())) == 1 << 10


def test_the_quantile_weighs_tensors_by_their_size(work: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.big": (400, 400), "model.small": (60, 60), "model.line": (500,)}
    base = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    scale = {"model.big": 0.001, "model.small": 0.1, "model.line": 5.0}
    expert = {n: t + scale[n] * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    for name, tensors in (("base", base), ("red", expert)):
        save_file(tensors, f"{name}/model.safetensors", metadata={"format": "pt"})
    found = measure(Checkpoint("base"), Checkpoint("red"))
    every = np.concatenate([(expert[n] - base[n]).abs().flatten().numpy() for n in ("model.big", "model.small")])
    assert found.quantile == pytest.approx(np.quantile(every, 0.999), rel=0.15)
    unweighed = np.concatenate([sample(expert[n] - base[n]).abs().numpy() for n in ("model.big", "model.small")])
    assert abs(np.quantile(unweighed, 0.999) / np.quantile(every, 0.999) - 1) > 0.15, "the weights must matter"


# ---- random dropping ---------------------------------------------------------------------------------


def change(quantile: float) -> Change:
    return Change(20, 20, 15, 0, 0.1, 0.99, quantile)


def test_wide_changes_under_random_dropping_are_a_warning() -> None:
    narrow, wide = {"red": change(0.0299)}, {"red": change(0.031)}
    assert suspicious(narrow, drops=True) == suspicious(wide, drops=False) == []
    (warning,) = suspicious(wide, drops=True)
    assert str(warning).startswith("red: its changes reach 0.031 (99.9 % quantile): dropping at random")


NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    ("method", "parameters", "drops"),
    [
        ("dare_linear", {"density": 0.5}, True),
        ("dare_ties", {"density": 0.5}, True),
        ("dare_ties", {"density": 1.0}, False),
        ("dare_ties", {}, False),
        ("ties", {"density": 0.5}, False),
        ("della", {"density": 0.5}, True),
        ("pipeline", {"density": 0.5}, True),
        ("pipeline", {"density": 0.5, "sparsify": "ranked"}, True),
        ("pipeline", {"density": 0.5, "sparsify": "magnitude"}, False),
    ],
)
def test_which_recipes_drop_at_random(method: str, parameters: dict[str, object], drops: bool) -> None:
    shared = {k: v for k, v in parameters.items() if k == "sparsify"}
    own = {k: v for k, v in parameters.items() if k != "sparsify"}
    plans = Recipe.build(method, "base", {"red": own, "green": {}}, parameters=shared).plan(NAMES, 2)
    assert drops_at_random(plans) == drops
    assert drops_at_random(plans, {"density", "weight"}) == (drops or parameters in ({}, {"density": 1.0}))
    if shared:
        assert drops_at_random(plans, {"sparsify"})


def study(changes: dict[str, str]) -> None:
    text = Path("study.yaml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    Path("study.yaml").write_text(text)


def test_warnings_reach_check_search_and_merge_and_stop_nothing(work: Path, run: Run) -> None:
    rewrite("green", lambda n, t: t)
    rewrite("blue", lambda n, t: t + 0.05 * (torch.rand_like(t) < 0.01))  # few changes, but wide ones
    study({
        "method: task_arithmetic": "method: dare_linear",
        "per_expert: true}": "per_expert: true}\n    density: search",
        "evaluations: 14": "evaluations: 2",
    })  # fmt: skip
    code, out, err = run("check", "study.yaml")
    assert code == 0, err
    assert "warning: study.yaml:5: green: equals the base: all its weights do nothing\n" in err
    assert "warning: study.yaml:6: blue: its changes reach 0.05 (99.9 % quantile)" in err and "red" not in err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "15 of 20 tensors differ, median relative distance 0.1," in lines["expert red"]
    assert "equals the base in all 20 tensors" in lines["expert green"]
    code, out, err = run("search", "study.yaml", "--inline")
    assert "the budget of 2 evaluations is spent on the 10 known recipes: nothing is searched" in err
    assert (code, out) == (0, "") and err.count("warning:") == 3, err
    Path("r.yaml").write_text(
        "merge_method: dare_linear\nbase_model: base\nmodels:\n- model: red\n"
        "- model: green\n- {model: blue, parameters: {density: 0.5}}\n"
    )
    code, out, err = run("merge", "r.yaml", "out")
    assert (code, out) == (0, "out\n"), err
    assert "warning: r.yaml:5: green: equals the base" in err and "warning: r.yaml:6: blue: its changes" in err


# ---- weights whose sum is zero -----------------------------------------------------------------------


def soup(weights: list[float], method: str = "linear", normalize: bool = True, **more: object) -> Recipe:
    data = {
        "merge_method": method,
        "base_model": None if method == "linear" else "base",
        "compat": "paper",
        "models": [{"model": f"m{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)],
        "parameters": {"normalize": normalize},
        **more,
    }
    return Recipe.from_dict(data)


def where(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


@pytest.mark.parametrize(
    ("recipe", "bad", "warned"),
    [
        (soup([0.5, -0.5]), 1, 1),
        (soup([0.1, 0.2, -0.3]), 1, 1),  # 0.1 + 0.2 - 0.3 is not 0 in floats
        (soup([0.0, 0.0]), 1, 0),
        (soup([0.5, -0.5], normalize=False), 0, 0),
        (soup([0.5, -0.4]), 0, 0),
        (soup([0.5, -0.5], "ties"), 0, 1),
        (soup([0.0, 0.0], "ties"), 0, 0),  # the base: what all weights zero mean
        (soup([0.5, 0.5], "dare_ties"), 0, 0),
    ],
)
def test_weights_that_cancel(recipe: Recipe, bad: int, warned: int) -> None:
    plans = recipe.plan(NAMES, 2)
    assert len(refused(recipe, plans, where)) == bad
    assert len(doubtful(recipe, plans, where)) == warned


def test_other_parameters_that_a_method_refuses_for_every_tensor() -> None:
    recipe = soup([1.0], "della", False, parameters={"density": 0.5, "epsilon": 0.6})
    (problem,) = refused(recipe, recipe.plan(NAMES, 2), where)
    assert "leave (0, 1)" in problem.message


def test_only_the_slice_or_layer_that_cancels_is_named() -> None:
    def part(layers: list[int], w: float | list[float]) -> dict[str, object]:
        sources = [{"model": "a", "layer_range": layers, "parameters": {"weight": 1}}]
        return {"sources": [*sources, {"model": "b", "layer_range": layers, "parameters": {"weight": w}}]}

    data = {"merge_method": "linear", "compat": "paper"}
    recipe = Recipe.from_dict({**data, "slices": [part([0, 1], 0.5), part([1, 2], -1.0)]})
    assert slice_paths(recipe, 2) == [("slices", 0, "sources"), ("slices", 1, "sources")]
    (problem,) = refused(recipe, recipe.plan(NAMES, 2), where)
    assert problem.where == "slices.1.sources" and "[1.0, -1.0]" in problem.message
    gradient = Recipe.from_dict({**data, "slices": [part([0, 2], [0.5, -1.0])]})
    (problem,) = refused(gradient, gradient.plan(NAMES, 2), where)
    assert "model.layers.1.mlp.weight" in problem.message


# ---- recipes -----------------------------------------------------------------------------------------

CASES = {
    "unknown parameter and value out of range": (
        "merge_method: slerp\ncompat: paper\nbase_model: base\n"
        "models:\n- {model: red}\nparameters:\n  t: 1.5\n  k: 1\n",
        ["r.yaml:7: t is 1.5, outside what it may be (0 to 1)", "r.yaml:8: slerp has no parameter 'k'"],
    ),
    "base missing, beside another problem": (
        "merge_method: ties\ncompat: paper\nmodels:\n- model: red\n  parameters: {density: -0.2}\n",
        ["r.yaml:5: density is -0.2, outside what it may be (0 to 1)", "r.yaml:3: ties needs a base model"],
    ),
    "two models where one is required": (
        "merge_method: slerp\nbase_model: base\nmodels:\n- model: red\n- model: green\nparameters: {t: 0.5}\n",
        ["r.yaml:3: method slerp merges exactly 1 beside the base, not 2"],
    ),
    "weights of sum zero, and a stranger": (
        "merge_method: linear\nmodels:\n- model: base\n  parameters: {weight: 1}\n"
        "- model: alien\n  parameters: {weight: -1}\n",
        ["r.yaml:2: linear: the weights [1.0, -1.0]", "r.yaml:5: alien: not a fine-tune of the base: 15 of 20"],
    ),
    "a stranger as the base": (
        "merge_method: ties\nbase_model: alien\nmodels:\n- model: red\n",
        ["r.yaml:4: red: not a fine-tune of the base: 20 of 20 tensors differ, median relative distance 1.4"],
    ),
    "a damaged expert": (
        "merge_method: ties\nbase_model: base\nmodels:\n- model: broken\n",
        ["r.yaml:4: broken: tensor model.norm.weight holds 32 values that are NaN or infinite"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_bad_recipes_are_refused_with_file_and_line(work: Path, run: Run, case: str) -> None:
    text, messages = CASES[case]
    rewrite("alien", lambda n, t: fresh(n, t) if t.ndim > 1 else t)
    rewrite("broken", lambda n, t: t * float("nan") if n == "model.norm.weight" else t)
    if "20 of 20" in messages[0]:
        rewrite("alien", lambda n, t: fresh(n, t) if t.ndim > 1 else t * 0.99)
    Path("r.yaml").write_text(text)
    before = sorted(Path().iterdir())
    code, out, err = run("merge", "r.yaml", "out")
    assert (code, out) == (2, "") and "Traceback" not in err
    for message in messages:
        assert message in err, err
    assert sorted(Path().iterdir()) == before
    code, out, err = run("eval", "r.yaml", "study.yaml")
    assert code == 2 and all(message in err for message in messages), err


def test_stacks_of_strangers_are_nobodys_business(work: Path) -> None:
    """Passthrough mixes no weights: each tensor is one model's."""
    piece = [{"sources": [{"model": m, "layer_range": r}]} for m, r in (("base", [0, 1]), ("red", [1, 2]))]
    stack = Recipe.from_dict({"merge_method": "passthrough", "slices": piece})
    assert not mixes(stack.plan(NAMES, 2))
    assert mixes(soup([0.5, 0.5]).plan(NAMES, 2))


# ---- studies -----------------------------------------------------------------------------------------


def test_all_problems_of_a_study_come_at_once_with_their_lines(work: Path, run: Run) -> None:
    rewrite("green", fresh)
    shutil.rmtree("blue")
    study({
        "method: task_arithmetic": "method: slerp",
        "weight: {low: 0.0, high: 1.2, per_expert: true}": "t: {high: 1.2}\n    z: search",
    })  # fmt: skip
    for command in ("check", "search"):
        code, out, err = run(command, "study.yaml")
        assert (code, out) == (2, ""), err
        for message in (
            "study.yaml:3: experts: method slerp merges exactly 1 beside the base, not 3",
            "study.yaml:5: green: not a fine-tune of the base: 15 of 20 tensors differ, median relative distance 1.4",
            "study.yaml:6: blue: no checkpoint folder at blue",
            "study.yaml:10: genes.t.high: 1.2 is outside what t may be (0 to 1)",
            "study.yaml:11: genes.z: slerp has no parameter 'z'",
        ):
            assert message in err, (message, err)
        assert not Path("runs").exists()


def test_problems_of_a_space_in_its_own_file_name_that_files_lines(work: Path, run: Run) -> None:
    Path("mine.yaml").write_text("method: ties\nlayer_groups: 9\ngenes:\n  weight: search\n  density:\n    low: -1\n")
    text = Path("study.yaml").read_text()
    start, end = text.index("space:"), text.index("objectives:")
    Path("study.yaml").write_text(text[:start] + "space: mine.yaml\n" + text[end:])
    code, _, err = run("check", "study.yaml")
    assert code == 2
    assert "mine.yaml:2: layer_groups: 9 is not a number of groups" in err
    assert "mine.yaml:6: genes.density.low: -1 is outside what density may be" in err


def test_an_expert_cannot_take_the_bases_name(work: Path) -> None:
    from evomerge.config import load_study_file

    study({"  red: red": "  base: red"})
    with pytest.raises(ConfigError, match=r"study.yaml:4: an expert cannot be named `base`"):
        load_study_file("study.yaml")
    study({"  base: red": "  base: base"})
    assert load_study_file("study.yaml").experts["base"] == "base"


def test_how_much_of_a_space_can_never_be_merged() -> None:
    from evomerge.feasible import infeasible_share
    from evomerge.space import SearchSpace

    names = [f"model.layers.{i}.q_proj.weight" for i in range(2)]

    def share(spec: dict[str, Any]) -> tuple[float, str]:
        space = SearchSpace.from_dict(spec, "base", {"a": "a", "b": "b"}, 2)
        return infeasible_share(space, names)

    window = {"method": "della", "genes": {"density": {"low": 0.3, "high": 0.7}}}
    assert share({**window, "fixed": {"epsilon": 0.8}})[0] == 1.0
    assert share({**window, "fixed": {"epsilon": 0.1}}) == (0.0, "")
    part, said = share({**window, "fixed": {"epsilon": 0.4}})
    assert 0.2 < part < 1.0 and "leave (0, 1)" in said
    cancelling = {"method": "linear", "fixed": {"weight": {"a": 1.0, "b": -1.0}}}
    part, said = share({**cancelling, "genes": {"normalize": "search"}})
    assert 0.2 < part < 1.0 and "sum to 0" in said
