"""Window attention: what bad and unusual input gets."""

import numpy as np
import pytest
import torch

import mvkernels
from tests.ops import bridges

needs_cpp = bridges.needs_cpp("window_attention")
M = (1, 2, 4, 6, 6)


def _map(*shape, dtype=torch.float32):
    return torch.randn(*(shape or M)).to(dtype)


BAD = {
    "key shape": (ValueError, "differ along axis 2", lambda: ((_map(), _map(1, 2, 5, 6, 6), _map(), 2), {})),
    "key map": (ValueError, "differ along axis 3", lambda: ((_map(), *[_map(1, 2, 4, 3, 6)] * 2, 1), {})),
    "value shape": (ValueError, "differ along axis 4", lambda: ((_map(), _map(), _map(1, 2, 4, 6, 7), 2), {})),
    "W = 0": (ValueError, "W is 0", lambda: ((*[_map(1, 2, 4, 6, 0)] * 3, 2), {})),
    "value_dim = 0": (ValueError, "value_dim is 0", lambda: ((_map(), _map(), _map(1, 2, 0, 6, 6), 2), {})),
    "no window": (TypeError, "window_size", lambda: ((_map(),) * 3, {})),
    "window 0": (ValueError, "window_size is 0, want at least 1", lambda: ((*[_map()] * 3, 0), {})),
    "window 3": (ValueError, "pair of ints", lambda: ((*[_map()] * 3, (2, 2, 2)), {})),
    "window float": (TypeError, "window_size is 7.0, want an int", lambda: ((*[_map()] * 3, 7.0), {})),
    "shift -1": (ValueError, r"shift is \(0, -1\), want at least 0", lambda: ((*[_map()] * 3, 2), {"shift": (0, -1)})),
    "shift of a window": (
        ValueError,
        r"shift is \(1, 3\), want less than window_size \(2, 3\)",
        lambda: ((*[_map()] * 3, (2, 3)), {"shift": (1, 3)}),
    ),
    "shift text": (TypeError, "shift is '1'", lambda: ((*[_map()] * 3, 2), {"shift": "1"})),
    "bias shape": (
        ValueError,
        r"bias is \(2, 9, 8\), want \(heads, N, N\) = \(2, 9, 9\)",
        lambda: ((*[_map()] * 3, 3), {"bias": _map(2, 9, 8)}),
    ),
    "bias heads": (ValueError, r"= \(2, 9, 9\)", lambda: ((*[_map()] * 3, 3), {"bias": _map(1, 9, 9)})),
    "bias rank": (ValueError, "bias has 2 axes", lambda: ((*[_map()] * 3, 3), {"bias": _map(9, 9)})),
    "backend": (ValueError, "backend is 'cud', want one of auto", lambda: ((*[_map()] * 3, 3), {"backend": "cud"})),
    "unavailable": (
        mvkernels.BackendUnavailable,
        "run on CUDA tensors",
        lambda: ((*[_map()] * 3, 3), {"backend": "cuda"}),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, make = BAD[name]
    args, kwargs = make()
    with pytest.raises(error, match=message) as caught:
        mvkernels.window_attention(*args, **kwargs)
    assert "\n" not in str(caught.value)
    runs, reason = mvkernels.can_run("window_attention", kwargs.pop("backend", "reference"), *args, **kwargs)
    assert not runs and reason


def test_numbers_of_numpy_and_lists():
    q = _map()
    expected = mvkernels.window_attention(q, q, q, (3, 3), shift=(2, 2), scale=0.5)
    three, two, half = np.int64(3), np.int32(2), np.float32(0.5)
    for window, shift in ((three, two), ((three, three), [two, 2]), ([3, 3], two)):
        assert torch.equal(mvkernels.window_attention(q, q, q, window, shift=shift, scale=half), expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("shift", [0, 2, 5, 2**31 - 2, 2**40, (2**30, 3), 10**29])
def test_a_window_beyond_the_map(backend, shift):
    """Two windows along an axis at most: up to the shift, and from it."""
    q, k, v = _map(), _map(), _map()
    window = (2**31 - 1, 2**63) if shift in (0, 2, 5, 2**31 - 2) else 10**30
    out = mvkernels.window_attention(q, k, v, window, shift=shift, backend=backend)
    cuts = [min(cut, 6) for cut in (shift if isinstance(shift, tuple) else (shift, shift))]
    for ys in (slice(0, cuts[0]), slice(cuts[0], 6)):
        for xs in (slice(0, cuts[1]), slice(cuts[1], 6)):
            part = [m[..., ys, xs] for m in (q, k, v)]
            if part[0].numel():
                torch.testing.assert_close(out[..., ys, xs], mvkernels.patch_attention(*part, 1))


@needs_cpp
def test_the_raw_operator_checks_what_it_indexes():
    q = _map()
    forward = torch.ops.mvkernels_cpp.window_attention_forward
    for arguments in (
        (q, q[:, :1], q, 2, 2, 0, 0, None, 1.0),
        (q[0], q[0], q[0], 2, 2, 0, 0, None, 1.0),
        (q, q, q.double(), 2, 2, 0, 0, None, 1.0),
        (q, q[..., :4], q[..., :4], 1, 1, 0, 0, None, 1.0),
        (q, q, q, 0, 2, 0, 0, None, 1.0),
        (q, q, q, 2**31, 2, 0, 0, None, 1.0),
        (q, q, q, 2, 2, 2, 0, None, 1.0),
        (q, q, q, 2, 2, 0, -1, None, 1.0),
        (q, q, q, 2, 2, 0, 0, torch.zeros(2, 4, 5), 1.0),
        (q, q, q, 4, 2, 0, 0, torch.zeros(2, 6, 6), 1.0),
    ):
        with pytest.raises(RuntimeError):
            forward(*arguments)


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_export_with_open_sizes(shift, with_bias):
    bias = torch.randn(2, 49, 49) if with_bias else None

    class Model(torch.nn.Module):
        def forward(self, q):
            return mvkernels.window_attention(q, q, q, 7, shift=shift, bias=bias)

    any_size, sevens = torch.export.Dim.DYNAMIC, [7 * torch.export.Dim(name, min=2, max=9) for name in ("h", "w")]
    for (height, width), dims, sizes in (
        ((15, 20), (any_size, any_size), ((16, 25), (9, 30))),
        ((14, 21), sevens, ((21, 28), (49, 14))),
    ):
        shapes = ({3: dims[0], 4: dims[1]},)
        exported = torch.export.export(Model(), (_map(2, 2, 4, height, width),), dynamic_shapes=shapes).module()
        for size in sizes:
            q = _map(2, 2, 4, *size)
            torch.testing.assert_close(exported(q), mvkernels.window_attention(q, q, q, 7, shift=shift, bias=bias))
