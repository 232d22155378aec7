"""The Triton kernels of patch_attention on CPU tensors, through Triton's interpreter."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.testing import Yardstick, make_map, poisoned
from mvkernels.triton import configs

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.importorskip("mvkernels.ops.patch_attention.triton.launcher")
plan = pytest.importorskip("mvkernels.triton.attention.plan")

in_interpreter = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreted, reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, where rows of a group are empty
]


def interpreter(test: Any) -> Any:
    for mark in in_interpreter:
        test = mark(test)
    return test


def groups(height: int, width: int, patch: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """The pixels of each group, in token order."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y in range(height):
        for x in range(width):
            found.setdefault((y % patch[0], x % patch[1]), []).append((y, x))
    return list(found.values())


def formula(q: Tensor, k: Tensor, v: Tensor, patch: tuple[int, int], bias: Tensor | None, scale: float) -> Tensor:
    """Patch attention, group by group, pixel lists instead of strides."""
    out = q.new_zeros(*q.shape[:2], v.shape[2], *q.shape[3:])
    for pixels in groups(q.shape[3], q.shape[4], patch):
        ys, xs = (torch.tensor(c) for c in zip(*pixels))
        queries, keys, values = (m[..., ys, xs].transpose(-1, -2) for m in (q, k, v))
        scores = queries @ keys.transpose(-1, -2) * scale
        if bias is not None:
            scores = scores + bias
        out = out.index_put(
            (torch.arange(q.shape[0])[:, None, None, None], torch.arange(q.shape[1])[None, :, None, None],
             torch.arange(v.shape[2])[None, None, :, None], ys, xs),
            (scores.softmax(-1) @ values).transpose(-1, -2),
        )  # fmt: skip
    return out


def gradients(
    maps: list[Tensor], grad: Tensor, dtype: torch.dtype, patch: tuple[int, int], scale: float
) -> list[Tensor]:
    """[out, dq, dk, dv(, dbias)] by autograd through the formula in ``dtype``."""
    leaves = [m.to(dtype).detach().requires_grad_() for m in maps]
    out = formula(*leaves[:3], patch, leaves[3] if len(leaves) > 3 else None, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def run(maps: list[Tensor], grad: Tensor, patch: tuple[int, int], scale: float) -> list[Tensor]:
    """The same by the kernels, on poisoned buffers."""
    bias = maps[3] if len(maps) > 3 else None
    assert kernels.why_not(*maps[:3], patch, bias, scale) is None
    with poisoned():
        out = kernels.forward(*maps[:3], *patch, bias, scale)
        found = kernels.backward(grad, *maps[:3], *patch, bias, scale, bias is not None)
    for made, like in zip((out, *found[:3]), (maps[0], *maps[:3])):
        assert (made.stride(2) == 1) >= (like.stride(2) == 1)
        assert (made.permute(0, 3, 4, 1, 2) if like.stride(2) == 1 else made).is_contiguous()
    if bias is None:
        assert found[3].shape == (0,)
        return [out, *found[:3]]
    assert found[3].is_contiguous() and found[3].dtype == bias.dtype
    return [out, *found]


def check(maps: list[Tensor], grad: Tensor, patch: tuple[int, int], scale: float) -> None:
    names = ("out", "dq", "dk", "dv", "dbias")
    held = Yardstick(lambda dtype: dict(zip(names, gradients(maps, grad, dtype, patch, scale))), grad.dtype)
    for result in held.compare(dict(zip(names, run(maps, grad, patch, scale)))):
        assert result.ok, str(result)


def draw(
    shape: tuple[int, ...],
    dv: int,
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    bias: int = 0,
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """([q, k, v(, bias)], grad); strides "mixed" takes another kind for each map."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("packed", "contiguous", "transposed", "expanded") if strides == "mixed" else (strides,) * 4
    b, h, _, height, width = shape
    q, k = (make_map(shape, kind, dtype, generator=generator) for kind in kinds[:2])
    v, grad = (make_map((b, h, dv, height, width), kind, dtype, generator=generator) for kind in kinds[2:])
    maps = [q, k, v]
    if bias:
        maps.append(torch.randn(h, bias, bias, generator=generator).to(dtype))
    return maps, grad


@interpreter
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    b=st.integers(1, 2),
    h=st.integers(1, 3),
    d=st.sampled_from([1, 3, 8, 16, 20, 24, 30, 36, 60, 64, 100]),
    dv=st.sampled_from([0, 0, 0, 5, 32, 40]),
    size=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    patch=st.sampled_from([(1, 1), (2, 2), (3, 2), (2, 5), (7, 20)]),
    strides=st.sampled_from(["contiguous", "channels_last", "packed", "sliced", "transposed", "expanded", "mixed"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(b, h, d, dv, size, patch, strides, dtype, seed):
    maps, grad = draw((b, h, d, *size), dv or d, strides, dtype, seed=seed)
    check(maps, grad, patch, d**-0.5)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "dv", "patch", "strides"),
    [
        ((2, 2, 32, 7, 7), 128, (1, 1), "packed"),
        ((2, 2, 32, 7, 7), 40, (1, 1), "contiguous"),
        ((1, 1, 16, 14, 14), 16, (1, 1), "contiguous"),
        ((2, 3, 20, 4, 8), 20, (2, 2), "mixed"),
        ((3, 2, 8, 2, 2), 8, (2, 1), "packed"),
    ],
)
def test_bias_and_its_gradient(shape, dv, patch, strides, dtype):
    tokens = shape[3] // patch[0] * (shape[4] // patch[1])
    maps, grad = draw(shape, dv, strides, dtype, bias=tokens)
    check(maps, grad, patch, 0.3)


@interpreter
def test_bias_of_any_strides():
    maps, grad = draw((1, 2, 16, 7, 7), 16, bias=49)
    transposed = maps[3].transpose(1, 2)
    wide = torch.full((2, 49, 98), float("nan"))
    wide[..., ::2] = maps[3]
    expanded = maps[3][:1].expand(2, 49, 49)
    for bias in (transposed, wide[..., ::2], expanded):
        check([*maps[:3], bias], grad, (1, 1), 0.25)


@interpreter
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    d=st.sampled_from([3, 8, 20, 36]),
    dv=st.sampled_from([5, 8, 40]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    partners=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    strides=st.sampled_from(testing.STRIDES),
    one_head=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_maps_of_unequal_sizes(d, dv, size, partners, bias, strides, one_head, dtype, seed):
    check_unequal((2, 2, d, *size), partners, dv, bias, strides, dtype, one_head, seed)


@interpreter
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("size", "partners"), [((3, 3), (5, 6)), ((7, 8), (3, 3)), ((5, 5), (12, 12)), ((10, 10), (5, 5))],
    ids=["packed", "unit", "few and many", "many and few"],
)  # fmt: skip
def test_maps_of_unequal_sizes_on_each_kernel(size, partners, bias):
    check_unequal((1, 2, 8, *size), partners, 16, bias, "packed", torch.float16, True, 0)


def check_unequal(shape, partners, dv, bias, strides, dtype, one_head, seed):  # type: ignore[no-untyped-def]
    """With one head, the keys and values of all heads are that head's, read in place."""
    generator = torch.Generator().manual_seed(seed)
    b, h, d, *size = shape
    query = make_map(shape, strides, dtype, generator=generator)
    key, value = (
        make_map((b, 1 if one_head else h, each, *partners), strides, dtype, generator=generator).expand(
            b, h, -1, -1, -1
        )
        for each in (d, dv)
    )
    arguments = {"query": query, "key": key, "value": value, "patch_size": 1}
    if bias:
        n, m = math.prod(size), math.prod(partners)
        arguments["bias"] = torch.randn(h, n, m, generator=generator).to(dtype)
    for comparison in testing.check(OPS["patch_attention"], arguments, "triton"):
        assert comparison.ok, str(comparison)


@interpreter
@pytest.mark.parametrize(
    ("size", "patch", "strides"),
    [((32, 16), (1, 2), "packed"), ((25, 24), (1, 1), "contiguous"), ((17, 37), (1, 2), "contiguous")],
    ids=["256", "600", "ragged, up to 323"],
)
def test_large_groups(size, patch, strides):
    maps, grad = draw((1, 1, 8, *size), 8, strides)
    check(maps, grad, patch, 8**-0.5)


@interpreter
@pytest.mark.parametrize("size", [(6, 6), (12, 13), (18, 17)], ids=["packed", "unit", "blocks"])
def test_nan_and_inf_stay_in_their_group(size):
    patch = (2, 2)
    maps, grad = draw((1, 2, 8, *size), 8)
    clean = run(maps, grad, patch, 0.35)
    dirty = [m.clone() for m in (*maps, grad)]
    for index, bad in enumerate((float("nan"), float("inf"), float("nan"), float("inf"))):
        dirty[index][0, 1, 0, -1, -1] = bad
    found = run(dirty[:3], dirty[3], patch, 0.35)
    y, x = (size[0] - 1) % 2, (size[1] - 1) % 2
    for name, before, after in zip(("out", "dq", "dk", "dv"), clean, found, strict=True):
        assert torch.equal(before[:, 0], after[:, 0]), name
        for gy in range(2):
            for gx in range(2):
                if (gy, gx) != (y, x):
                    inside = (slice(None), 1, slice(None), slice(gy, None, 2), slice(gx, None, 2))
                    assert torch.equal(before[inside], after[inside]), name
        assert not after[:, 1, :, y::2, x::2].isfinite().all(), name


@interpreter
@pytest.mark.parametrize("size", [(4, 6), (7, 8), (10, 9), (18, 16)], ids=["packed", "unit", "blocks", "large"])
def test_an_infinite_value_gives_what_the_formula_gives(size):
    maps, grad = draw((1, 1, 8, *size), 8)
    maps[2][0, 0, 3, 1, 1] = float("inf")
    exact = gradients([m.double() for m in maps], grad.double(), torch.float64, (1, 1), 0.4)
    for name, ours, wanted in zip(("out", "dq", "dk", "dv"), run(maps, grad, (1, 1), 0.4), exact, strict=True):
        assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours.isinf(), wanted.isinf()), name


@interpreter
@pytest.mark.parametrize("size", [(4, 6), (7, 8), (18, 16)], ids=["packed", "unit", "large"])
def test_nan_of_a_query_stays_in_its_row_and_a_row_of_minus_infinity_is_nan(size):
    tokens = math.prod(size)
    maps, _ = draw((1, 1, 8, *size), 8, bias=tokens)
    maps[0][0, 0, 3, 1, 1] = float("nan")
    maps[3][0, 2] = -float("inf")  # a whole row: NaN, as torch.softmax says
    maps[3][0, 3, : tokens - 1] = -float("inf")  # all but the last: that key alone
    out = kernels.forward(*maps[:3], 1, 1, maps[3], 0.4)
    exact = formula(*(m.double() for m in maps[:3]), (1, 1), maps[3].double(), 0.4)
    assert torch.equal(out.isnan(), exact.isnan())
    assert out.isnan().flatten(3)[0, 0, 0].sum() == 2
    torch.testing.assert_close(out, exact.float(), equal_nan=True, rtol=1e-4, atol=1e-5)


@interpreter
@pytest.mark.parametrize("size", [(4, 6), (7, 8), (10, 9)], ids=["packed", "unit", "blocks"])
def test_gradients_where_a_bias_hides_keys(size):
    tokens = math.prod(size)
    maps, grad = draw((1, 1, 8, *size), 8, bias=tokens)
    maps[3][0, 2, : tokens - 1] = -float("inf")  # the last key alone
    maps[3][0, 3, 64:] = -float("inf")  # all of a second block
    maps[3][0, 4, :64] = -float("inf")
    maps[3][0, 4, -1] = 0
    maps[3][:, :, 5] = -float("inf")  # a key that no query sees
    check(maps, grad, (1, 1), 0.4)


@interpreter
@pytest.mark.parametrize("size", [(5, 6), (8, 8), (9, 8)], ids=["packed", "unit", "blocks"])
def test_the_same_bits_in_every_run(size):
    maps, grad = draw((2, 1, 8, *size), 8, "packed", torch.float16, bias=math.prod(size))
    first, second = (run(maps, grad, (1, 1), 0.35) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_why_not():
    q = torch.zeros(1, 1, 8, 4, 4)
    reason = kernels.why_not(q, q, q, (2, 2), None, 1.0)
    assert reason is None if interpreted else "TRITON_INTERPRET" in reason
    assert "float64" in kernels.why_not(*[q.double()] * 3, (2, 2), None, 1.0) or not interpreted
    wide = torch.zeros(1, 1, 257, 1, 1)
    assert "257" in kernels.why_not(q, q, wide, (2, 2), None, 1.0) or not interpreted
    assert kernels.why_not(*[q.to("meta")] * 3, (2, 2), None, 1.0) == "no Triton for device type meta"


def problem(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, patch: int = 2, units: int = 132
) -> Any:
    device = configs.Device("none", "sm_90", units)
    maps = tuple((name, strides) for name in "qkvg")
    return plan.AttentionProblem(
        shape, maps, dtype, "ieee", device, "patch_attention", shape[2], None, 1, (patch, patch)
    )


def test_launches_of_a_packed_map():
    # MobileViT-S, 32 x 32: rows of 36 channels are 8-byte aligned in a packed bfloat16 qkv.
    strides = (32 * 32 * 432, 36, 1, 32 * 432, 432)
    (forward,) = plan.forward_launches(problem((128, 4, 36, 32, 32), strides, torch.bfloat16))
    assert (forward.meta["LQ"], forward.meta["AQ"], forward.meta["D0"], forward.meta["D1"]) == (1, 4, 32, 16)
    assert not (forward.meta["ONE_PASS"] or forward.meta["WIDE"] or forward.meta["LINEAR"])
    (small,) = plan.forward_launches(problem((128, 4, 36, 16, 16), strides, torch.bfloat16))
    assert small.meta["ONE_PASS"]
    backward, uses_rows, slices = plan.backward_launches(problem((128, 4, 36, 32, 32), strides, torch.bfloat16), False)
    assert [one.meta["PHASES"] for one in backward] == [3] and uses_rows and slices == 0
    backward, _, _ = plan.backward_launches(problem((1, 4, 36, 32, 32), strides, torch.bfloat16), False)
    assert [one.meta["PHASES"] for one in backward] == [1, 2]  # too few units for a program each


def test_launches_use_64_bit_offsets_when_a_plane_is_large():
    side = 8192
    strides = (side * side * 144, 36, 1, side * 144, 144)
    (forward,) = plan.forward_launches(problem((1, 4, 36, side, side), strides, torch.float16))
    assert forward.meta["WIDE"]
    assert forward.grid <= 2**31 - 1


def test_patch_larger_than_the_map_has_no_empty_groups():
    strides = (9 * 8, 9 * 8, 9, 3, 1)
    (forward,) = plan.forward_launches(problem((1, 1, 8, 3, 3), strides, torch.float32, patch=1000))
    assert forward.grid * forward.meta["UNITS"] <= 12


def test_a_configuration_file_overrides_the_heuristic(tmp_path, monkeypatch):
    key = {"n": 256, "d": 36, "dv": 36, "bias": 0, "wide": 1, "dtype": "f16", "arch": "sm_90"}
    before = configs.config("patch_attention", "forward_rows", "A Device", key)
    (tmp_path / "a_device.json").write_text(
        '{"configs": {"patch_attention.forward_rows": {"bias=0,d=36,dtype=f16,dv=36,n=256,wide=1": {"num_warps": 8}}}}'
    )
    monkeypatch.setattr(configs, "CONFIGS", tmp_path)
    configs.forget()
    try:
        after = configs.config("patch_attention", "forward_rows", "A Device", key)
        assert after == {**before, "num_warps": 8} != before
        (tmp_path / "a_device.json").write_text("{")
        configs.forget()
        assert configs.config("patch_attention", "forward_rows", "A Device", key) == before
    finally:
        monkeypatch.undo()
        configs.forget()


@interpreter
@pytest.mark.parametrize("size", [(4, 4), (8, 8)], ids=["packed", "unit"])
@pytest.mark.parametrize("means", [(0, 5, 20), (5, 0, 20)], ids=["keys", "queries"])
def test_gradients_of_half_types_through_values_far_from_zero(size, means):
    # What is left of dout V^T without its row's mean is small: an output rounded to half has lost it.
    generator = torch.Generator().manual_seed(0)
    maps = [make_map((1, 1, 20, *size), "channels_last", torch.float16, generator=generator) + m for m in means]
    for scale in (20**-0.5, 3.0):
        arguments = dict(zip(("query", "key", "value"), maps)) | {"patch_size": 1, "scale": scale}
        for comparison in testing.check(OPS["patch_attention"], arguments, "triton"):
            assert comparison.ok, str(comparison)
