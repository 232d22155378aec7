"""Ops called by several threads at once, and in a process forked from one that has used them."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mvkernels
from mvkernels.registry import OPS
from tests.ops.test_contract_all import NATIVE, example, tensors_of


def gradients(name, backend, seed=0):
    """The output of an op and all its gradients, for inputs of this seed's scale."""
    arguments = example(name, size=(12, 10))
    given = {key: (value * (1 + seed)).detach().requires_grad_() for key, value in tensors_of(arguments).items()}
    out = OPS[name].function(**(arguments | given), backend=backend)
    grads = torch.autograd.grad(out.square().sum(), list(given.values()), allow_unused=True)
    return [out.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize(("name", "backend"), NATIVE)
def test_threads_that_call_at_once_get_what_one_gets(name, backend):
    wanted = [gradients(name, backend, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: gradients(name, backend, seed), [0, 1, 2, 3] * 5))
    for number, values in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(values, wanted[number % 4]))


def test_each_thread_has_its_own_backend():
    x = torch.randn(1, 2, 4, 6, 6)

    def chosen(name):
        with mvkernels.use_backend(name):
            return [mvkernels.backend.requested(None) for _ in range(200)], mvkernels.patch_attention(x, x, x)

    with ThreadPoolExecutor(2) as pool:
        for name, (seen, _) in zip(("reference", "auto"), pool.map(chosen, ("reference", "auto"))):
            assert set(seen) == {name}
    assert mvkernels.backend.requested(None) == "auto" or os.environ.get("MVKERNELS_BACKEND")


def _forked(sender, names):
    sender.send([[v.numpy() for v in gradients(name, backend)] for name, backend in names])
    sender.close()
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_of_a_process_that_used_the_kernels():
    """As the workers of a data loader are."""
    names = [p.values for p in NATIVE if not any(m.name == "skipif" and m.args[0] for m in p.marks)]
    wanted = [gradients(*name) for name in names]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    child = context.Process(target=_forked, args=(sender, names), daemon=True)
    child.start()
    assert receiver.poll(60), "the fork hangs"
    for values, expected in zip(receiver.recv(), wanted):
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(values, expected))
    child.join(10)
    assert child.exitcode == 0
