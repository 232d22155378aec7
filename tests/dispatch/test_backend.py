"""Choosing a backend, and saying why."""

import logging
import threading

import pytest
import torch

import mvkernels
from mvkernels.dispatch import backend as backends
from mvkernels.dispatch import extension
from mvkernels.dispatch.registry import OPS

needs_cpp = pytest.mark.skipif(extension.module is None, reason=extension.reason)
OP = OPS["patch_attention"]


@pytest.fixture
def arguments(monkeypatch):
    monkeypatch.delenv("MVKERNELS_BACKEND", raising=False)
    q = torch.randn(1, 1, 4, 4, 4)
    return OP.check(q, q, q)


@needs_cpp
def test_precedence(arguments, monkeypatch):
    assert backends.choose(OP, None, arguments) == "cpp"
    monkeypatch.setenv("MVKERNELS_BACKEND", "Reference ")
    assert backends.choose(OP, None, arguments) == "reference"
    with mvkernels.use_backend("cpp"):
        assert backends.choose(OP, None, arguments) == "cpp"
        assert backends.choose(OP, "reference", arguments) == "reference"
        with mvkernels.use_backend("reference"):
            assert backends.choose(OP, None, arguments) == "reference"
        assert backends.choose(OP, None, arguments) == "cpp"
    assert backends.choose(OP, None, arguments) == "reference"


def test_use_backend_is_of_its_thread_and_ends_with_an_exception(arguments):
    seen = []
    with pytest.raises(KeyError), mvkernels.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested(None)))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == ["auto"]
    assert backends.requested(None) == "auto"


@pytest.mark.parametrize("name", ["gpu", "", "CPP", 3, "auto "])
def test_unknown_names(name, arguments, monkeypatch):
    with pytest.raises(ValueError, match="want one of auto, reference, cpp, triton, cuda"):
        backends.choose(OP, name, arguments)
    with pytest.raises(ValueError), mvkernels.use_backend(name):
        pass
    if name == "gpu":
        monkeypatch.setenv("MVKERNELS_BACKEND", name)
        with pytest.raises(ValueError, match="MVKERNELS_BACKEND is 'gpu'"):
            mvkernels.patch_attention(*arguments[:3])


def test_a_named_backend_that_cannot_run_says_why(arguments):
    q = arguments[0]
    with pytest.raises(mvkernels.BackendUnavailable, match="no cuda kernel") as caught:
        mvkernels.mobile_to_former(q[:, :, :, 0].mT, q, backend="cuda")
    assert isinstance(caught.value, RuntimeError)
    meta = q.to("meta")
    with pytest.raises(mvkernels.BackendUnavailable):
        mvkernels.patch_attention(meta, meta, meta, backend="cpp")


@pytest.mark.parametrize(
    "call",
    [
        (),
        ("patch_attention",),
        ("patch_attention", "cpp"),
        ("patch_attention", "cpp", 1, 2, 3),
        ("patch_attention", "nope", None),
        ("nope", "cpp"),
        (None, None),
        ([], {}),
    ],
)
def test_can_run_never_raises_for_what_a_call_can_be(call):
    runs, reason = mvkernels.can_run(*call)
    assert runs is False and isinstance(reason, str) and reason


def test_can_run_says_what_the_call_does(arguments):
    q = arguments[0]
    assert mvkernels.can_run("patch_attention", "reference", q, q, q, 2, scale=0.5) == (True, "")
    assert mvkernels.can_run("patch_attention", "reference", q, q, q, backend="cpp") == (True, "")
    assert mvkernels.can_run("patch_attention", backend="reference", query=q, key=q, value=q) == (True, "")
    for name in backends.BACKENDS:
        runs, reason = mvkernels.can_run("patch_attention", name, q, q, q)
        assert runs == (not reason)
        if runs:
            mvkernels.patch_attention(q, q, q, backend=name)
        else:
            with pytest.raises(mvkernels.BackendUnavailable):
                mvkernels.patch_attention(q, q, q, backend=name)


def test_a_fall_back_is_logged_once(arguments, monkeypatch, caplog):
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "reason", "no extension in this test")
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="mvkernels"):
        for _ in range(3):
            assert backends.choose(OP, None, arguments) == "reference"
    said = "patch_attention: backend cpp cannot run this: no extension in this test"
    assert [r.getMessage() for r in caplog.records] == [said]


def test_use_backend_under_compile():
    torch._dynamo.reset()
    q = torch.randn(1, 1, 4, 4, 4)
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda q: mvkernels.patch_attention(q, q, q), backend=keep, fullgraph=True)
    with mvkernels.use_backend("reference"):
        compiled(q)
    compiled(q)
    assert "mvkernels_" not in graphs[0]
    if extension.module is not None:
        assert len(graphs) == 2 and "mvkernels_cpp" in graphs[1]


def test_use_backend_inside_a_compiled_function(arguments):
    torch._dynamo.reset()
    q = arguments[0]

    def chosen(q):
        with mvkernels.use_backend("reference"):
            return mvkernels.patch_attention(q, q, q)

    plain = torch.compile(lambda q: mvkernels.patch_attention(q, q, q), backend="eager", fullgraph=True)
    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    for _ in range(2):  # what the first call leaves behind is what the second one is guarded by
        torch.testing.assert_close(compiled(q), plain(q))
    with mvkernels.use_backend("reference"):
        compiled(q)
        assert backends.requested(None) == "reference"
    assert backends.requested(None) == "auto"
