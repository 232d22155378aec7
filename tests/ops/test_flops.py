"""FlopCounterMode counts for every op what it counts for its reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from tests.ops.test_contract_all import KERNELS, example, needs, tensors_of


def counts(name, arguments, backend, backward):
    """FLOPs of a call that records no gradient; with ``backward`` also of one that does, and of its backward, where all
    gradients are wanted."""
    inputs = {key: value.detach().clone().requires_grad_() for key, value in tensors_of(arguments).items()}
    found = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        OPS[name].function(**arguments, backend=backend)
    found.append(counter.get_total_flops())
    if not backward:
        return found
    with FlopCounterMode(display=False) as counter:
        out = OPS[name].function(**testing.with_tensors(arguments, inputs), backend=backend)
    found.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    return [*found, counter.get_total_flops()]


def assert_the_references(name, arguments, backend):
    backward = OPS[name].has_backward(backend)
    found = counts(name, arguments, backend, backward)
    assert found == counts(name, arguments, "reference", backward)
    return found


@pytest.mark.parametrize(("name", "backend"), KERNELS)
@pytest.mark.parametrize(("batch", "size"), [(2, (4, 6)), (1, (5, 7)), (1, (1, 3)), (0, (4, 4))])
def test_the_count_is_the_references(name, backend, batch, size):
    if name == "window_attention":  # of which the reference fills up windows that the map cuts
        size = tuple(7 * (side // 4 + 1) for side in size)
    arguments = example(name, batch=batch, size=size)
    found = assert_the_references(name, arguments, backend)
    assert all(found) == bool(batch)


def other_settings():
    """By op, arguments that its first shape does not have."""
    generator = torch.Generator().manual_seed(0)

    def some(*sizes):
        return torch.randn(sizes, generator=generator)

    query, key, value = some(2, 3, 5, 7, 9), some(2, 3, 5, 7, 9), some(2, 3, 4, 7, 9)
    for patch in (1, (3, 2), (8, 4), (100, 1)):
        yield "patch_attention", {"query": query, "key": key, "value": value, "patch_size": patch}
    divided = {"query": query[..., :6, :8], "key": key[..., :6, :8], "value": value[..., :6, :8]}
    yield "patch_attention", {**divided, "patch_size": (3, 2), "bias": some(3, 8, 8)}
    less = {"key": some(2, 3, 5, 2, 6), "value": some(2, 3, 4, 2, 6)}
    yield "patch_attention", {"query": query, **less, "patch_size": 1, "bias": some(3, 63, 12)}
    yield "window_attention", {**divided, "window_size": (3, 4)}
    yield "window_attention", {**divided, "window_size": (6, 2), "bias": some(3, 12, 12)}
    yield "window_attention", {"query": query, "key": key, "value": value, "window_size": (9, 9)}
    yield "mobile_to_former", {"query": some(2, 1, 5, 6), "x": some(2, 1, 6, 3, 4), "scale": 0.3}
    tokens = {"key": some(2, 1, 5, 6), "value": some(2, 1, 5, 6)}
    yield "former_to_mobile", {"x": some(2, 1, 6, 3, 4), **tokens, "residual": False}
    wide, mixing = [some(18, 1, 3, 3), some(18, 1, 5, 5)], [some(18, 3, 1, 1), some(18, 3, 1, 1)]
    scales = {"qkv": some(2, 18, 4, 5), "depthwise": wide, "pointwise": mixing, "head_dim": 3}
    yield "multiscale_linear_attention", scales
    yield "multiscale_linear_attention", {**scales, "depthwise_bias": [some(18), None], "pointwise_bias": [None, None]}
    yield "multiscale_linear_attention", {"qkv": some(2, 18, 4, 5), "depthwise": [], "pointwise": [], "head_dim": 2}
    layer = [some(8), some(8), some(24, 8), None, some(8, 8), some(8), some(8), some(8), some(5, 8), some(5)]
    names = (
        "norm1_weight norm1_bias qkv_weight qkv_bias proj_weight proj_bias norm2_weight norm2_bias fc1_weight fc1_bias"
    )
    layer = dict(zip(names.split(), layer)) | {"fc2_weight": some(8, 5), "fc2_bias": some(8)}
    yield "patch_transformer_layer", {"x": some(2, 8, 5, 6), **layer, "heads": 4, "patch_size": (2, 4)}
    block = {"depthwise": (some(18, 1, 5, 5), None), "project": (some(7, 18, 1, 1), some(7))}
    yield "inverted_residual", {"x": some(2, 5, 6, 7), "expand": (some(18, 5, 1, 1), some(18)), **block, "stride": 2}
    yield "inverted_residual", {"x": some(2, 18, 6, 7), "expand": None, **block, "activation": None}
    yield "conv3x3", {"x": some(2, 5, 6, 7), "weight": some(18, 5, 3, 3), "stride": 2, "residual": some(2, 18, 3, 4)}
    more = {"beside": some(1, 4, 17, 18), "residual": some(1, 18, 17, 18)}
    yield "conv3x3", {"x": some(1, 16, 17, 18), "weight": some(18, 20, 3, 3), "bias": some(18), **more}
    norm = {"norm": (some(5), None), "residual": some(2, 18, 6, 7)}
    yield "pointwise", {"x": some(2, 5, 6, 7), "weight": some(18, 5), "bias": some(18), **norm}
    yield "pointwise", {"x": some(2, 5, 6, 7), "weight": some(18, 5, 1, 1), "activation": "gelu"}


@pytest.mark.parametrize(
    "case",
    (pytest.param(case, marks=needs(case[0], "cpp")) for case in other_settings()),
    ids=lambda case: case[0],
)
def test_the_count_with_other_settings(case):
    assert_the_references(*case, "cpp")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", (case for case in other_settings() if "triton" in OPS[case[0]].why_not), ids=lambda case: case[0]
)
def test_the_count_with_other_settings_on_triton(case):
    assert_the_references(*case, "triton")


@pytest.mark.parametrize(("sizes", "window", "shift"), [((14, 14), (7, 7), (3, 3)), ((5, 9), (7, 4), (6, 1))])
def test_the_count_of_windows_is_that_of_pairs(sizes, window, shift):
    corners = [[(place - by) // extent for place in range(size)] for size, extent, by in zip(sizes, window, shift)]
    windows = [(y, x) for y in corners[0] for x in corners[1]]
    maps = [torch.empty(2, 3, dim, *sizes, device="meta") for dim in (4, 4, 8)]
    operator = torch.ops.mvkernels_triton.window_attention_forward
    with FlopCounterMode(display=False) as counter:
        operator(*maps, *window, *shift, None, 0.5)
    assert counter.get_total_flops() == 2 * 2 * 3 * (4 + 8) * sum(windows.count(each) for each in windows)


def test_a_frozen_scale_is_not_counted_where_the_operator_is_told():
    """Triton's operator of the multi-scale backward is: its formula, for no kernel need run."""
    meta = {"device": "meta"}
    qkv, wide, mixing = (
        torch.empty(2, 18, 4, 5, **meta),
        torch.empty(18, 1, 3, 3, **meta),
        torch.empty(18, 3, 1, 1, **meta),
    )
    found = []
    for wanted in (True, False):
        sums = torch.empty(2, 2, 2, 4, 3, **meta)
        operator = torch.ops.mvkernels_triton.multiscale_linear_attention_backward
        with FlopCounterMode(display=False) as counter:
            operator(torch.empty(2, 12, 4, 5, **meta), qkv, sums, [wide], [mixing], 3, [], [], 1e-15, wanted)
        found.append(counter.get_total_flops())
    qkv = torch.randn(2, 18, 4, 5, requires_grad=True)
    weights = {"depthwise": [torch.randn(18, 1, 3, 3)], "pointwise": [torch.randn(18, 3, 1, 1)], "head_dim": 3}
    out = OPS["multiscale_linear_attention"].function(qkv, **weights, backend="reference")
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert found[1] == counter.get_total_flops() < found[0]


@pytest.mark.parametrize("first", ["mvkernels", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first):
    code = f"""
import importlib, sys
importlib.import_module({first!r})
import mvkernels, torch
print("torch.utils.flop_counter" in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 4, 16, 32, 32, requires_grad=True)
with FlopCounterMode(display=False) as counter:
    mvkernels.patch_attention(q, q, q).sum().backward()
print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    loaded, count = done.stdout.split()
    assert loaded == str(first != "mvkernels") and int(count) == 3 * 67_108_864
