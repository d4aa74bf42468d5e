"""Contract tests that every merge method and objective must pass; use them for your own in one line.

    from evomerge.testing import METHOD_CHECKS

    @pytest.mark.parametrize("check", METHOD_CHECKS)
    def test_my_method(check):
        check(my_method)

    from evomerge.testing import check_objective

    check_objective(make_objective(spec), LiveModel("models/base"), make_objective(spec))

Every check raises AssertionError with the method's or objective's name and what does not hold.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evomerge import registry
from evomerge.methods import Inputs, Method

if TYPE_CHECKING:
    from evomerge.model import LiveModel
    from evomerge.objectives import Objective, Scores

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (5, 1), (1, 6), (6, 9), (2, 3, 4), (0,))


def make_inputs(method: Method, k: int, shape: tuple[int, ...] = (6, 9), *, seed: int = 0) -> Inputs:
    """Returns float32 inputs for `method` with k experts near the base, -0.0 and zeros included."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    experts = [base + 0.3 * torch.randn(shape, generator=generator) for _ in range(k)]
    for tensor in (base, *experts):
        tensor.view(-1)[:3] = torch.tensor([-0.0, 0.0, 1e-40])[: tensor.numel()]
    return Inputs("model.layers.0.mlp.up_proj.weight", base if method.needs_base else None, tuple(experts), seed=11)


def example_parameters(method: Method, k: int) -> dict[str, Any]:
    """Returns one value inside its search range for every parameter that has a range.

    Per-expert parameters get k different values.
    """
    result: dict[str, Any] = {}
    for param in method.parameters:
        if param.low is None or param.high is None:
            continue
        steps = range(1, k + 1) if param.per_expert else (1,)
        width = param.high - param.low
        values = [param.low + width * step / (k + 1) for step in steps]
        result[param.name] = values if param.per_expert else values[0]
    return result


def check_description(method: Method) -> None:
    """The method is registered, says what it does and where it comes from; ranges make sense."""
    _require(registry.get("methods", method.name) is method, method, "is not registered")
    _require(bool(method.summary) and bool(method.source), method, "needs a docstring and a source")
    for param in method.parameters:
        if param.low is not None and param.high is not None:
            _require(param.low < param.high, method, f"{param.name}: empty range")
            _require(not param.log or param.low > 0, method, f"{param.name}: log range from <= 0")
        if param.kind == "choice" and isinstance(param.default, str):
            _require(param.default in param.choices, method, f"{param.name}: default not a choice")


def check_no_writes(method: Method) -> None:
    """The inputs are the same bits after the call, under both kinds of arithmetic."""
    for k, compat in itertools.product(_counts(method), ("paper", "mergekit")):
        x = replace(make_inputs(method, k), compat=compat)
        before = [_bits(tensor).clone() for tensor in _tensors(x)]
        method(x, **example_parameters(method, k))
        same = all(torch.equal(a, _bits(b)) for a, b in zip(before, _tensors(x), strict=True))
        _require(same, method, f"wrote to its inputs (k={k}, compat={compat})")


def check_shapes(method: Method) -> None:
    """Every shape gives a finite result of that shape and dtype: scalars and empty ones too."""
    for shape, k in itertools.product(SHAPES, _counts(method)):
        x = make_inputs(method, k, shape)
        result = method(x, **example_parameters(method, k))
        good = result.shape == shape and result.dtype == torch.float32
        _require(good and bool(result.isfinite().all()), method, f"shape {shape}, k={k}")


def check_identity(method: Method) -> None:
    """One expert at the defaults is returned bit for bit, if the method says `identity`."""
    if not method.identity or method.n_experts[0] > 1:
        return
    top = {param.name: param.high for param in method.parameters if param.required}
    for shape in SHAPES:
        x = make_inputs(method, 1, shape)
        same = torch.equal(_bits(method(x, **top)), _bits(x.experts[0]))
        _require(same, method, f"one expert is not returned exactly (shape {shape})")


def check_zero_lambda(method: Method) -> None:
    """lambda = 0 returns the base bit for bit."""
    if not method.needs_base or method.parameter("lambda") is None:
        return
    for k in _counts(method):
        x = make_inputs(method, k)
        result = method(x, **{**example_parameters(method, k), "lambda": 0.0})
        _require(torch.equal(_bits(result), _bits(x.reference)), method, "lambda 0 is not the base")


def check_zero_deltas(method: Method) -> None:
    """Experts equal to the base give the base: no division by a norm that is zero."""
    if not method.needs_base:
        return
    for k in _counts(method):
        x = make_inputs(method, k)
        x = replace(x, experts=(x.reference.clone(),) * k)
        result = method(x, **example_parameters(method, k))
        close = torch.allclose(result, x.reference, rtol=1e-6, atol=1e-7)
        _require(close, method, f"zero task vectors move the base (k={k})")


def check_permutation(method: Method) -> None:
    """The order of the experts does not count, their parameters and streams going with them."""
    for k in _counts(method) if method.symmetric else ():
        x, parameters = make_inputs(method, k), example_parameters(method, k)
        expected = method(x, **parameters)
        for order in itertools.permutations(range(k)):
            moved = {
                name: [value[i] for i in order] if isinstance(value, list) else value
                for name, value in parameters.items()
            }
            y = replace(x, experts=tuple(x.experts[i] for i in order), streams=tuple(order))
            close = torch.allclose(method(y, **moved), expected, rtol=1e-5, atol=1e-6)
            _require(close, method, f"the order {order} of the experts changes the result")


def check_seed(method: Method) -> None:
    """The result depends on the seed if and only if the method says `random`, and repeats."""
    k = max(_counts(method))
    x, parameters = make_inputs(method, k), example_parameters(method, k)
    state = torch.get_rng_state()
    first = method(x, **parameters)
    _require(torch.equal(_bits(first), _bits(method(x, **parameters))), method, "does not repeat")
    _require(torch.equal(state, torch.get_rng_state()), method, "uses torch's global generator")
    other = method(replace(x, seed=x.seed + 1), **parameters)
    changed = not torch.equal(_bits(first), _bits(other))
    _require(changed == method.random, method, f"random={method.random}, seed matters: {changed}")


def check_nan_stays_visible(method: Method) -> None:
    """A NaN in a model makes a NaN in the result: masks must not hide a broken checkpoint."""
    for k in _counts(method):
        x = make_inputs(method, k)
        broken = x.experts[0].clone()
        broken.view(-1)[4:8] = float("nan")
        x = replace(x, experts=(broken, *x.experts[1:]))
        result = method(x, **example_parameters(method, k)).view(-1)
        _require(bool(result[4:8].isnan().all()), method, f"hides a NaN (k={k})")


def check_threads(method: Method, shape: tuple[int, ...] = (1100, 1000)) -> None:
    """A tensor of more than one chunk merges to the same bits on one, two and three threads.

    Not one of METHOD_CHECKS: methods with singular vectors take seconds for a matrix of that size.
    """
    k = max(_counts(method))
    x, parameters = make_inputs(method, k, shape), example_parameters(method, k)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_bits(method(x, **parameters)))
    finally:
        torch.set_num_threads(before)
    same = all(torch.equal(results[0], other) for other in results[1:])
    _require(same, method, "the number of threads changes bits")


METHOD_CHECKS: tuple[Callable[[Method], None], ...] = (
    check_description,
    check_no_writes,
    check_shapes,
    check_identity,
    check_zero_lambda,
    check_zero_deltas,
    check_permutation,
    check_seed,
    check_nan_stays_visible,
)


def check_method(method: Method) -> None:
    """Runs every check on one method."""
    for check in METHOD_CHECKS:
        check(method)


def method_digests(names: Iterable[str]) -> dict[str, str]:
    """Returns a hash of the bits that each named method computes from fixed inputs."""
    result = {}
    for name in names:
        method: Method = registry.get("methods", name)
        k = max(_counts(method))
        merged = method(make_inputs(method, k, (33, 65)), **example_parameters(method, k))
        result[name] = hashlib.sha256(merged.numpy().tobytes()).hexdigest()
    return result


def check_processes(names: Iterable[str] | None = None, hash_seeds: Iterable[int] = (1, 2)) -> None:
    """Fresh processes with other hash seeds and thread counts compute the same bits as this one."""
    wanted = list(registry.names("methods") if names is None else names)
    here = method_digests(wanted)
    code = (
        "import json, sys; from evomerge.testing import method_digests; print(json.dumps(method_digests(sys.argv[1:])))"
    )
    for number, hash_seed in enumerate(hash_seeds):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(hash_seed),
            "OMP_NUM_THREADS": str(1 + number),
        }
        output = subprocess.run(
            [sys.executable, "-c", code, *wanted],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        there = json.loads(output)
        changed = [name for name in wanted if here[name] != there[name]]
        if changed:
            raise AssertionError(f"other bits in another process: {', '.join(changed)}")


def check_objective(objective: Objective, live: LiveModel, again: Objective) -> None:
    """An objective scores a model on every split as its protocol says, twice alike, and in parts.

    Args:
        live: what to score; objectives that look at other models have observed these already.
        again: another object of the same description, as another process would make it.
    """
    name = f"objective {objective.name}"
    _hold(objective.check() == [], f"{name}: check() finds {objective.check()}")
    _hold(objective.splits[:1] == ("search",), f"{name}: the first split is not search: {objective.splits}")
    _hold(objective.fingerprint() == again.fingerprint(), f"{name}: the fingerprint differs between two objects")
    low, high = objective.bounds
    chance: float | None = getattr(objective, "chance", None)
    inside = chance is None or (-np.inf if low is None else low) <= chance <= (np.inf if high is None else high)
    _hold(inside, f"{name}: guessing gives {chance}, outside of its bounds {low} and {high}")
    for split in objective.splits:
        before = [p.detach().clone() for p in live.model.parameters()]
        scores = objective.score(live, split)
        same = all(torch.equal(a, b) for a, b in zip(before, live.model.parameters(), strict=True))
        _hold(same, f"{name}: score() changes the model")
        numbers = [scores.value, scores.stderr, *scores.items.ravel()]
        _hold(bool(np.isfinite(numbers).all()) and scores.stderr >= 0, f"{name}: not finite on {split}")
        _hold(low is None or scores.value >= low, f"{name}: {scores.value} is below the bound {low}")
        _hold(high is None or scores.value <= high, f"{name}: {scores.value} is above the bound {high}")
        _hold(len(scores.items) == objective.size(split), f"{name}: size({split!r}) is not the number of items")
        if not getattr(objective, "measured", False):
            repeated = objective.score(live, split)
            _hold(np.array_equal(repeated.items, scores.items), f"{name}: does not repeat on {split}")
        if objective.partial:
            _check_parts(objective, live, split, scores, name)


def _check_parts(objective: Objective, live: LiveModel, split: str, scores: Scores, name: str) -> None:
    joined = np.empty_like(scores.items)
    for start in (0, 1):
        positions = range(start, len(joined), 2)
        joined[start::2] = objective.score(live, split, positions).items
    # Other rows share their batches: the last bits of a forward pass may differ.
    _hold(np.allclose(joined, scores.items, rtol=1e-4, atol=1e-6), f"{name}: parts of {split} are not the whole")
    whole = objective.aggregate(scores.items)
    _hold((whole.value, whole.stderr) == (scores.value, scores.stderr), f"{name}: aggregate() is not what score() says")


def _hold(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _counts(method: Method) -> tuple[int, ...]:
    """Returns numbers of experts to try: the fewest, and three if the method takes them."""
    low, high = method.n_experts
    return tuple(sorted({low, max(low, min(3, high or 3))}))


def _tensors(x: Inputs) -> tuple[Tensor, ...]:
    return x.experts if x.base is None else (x.base, *x.experts)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


def _require(holds: bool, method: Method, message: str) -> None:
    _hold(holds, f"method {method.name}: {message}")
