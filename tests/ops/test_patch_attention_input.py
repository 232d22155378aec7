"""Patch attention: what bad and empty input gets."""

import numpy as np
import pytest
import torch

import mvkernels
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

OP = OPS["patch_attention"]
needs_cpp = pytest.mark.skipif(extension.module is None, reason=extension.reason)


def _map(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


M = (1, 2, 4, 6, 6)
BAD = {
    "list": (TypeError, "query is a list", lambda: (([1.0], _map(*M), _map(*M)), {})),
    "none": (TypeError, "value is a NoneType", lambda: ((_map(*M), _map(*M), None), {})),
    "integer": (TypeError, "key has dtype int64", lambda: ((_map(*M), torch.ones(M, dtype=torch.int64), _map(*M)), {})),
    "complex": (TypeError, "complex64", lambda: ((torch.zeros(M, dtype=torch.complex64),) * 3, {})),
    "rank": (ValueError, "query has 4 axes", lambda: ((_map(2, 4, 6, 6),) * 3, {})),
    "key shape": (ValueError, "differ along axis 2", lambda: ((_map(*M), _map(1, 2, 5, 6, 6), _map(*M)), {})),
    "value shape": (ValueError, "differ along axis 4", lambda: ((_map(*M), _map(*M), _map(1, 2, 4, 6, 7)), {})),
    "dtypes": (
        ValueError,
        "value has dtype float64",
        lambda: ((_map(*M), _map(*M), _map(*M, dtype=torch.float64)), {}),
    ),
    "devices": (ValueError, "key is on meta", lambda: ((_map(*M), _map(*M).to("meta"), _map(*M)), {})),
    "H = 0": (ValueError, "H is 0", lambda: ((_map(1, 2, 4, 0, 6),) * 3, {})),
    "W = 0": (ValueError, "W is 0", lambda: ((_map(1, 2, 4, 6, 0),) * 3, {})),
    "head_dim = 0": (ValueError, "head_dim is 0", lambda: ((_map(1, 2, 0, 6, 6),) * 3, {})),
    "patch 0": (ValueError, "patch_size is 0", lambda: ((_map(*M),) * 3, {"patch_size": 0})),
    "patch -1": (ValueError, r"patch_size is \(2, -1\)", lambda: ((_map(*M),) * 3, {"patch_size": (2, -1)})),
    "patch 3": (ValueError, "pair of ints", lambda: ((_map(*M),) * 3, {"patch_size": (2, 2, 2)})),
    "patch float": (TypeError, "pair of ints", lambda: ((_map(*M),) * 3, {"patch_size": 2.0})),
    "patch text": (TypeError, "pair of ints", lambda: ((_map(*M),) * 3, {"patch_size": "2"})),
    "scale": (TypeError, "scale is", lambda: ((_map(*M),) * 3, {"scale": "1"})),
    "huge scale": (ValueError, "too large for a float", lambda: ((_map(*M),) * 3, {"scale": 10**400})),
    "bias ragged": (ValueError, "does not divide", lambda: ((_map(*M),) * 3, {"patch_size": 4, "bias": _map(2, 4, 4)})),
    "bias shape": (
        ValueError,
        r"want \(heads, N, N\) = \(2, 9, 9\)",
        lambda: ((_map(*M),) * 3, {"bias": _map(2, 9, 8)}),
    ),
    "unequal maps": (
        ValueError,
        r"another H x W needs patch_size 1, but patch_size is \(2, 2\)",
        lambda: ((_map(*M), *[_map(1, 2, 4, 6, 4)] * 2), {}),
    ),
    "unequal values": (
        ValueError,
        r"value is \(1, 2, 4, 6, 6\), key is \(1, 2, 4, 6, 4\)",
        lambda: ((_map(*M), _map(1, 2, 4, 6, 4), _map(*M), 1), {}),
    ),
    "no keys": (ValueError, "H is 0", lambda: ((_map(*M), *[_map(1, 2, 4, 0, 4)] * 2, 1), {})),
    "unequal bias": (
        ValueError,
        r"want \(heads, N, M\) = \(2, 36, 8\)",
        lambda: ((_map(*M), *[_map(1, 2, 4, 2, 4)] * 2, 1), {"bias": _map(2, 8, 36)}),
    ),
    "bias rank": (ValueError, "bias has 2 axes", lambda: ((_map(*M),) * 3, {"bias": _map(9, 9)})),
    "bias dtype": (
        ValueError,
        "bias has dtype",
        lambda: ((_map(*M),) * 3, {"bias": _map(2, 9, 9, dtype=torch.float16)}),
    ),
    "backend": (
        ValueError,
        "patch_attention: backend is 'cud', want one of auto",
        lambda: ((_map(*M),) * 3, {"backend": "cud"}),
    ),
    "unavailable": (
        mvkernels.BackendUnavailable,
        "run on CUDA tensors",
        lambda: ((_map(*M),) * 3, {"backend": "cuda"}),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, make = BAD[name]
    args, kwargs = make()
    with pytest.raises(error, match=message) as caught:
        mvkernels.patch_attention(*args, **kwargs)
    assert "\n" not in str(caught.value)
    runs, reason = mvkernels.can_run("patch_attention", kwargs.pop("backend", "reference"), *args, **kwargs)
    assert not runs and reason


def test_numbers_of_numpy():
    q = torch.randn(1, 2, 4, 6, 6)
    expected = mvkernels.patch_attention(q, q, q, 3, scale=0.5)
    assert torch.equal(mvkernels.patch_attention(q, q, q, np.int64(3), scale=np.float32(0.5)), expected)


@needs_cpp
def test_the_raw_operator_checks_what_it_indexes():
    q = torch.randn(1, 2, 4, 6, 6)
    forward = torch.ops.mvkernels_cpp.patch_attention_forward
    for arguments in (
        (q, q[:, :1], q, 2, 2, None, 1.0),
        (q[0], q[0], q[0], 2, 2, None, 1.0),
        (q, q, q.double(), 2, 2, None, 1.0),
        (q, q, q, 0, 2, None, 1.0),
        (q, q, q, 2, 2, torch.zeros(2, 4, 4), 1.0),
        (q, q, q, 4, 2, torch.zeros(2, 6, 6), 1.0),
        (q, q[..., :4], q[..., :4], 2, 2, None, 1.0),
        (q, q[..., :4], q, 1, 1, None, 1.0),
        (q, q[..., :4], q[..., :4], 1, 1, torch.zeros(2, 36, 36), 1.0),
    ):
        with pytest.raises(RuntimeError):
            forward(*arguments)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(backend, with_bias):
    q = torch.randn(0, 2, 4, 6, 6, requires_grad=True)
    bias = torch.randn(2, 9, 9, requires_grad=True) if with_bias else None
    out = mvkernels.patch_attention(q, q, q[:, :, :3], 2, bias=bias, backend=backend)
    assert out.shape == (0, 2, 3, 6, 6)
    out.sum().backward()
    assert q.grad.shape == q.shape
    if with_bias:
        assert torch.equal(bias.grad, torch.zeros(2, 9, 9))
