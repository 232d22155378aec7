"""Random models, random edits, before and after a swap: always the same as the model that was never swapped.

An edit is made to both, and what they compute is compared: outputs, gradients of inputs and parameters, buffers. A
block of which no edit has touched what the fused form does is fused still, and any other one is the original's.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, settings
from torch import Tensor, nn

from mvkernels.dispatch.registry import OPS
from mvkernels.swap import eligibility, swap, verification
from mvkernels.swap.engine import FAMILIES, STRUCTURES, unswap
from mvkernels.swap.later import LaterTensor
from mvkernels.swap.report import SwapReport
from tests.swap.drawn import Model
from tests.swap.random_edits import AFTER, BEFORE, USED, Case, Edit, a_copy, cases, pickled
from tests.swap.random_models import DRAW

Measured = dict[str, Tensor | None]

# The same ones in every run; more are for whoever looks for faults.
EXAMPLES = int(os.environ.get("MVKERNELS_TEST_EXAMPLES", "20"))
SETTINGS = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def test_every_family_is_drawn():
    assert {family.adapter for family in (*FAMILIES, *STRUCTURES)} == set(DRAW)


def full(value: Tensor) -> Tensor:
    return getattr(value, "full_tensor", lambda: value)()


def measure(model: Model, given: list[Tensor], dtype: torch.dtype) -> Measured:
    """Outputs, gradients and buffers, by name; the gradients of the outputs are numbers of the dtype."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in given]
    model.zero_grad()
    torch.manual_seed(3)
    eligibility._logged.clear()
    forget(model)
    result = model(*leaves)
    results = [
        r.tensor if isinstance(r, LaterTensor) else r
        for r in (result if isinstance(result, tuple) else (result,))
        if r is not None
    ]
    generator = torch.Generator().manual_seed(5)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype).to(r) for r in results]
    # oneDNN leaves parts of the gradient of a strided convolution's bfloat16 weight as they were in memory, where the
    # kernel is larger than the map.
    with torch.backends.mkldnn.flags(enabled=False) if dtype == torch.bfloat16 else nullcontext():
        torch.autograd.backward(results, cotangents)
    forget(model)
    found: Measured = {f"output {i}": r.detach() for i, r in enumerate(results)}
    found |= {f"d input {i}": x.grad for i, x in enumerate(leaves)}
    found |= {f"d {n}": None if p.grad is None else full(p.grad) for n, p in model.named_parameters()}
    return found | {n: b.detach().clone() for n, b in model.named_buffers()}


def measured(plain: Model, given: list[Tensor], dtype: torch.dtype) -> Measured:
    """Of the original; an edit may have made it one that does not run."""
    try:
        return measure(plain, given, dtype)
    except Exception:
        reject()


def forget(model: Model) -> None:
    """What LeViT's kind keeps of its gathered biases goes stale when they are edited, and has a graph."""
    for module in model.modules():
        if "attention_bias_cache" in module.__dict__:
            module.attention_bias_cache = {}


def compare(model: Model, plain: Model, case: Case) -> int:
    """Hold the swapped model to the original; how many calls of the fused ops there were."""
    dtype = next(plain.parameters()).dtype
    given = case.drawn.inputs(case.batch, dtype, case.channels_last)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        ours.copy_(theirs)  # what earlier calls have rounded otherwise is no error of this one
    exact: Measured | None = None
    if dtype != torch.float64 and not case.draws(plain.block):
        exact = measured(in_float64(plain), [x.double() for x in given], dtype)
    expected = measured(plain, given, dtype)
    if dtype != torch.float64 and not all(value.isfinite().all() for value in expected.values() if value is not None):
        reject()  # it overflows in the original
    with counted() as calls:
        actual = measure(model, given, dtype)
    if exact is None:
        tolerance = {torch.float64: 2e-4 if case.drawn.rounds else 1e-9, torch.float32: 2e-4}
        assert_same(actual, expected, tolerance.get(dtype, 0.05))
    else:
        assert_as_exact(actual, expected, exact)
    return len(calls)


def in_float64(plain: Model) -> Model:
    try:
        return copy.deepcopy(plain).double()
    except Exception:
        reject()


@contextmanager
def counted() -> Iterator[list[str]]:
    """Grows by a name whenever a swapped module calls one of this library's ops."""
    calls: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    with ExitStack() as stack:
        for module in [m for name, m in sys.modules.items() if name.startswith(("mvkernels.swap", "mvkernels.nn"))]:
            for name, op in OPS.items():
                if vars(module).get(name) is op.function:
                    stack.enter_context(mock.patch.object(module, name, counting(name, op.function)))
        yield calls


def assert_same(actual: Measured, expected: Measured, tolerance: float) -> None:
    largest = {kind: 1.0 for kind in ("o", "d", "")}
    pairs = list(alike(actual, expected))
    for name, _, value in pairs:
        if value.is_floating_point() and value.numel():
            kind = name[0] if name.startswith(("output", "d ")) else ""
            largest[kind] = max(largest[kind], float(value.abs().max()))
    for name, ours, value in pairs:
        kind = name[0] if name.startswith(("output", "d ")) else ""
        torch.testing.assert_close(
            *(ours, value),
            rtol=tolerance,
            atol=tolerance * largest[kind],
            equal_nan=True,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def alike(actual: Measured, expected: Measured) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The pairs that are tensors, of one dtype."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        ours = actual[name]
        assert (ours is None) == (value is None), f"{name} is {'' if ours is None else 'not '}None"
        if value is not None and ours is not None:
            assert ours.dtype == value.dtype, name
            yield name, ours, value


def assert_as_exact(actual: Measured, expected: Measured, exact: Measured) -> None:
    """The criterion of verify_swap: an error that is a factor of the original's at most."""
    runs: list[dict[str, dict[str, Tensor]]] = [{}, {}, {}]
    for name, ours, theirs in alike(actual, expected):
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs), name
            continue
        # A norm over a few pixels leaves next to nothing of an input's gradient, as a softmax does of a key's bias.
        group = "d parameter" if name.startswith("d ") else "output"
        for run, value in zip(runs, (exact[name], theirs, ours)):
            run.setdefault(group, {})[name] = value
    for row in verification._compare("", runs, verification._WHOLE_MODEL, 0.0):
        assert row.ok, str(row)


def pair(case: Case, shard: Callable[[nn.Module], Any]) -> tuple[Model, Model, list[SwapReport], bool | None]:
    """The swapped and the never swapped model, both edited; the reports that still speak of it; whether it has to be
    fused."""
    note(str(case))
    plain = case.drawn.model(case.dtype).train(case.training)
    model = copy.deepcopy(plain)
    reports: list[SwapReport] = []
    done: list[tuple[Edit, str | None]] = []
    swaps = [*case.swaps]

    def swap_once() -> None:
        if swaps:
            backend, fold = swaps.pop(0)
            reports.append(swap(model, backend=backend, fold_norms=fold))

    for stage in (BEFORE, AFTER, USED):
        if stage == USED and any(when == USED for when, _, _ in case.edits):
            compare(model, plain, case)
        for when, edit, where in case.edits:
            if when != stage:
                continue
            try:
                plain, part = edit(plain, where)
            except Exception:  # a copy of what is parametrized, and the like: not with the original either
                reject()
            model, _ = edit(model, where)
            done.append((edit, part))
            if edit in (a_copy, pickled):
                reports.clear()
        swap_once()
        if stage == BEFORE and not done:
            assert reports[0].count == 1, str(reports[0])
    fused = case.fused(plain.block, done)
    if case.shard is not None:
        try:
            shard_both = [plain.block, plain] if case.shard == "model" else [plain.block]
            for module in shard_both:
                shard(module)
        except Exception:
            reject()
        for module in [model.block, model] if case.shard == "model" else [model.block]:
            shard(module)
    return model, plain, reports, fused


@pytest.mark.parametrize("family", DRAW)
def test_swapped_and_edited_it_is_the_original(family, one_process):
    @SETTINGS
    @given(cases(family))
    def check(case: Case) -> None:
        model, plain, _, fused = pair(case, one_process)
        calls = compare(model, plain, case)
        assert fused in (None, calls > 0), f"{calls} calls of fused ops, {eligibility._logged}"
        if fused:
            assert not eligibility._logged

    check()


def described(model: nn.Module) -> dict[str, Any]:
    """Classes and attributes of all modules, past the names of the classes that torch makes up for one module."""
    found = {}
    for name, module in model.named_modules():
        bases = [(base.__module__, base.__qualname__) for base in type(module).__mro__]
        made_up = ("Parametrized", "FSDP")
        kinds = [b for b in bases if not b[1].startswith(made_up) or b[1] == "FSDPModule"]
        found[name] = (kinds, sorted(module.__dict__), type(module.__dict__.get("processor")))
    return found


@pytest.mark.parametrize("family", DRAW)
def test_restored_it_is_the_original(family, one_process):
    """By its reports in any order, and as good as ever between them."""

    @SETTINGS
    @given(cases(family))
    def check(case: Case) -> None:
        model, plain, reports, _ = pair(case, one_process)
        for i in case.order:
            if i < len(reports):
                reports[i].restore()
                compare(model, plain, case)
        if len(reports) < len(case.swaps):  # others spoke of what it was copied from
            unswap(model)
        ours, theirs = described(model), described(plain)
        assert ours.keys() == theirs.keys()
        for name, what in theirs.items():
            assert ours[name] == what, (name, ours[name], what)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert compare(model, plain, case) == 0

    check()


@pytest.mark.parametrize("family", DRAW)
def test_gradients_of_many_cotangents_at_once(family):
    @SETTINGS
    @given(cases(family, shards=False, edits=False))
    def check(case: Case) -> None:
        case.batch = 1
        model, plain, _, _ = pair(case, lambda module: None)
        given_ = case.drawn.inputs(case.batch, torch.float64, case.channels_last)
        generator = torch.Generator().manual_seed(5)

        def gradients(one: Model, batched: bool) -> Measured:
            leaves = [x.detach().requires_grad_() for x in given_]
            wanted = [*leaves, *one.parameters()]
            torch.manual_seed(3)
            eligibility._logged.clear()
            result = one(*leaves)
            out = result[0] if isinstance(result, tuple) else result
            cotangents = torch.randn((3, *out.shape), generator=generator.manual_seed(5), dtype=out.dtype)
            if batched:
                grads = torch.autograd.grad(out, wanted, cotangents, is_grads_batched=True, allow_unused=True)
            else:
                each = [torch.autograd.grad(out, wanted, c, retain_graph=True, allow_unused=True) for c in cotangents]
                grads = [None if g[0] is None else torch.stack(g) for g in zip(*each)]
            return {f"d {i}": g for i, g in enumerate(grads)}

        try:
            expected = gradients(plain, batched=False)
        except ValueError:  # a batch norm has one number to learn from
            reject()
        assert_same(gradients(model, batched=True), expected, 2e-4 if case.drawn.rounds else 1e-9)

    check()
