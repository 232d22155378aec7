"""patch_attention on scores of any size, with masks, transforms and patches of any size."""

import pytest
import torch

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks, extension
from tests.ops.test_patch_attention import INSTRUCTION_SETS, OP, assert_ok, needs_cpp


@needs_cpp
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=checks.short)
@pytest.mark.parametrize("size", [6, 40])
def test_scores_of_any_size(instruction_set, dtype, size):
    """Attention to one key, scores past what 24 bits count, scales of 0 and near it: finite as the reference is."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, size, size).to(dtype) for _ in range(3))
    for factor, scale in ((1e5, None), (1e5, 1e4), (1.0, 3e8), (1.0, 0.0), (1.0, 1e-40), (1.0, -1e6)):
        inputs = [(q * factor).requires_grad_(), (k * factor).requires_grad_(), v.clone().requires_grad_()]
        outs = [mvkernels.patch_attention(*inputs, 2, scale=scale, backend=b) for b in ("cpp", "reference")]
        assert outs[0].isfinite().all() and outs[1].isfinite().all()
        if size == 6:  # one block of keys: the backward finds the maximum again
            for grads in (torch.autograd.grad(out.float().sum(), inputs) for out in outs):
                assert all(g.isfinite().all() for g in grads)


@needs_cpp
def test_masks_of_the_lowest_number():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, 6, 6) for _ in range(3))
    bias = torch.zeros(1, 9, 9)
    bias[:, 4] = torch.finfo(torch.float32).min
    bias[:, :, 7] = torch.finfo(torch.float32).min
    assert_ok(testing.check(OP, {"query": q, "key": k, "value": v, "patch_size": 2, "bias": bias}, "cpp"))


def test_forward_mode_and_transforms_take_the_reference():
    q = torch.randn(1, 1, 4, 4, 4, dtype=torch.float64)
    tangent = torch.randn_like(q)
    wanted = torch.func.jvp(lambda a: mvkernels.patch_attention(a, q, q, backend="reference"), (q,), (tangent,))[1]
    assert torch.equal(torch.func.jvp(lambda a: mvkernels.patch_attention(a, q, q), (q,), (tangent,))[1], wanted)
    grad = torch.func.grad(lambda a: mvkernels.patch_attention(a, q, q).sum())(q)
    assert grad.isfinite().all()
    if extension.module is not None:
        with pytest.raises(mvkernels.BackendUnavailable, match="forward-mode"):
            torch.func.jvp(lambda a: mvkernels.patch_attention(a, q, q, backend="cpp"), (q,), (tangent,))


@pytest.mark.parametrize("patch", [2**40, 2**63, (2**70, 1)])
def test_a_patch_beyond_the_map_makes_every_pixel_a_group(patch):
    q, k, v = (torch.randn(1, 2, 4, 3, 3) for _ in range(3))
    out = mvkernels.patch_attention(q, k, v, patch)
    if not isinstance(patch, tuple):
        torch.testing.assert_close(out, v)
    assert out.isfinite().all()


@needs_cpp
def test_the_cpp_backend_declines_a_wide_head():
    q = torch.randn(1, 1, 257, 2, 2)
    runs, reason = mvkernels.can_run("patch_attention", "cpp", q, q, q)
    assert not runs and "257" in reason
    assert mvkernels.patch_attention(q, q, q).shape == q.shape
