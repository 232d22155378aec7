"""Ops called by several threads at once, and in a process forked from one that has used them."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mvkernels
from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from tests.ops.test_contract_all import NATIVE, example, tensors_of


def gradients(name, backend, seed=0):
    """The output of an op and all its gradients, if it has them, for inputs of this seed's scale."""
    arguments = example(name, size=(12, 10))
    given = {key: (value * (1 + seed)).detach() for key, value in tensors_of(arguments).items()}
    for value in given.values():
        value.requires_grad_(OPS[name].has_backward(backend))
    out = OPS[name].function(**testing.with_tensors(arguments, given), backend=backend)
    if not out.requires_grad:
        return [out]
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
            return [mvkernels.dispatch.backend.requested(None) for _ in range(200)], mvkernels.patch_attention(x, x, x)

    with ThreadPoolExecutor(2) as pool:
        for name, (seen, _) in zip(("reference", "auto"), pool.map(chosen, ("reference", "auto"))):
            assert set(seen) == {name}
    assert mvkernels.dispatch.backend.requested(None) == "auto" or os.environ.get("MVKERNELS_BACKEND")


def _forked(sender, names, threads):
    if threads is not None:
        torch.set_num_threads(threads)
    sender.send([[v.numpy() for v in gradients(name, backend)] for name, backend in names])
    sender.close()
    os._exit(0)


RUN = [p.values for p in NATIVE if not any(m.name == "skipif" and m.args[0] for m in p.marks)]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def threads(request):
    """PyTorch on so many threads, and its pool of them begun."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.randn(1 << 20).relu()
    for name in RUN:
        gradients(*name)
    yield request.param
    torch.set_num_threads(before)


@forks
@pytest.mark.parametrize(("threads", "of_child"), [(1, None), (2, 1)], indirect=["threads"])
def test_a_fork_of_a_process_that_used_the_kernels(threads, of_child):
    """From one thread it just runs. From several, GNU OpenMP hangs unless the child asks for one thread first."""
    torch.set_num_threads(1)
    names, wanted = RUN, [gradients(*name) for name in RUN]
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(False)
    child = context.Process(target=_forked, args=(sender, names, of_child), daemon=True)
    child.start()
    assert receiver.poll(60), "the fork hangs"
    for values, expected in zip(receiver.recv(), wanted):
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(values, expected))
    child.join(10)
    assert child.exitcode == 0


class Forwards(torch.utils.data.Dataset):
    """An op's output, computed where it is asked for."""

    def __len__(self):
        return len(RUN)

    def __getitem__(self, index):
        return [value.clone() for value in gradients(*RUN[index])]


@forks
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_workers_of_a_data_loader_beside_several_threads(threads):
    torch.set_num_threads(1)
    wanted = [gradients(*name) for name in RUN]
    torch.set_num_threads(threads)
    found = torch.utils.data.DataLoader(
        Forwards(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork"
    )
    for values, expected in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
