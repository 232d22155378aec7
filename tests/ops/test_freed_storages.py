"""Tensors whose memory has been given back, as fully_shard leaves parameters between uses: an error and not a crash."""

import pytest
import torch

from mvkernels.dispatch.registry import OPS
from tests.ops.test_contract_all import call, example, needs, tensors_of


def freed(value, offset):
    """A tensor whose memory has been given back, at its storage's start or inside of it."""
    where = torch.stack([value, value])[offset]
    where.untyped_storage().resize_(0)
    return where


CPP = [pytest.param(name, marks=needs(name, "cpp")) for name in OPS if "cpp" in OPS[name].why_not]


@pytest.mark.parametrize("name", CPP)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("backend", [None, "cpp"])
def test_a_storage_that_was_freed(name, offset, requires_grad, backend):
    """As fully_shard leaves parameters between uses: an error and not a crash, as of scaled_dot_product_attention."""
    if requires_grad and not OPS[name].has_backward("cpp"):
        pytest.skip("PyTorch's own operators, which take the call, read what was freed")
    arguments = example(name)
    for which, value in tensors_of(arguments).items():
        tensors = {key: t.clone().requires_grad_(requires_grad) for key, t in tensors_of(arguments).items()}
        tensors[which] = freed(value, offset).requires_grad_(requires_grad)
        with pytest.raises(RuntimeError, match=r"^mvkernels: the storage of a tensor has been freed"):
            call(name, arguments, tensors, backend=backend)


@pytest.mark.parametrize("name", [param for param in CPP if OPS[param.values[0]].has_backward("cpp")])
def test_a_storage_that_is_freed_before_the_backward(name):
    arguments = example(name)
    for which, value in tensors_of(arguments).items():
        tensors = {key: t.clone().requires_grad_() for key, t in tensors_of(arguments).items()}
        out = call(name, arguments, tensors, backend="cpp")
        tensors[which].untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="storage of a tensor has been freed"):
            out.sum().backward()
        # and comes again: fully_shard does so
        tensors[which].untyped_storage().resize_(value.numel() * value.element_size())
        with torch.no_grad():
            tensors[which].copy_(value)


@pytest.mark.parametrize("name", CPP)
def test_an_empty_batch_has_no_storage_to_miss(name):
    arguments = example(name, batch=1)
    tensors = {key: t[:0].clone() if t.shape[0] == 1 else t for key, t in tensors_of(arguments).items()}
    assert call(name, arguments, tensors, backend="cpp").shape[0] == 0
