"""The layer's Triton kernels: their LayerNorms, and what is planned."""

import pytest
import torch

from mvkernels import testing
from mvkernels.triton import configs
from tests.ops.bridges import assert_ok
from tests.ops.test_patch_transformer_layer import OP, arguments_of, on_triton


@on_triton
@pytest.mark.parametrize("noise", [0.0, 0.004, 1.0])
def test_nearly_equal_channels(noise):
    """The float32 nearest to the mean of such rows is off by about as much as they differ."""
    arguments = arguments_of(3, 12, size=(5, 4))
    arguments["x"].mul_(noise).add_(12345.7)
    assert_ok(testing.check(OP, arguments, "triton"))


@on_triton
def test_a_backward_under_autocast_keeps_the_dtype_of_the_forward():
    """Autograd may be asked for gradients inside of a context that the forward was outside of."""
    arguments = arguments_of(2, 12, size=(5, 4))
    leaves = {name: value.requires_grad_() for name, value in testing.tensors_in(arguments).items()}
    found = []
    for enabled in (True, False):
        out = OP.function(**arguments, backend="triton")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)))
    for under, outside in zip(*found):
        assert under.dtype == torch.float32 and torch.equal(under, outside)


def problem(batch=128, channels=144, side=32, dtype=torch.bfloat16, arch="sm_90"):
    plan = pytest.importorskip("mvkernels.ops.patch_transformer_layer.triton.plan")
    device = configs.Device("none", arch, 132)
    return plan, plan.LayerProblem(
        (batch, channels, side, side), (), dtype, "ieee", device, 2 * channels, 4, (2, 2), True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_three_kernels_around_attention(dtype):
    plan, large = problem(dtype=dtype)
    launches = plan.forward_launches(large)
    assert [each.name for each in launches] == ["linear_rows", "linear_rows", "norm_ffn"]
    assert [each.meta["N"] for each in launches[:2]] == [3 * 144, 144]
    assert {(each.meta["C0"], each.meta["C1"]) for each in launches} == {(128, 16)}


def test_grids_stay_in_one_dimension_and_few_rows_go_to_more_programs():
    plan, large = problem(batch=1)
    qkv, *_ = plan.forward_launches(large)
    blocks = -(-1024 // qkv.meta["BLOCK_M"])
    assert qkv.grid == blocks * qkv.meta["PROGRAMS_PER_BLOCK"] > blocks
    plan, larger = problem(batch=4096)
    assert all(each.grid < 2**31 for each in plan.forward_launches(larger))


@pytest.mark.parametrize(
    ("more", "rows"),
    [
        ({}, (256, 128, 256)),
        ({"batch": 33}, (256, 128, 256)),
        ({"batch": 32}, (128, 128, 128)),
        ({"channels": 96}, (128, 128, 256)),
        ({"channels": 192}, (128, 128, 128)),
        ({"arch": "sm_80"}, (64, 64, 64)),
    ],
    ids=str,
)
def test_blocks_have_256_rows_where_processors_have_one_each(more, rows):
    """Of that many rows, half types, and channels whose rows fit the registers."""
    plan, described = problem(**more)
    qkv, project, _ = plan.forward_launches(described)
    ffn, *_ = plan.backward_launches(described)
    assert tuple(each.meta["BLOCK_M"] for each in (qkv, project, ffn)) == rows
