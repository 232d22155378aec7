"""Fused exports: this library's ops as nodes of an ONNX graph, run by ONNX Runtime with the library of custom ops."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mvkernels
import mvmodels
from mvkernels import export, swap, testing
from mvkernels.commands import cli
from mvkernels.dispatch import extension
from mvkernels.dispatch.exporting import keep_in_exports
from mvkernels.dispatch.registry import OPS
from mvkernels.export import nodes, targets
from mvkernels.report import UsageError
from tests.ops.bridges import INSTRUCTION_SETS, assert_ok
from tests.swap.conftest import randomise, timm_block, transformers_block

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(extension.module is None, reason="the C++ kernels are not built")

if extension.module is not None:
    from tests.export.onnx_nodes import model_of, poisoned, session, through_onnx

OP_NAMES = list(nodes.NODES)


@st.composite
def maps(draw: Any, shape: tuple[int, ...], slot: int) -> Tensor:
    """A map (B, heads, dim, H, W) as a view of a larger tensor, as models have it, or of none that a node can read."""
    b, heads, dim, height, width = shape
    channels = heads * dim
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size = draw(st.sampled_from([0.1, 1.0, 30.0]))

    def normal(*sizes: int) -> Tensor:
        return size * torch.randn(sizes, generator=generator)

    kind = draw(st.sampled_from(["last", "last", "first", "interleaved", "transposed", "constant"]))
    if kind == "last":
        packed = normal(b, height, width, (slot + 1) * channels + draw(st.integers(0, 3)))
        rows = packed[..., slot * channels : (slot + 1) * channels]
        return rows.unflatten(-1, (heads, dim)).permute(0, 3, 4, 1, 2)
    if kind == "first":
        packed = normal(b, (slot + 1) * channels + draw(st.integers(0, 3)), height, width)
        return packed[:, slot * channels : (slot + 1) * channels].unflatten(1, (heads, dim))
    if kind == "interleaved":  # dims outside, heads inside
        return normal(b, height, width, channels).unflatten(-1, (dim, heads)).permute(0, 4, 3, 1, 2)
    if kind == "transposed":
        return normal(b, heads, dim, width, height).transpose(3, 4)
    return torch.full((b, heads, dim, height, width), size)


@st.composite
def problems(draw: Any) -> tuple[str, dict[str, Any]]:
    """An op, and arguments of its own."""
    op = draw(st.sampled_from(OP_NAMES))
    b, heads, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(0)
    shape = (b, heads, dim, height, width)
    if op in ("patch_attention", "window_attention"):
        wide = draw(st.integers(1, 20))
        arguments = {"query": draw(maps(shape, 0)), "key": draw(maps(shape, 1))}
        arguments["value"] = draw(maps((b, heads, wide, height, width), 2))
        if op == "window_attention":
            window = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
            arguments |= {"window_size": window, "shift": tuple(draw(st.integers(0, n - 1)) for n in window)}
            tokens = window[0] * window[1]
        else:
            fits = [st.sampled_from([n for n in range(1, size + 1) if size % n == 0]) for size in (height, width)]
            arguments["patch_size"] = draw(st.tuples(*fits))
            tokens = (height // arguments["patch_size"][0]) * (width // arguments["patch_size"][1])
        arguments["bias"] = torch.randn(heads, tokens, tokens, generator=generator) if draw(st.booleans()) else None
        arguments["scale"] = draw(st.sampled_from([0.25, 1.0]))
    elif op == "relu_linear_attention":
        arguments = {name: draw(maps(shape, slot)) for slot, name in enumerate(("query", "key", "value"))}
        arguments["eps"] = draw(st.sampled_from([1.0, 1e-3]))
    elif op == "multiscale_linear_attention":
        channels = 3 * heads * dim
        layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
        qkv = torch.randn(b, channels, height, width, generator=generator).contiguous(memory_format=layout)
        sides = draw(st.lists(st.sampled_from([1, 3, 5]), max_size=2))
        arguments = {"qkv": qkv, "head_dim": dim, "eps": 1.0}
        arguments["depthwise"] = [torch.randn(channels, 1, k, k, generator=generator) / k for k in sides]
        arguments["pointwise"] = [torch.randn(channels, dim, 1, 1, generator=generator) / dim for _ in sides]
        for name in ("depthwise_bias", "pointwise_bias"):
            some = [torch.randn(channels, generator=generator) if draw(st.booleans()) else None for _ in sides]
            arguments[name] = some if any(one is not None for one in some) else None
    else:
        tokens = [torch.randn(b, heads, draw(st.integers(1, 7)), dim, generator=generator)]
        x = draw(maps(shape, 0))
        if op == "mobile_to_former":
            arguments = {"query": tokens[0], "x": x, "scale": 0.5}
        else:
            value = torch.randn(tokens[0].shape, generator=generator)
            arguments = {"x": x, "key": tokens[0], "value": value, "scale": 0.5, "residual": draw(st.booleans())}
    return op, arguments


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), threads=st.sampled_from([1, 2]))
def test_values_of_every_op(instruction_set: str, problem: tuple[str, dict[str, Any]], threads: int) -> None:
    """On poisoned buffers, from views of all kinds, against float64."""
    op, arguments = problem
    with poisoned(instruction_set):
        assert_ok(testing.check(OPS[op], arguments, "cpp", backward=False, function=through_onnx(op, threads)))


@pytest.mark.parametrize("name", OP_NAMES)
def test_the_shapes_of_the_suite(name: str) -> None:
    """The suite's shapes too: the work of several threads, copies of scattered maps, wide heads."""
    op = OPS[name]
    for case in op.suite("small")[:3]:
        for layout in case.layouts:
            arguments = {k: v for k, v in case.make(layout=layout).items() if k in op_parameters(name)}
            with poisoned():
                assert_ok(testing.check(op, arguments, "cpp", backward=False, function=through_onnx(name, 2)))


def op_parameters(name: str) -> set[str]:
    import inspect

    return set(inspect.signature(OPS[name].check).parameters)


ROWS = torch.randn(2, 6, 8, 3 * 8, generator=torch.Generator().manual_seed(0)).numpy()
ATTRIBUTES = {
    "query": [1, 2, 4, 0, 4, 1], "key": [1, 2, 4, 8, 4, 1], "value": [1, 2, 4, 16, 4, 1],
    "patch_height": 2, "patch_width": 2, "scale": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": [1, 2, 4, 17, 4, 1]}, "channels that its tensor has not"),
        ({"query": [1, 2, 4, -1, 4, 1]}, "query is out of range"),
        ({"query": [1, 2, 4, 0, 1 << 40, 1]}, "query is out of range"),
        ({"key": [1, 2, 4, 0, 4]}, "key has not six integers"),
        ({"key": [1, 2, 3, 0, 4, 1]}, "do not fit"),
        ({"patch_height": 0}, "patch_size is less than 1"),
        ({"patch_height": None}, "patch_height is missing"),
        ({"scale": None}, "scale is missing"),
        ({"query": [0, 2, 3, 0, 3, 1], "patch_height": 1}, "do not fit"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    """In one line, and nothing outside of its tensors is read."""
    attributes = {name: value for name, value in {**ATTRIBUTES, **change}.items() if value is not None}
    with pytest.raises(Exception, match=message) as raised:
        session(model_of("patch_attention", {"qkv": ROWS}, ["qkv"] * 3, attributes)).run(None, {"qkv": ROWS})
    assert "mvkernels: patch_attention: " in str(raised.value)


def test_a_batch_of_nothing() -> None:
    empty = ROWS[:0]
    (out,) = session(model_of("patch_attention", {"qkv": empty}, ["qkv"] * 3, ATTRIBUTES)).run(None, {"qkv": empty})
    assert out.shape == (0, 6, 8, 8)


def test_other_ranks_and_biases_are_refused() -> None:
    flat = ROWS.reshape(2, 48, 24)
    with pytest.raises(Exception, match="not a tensor of four axes"):
        session(model_of("patch_attention", {"qkv": flat}, ["qkv"] * 3, ATTRIBUTES)).run(None, {"qkv": flat})
    bias = ROWS[0, :2, :8, :8].copy()
    inputs = {"qkv": ROWS, "bias": bias}
    with pytest.raises(Exception, match="bias does not fit"):
        session(model_of("patch_attention", inputs, ["qkv"] * 3 + ["bias"], ATTRIBUTES)).run(None, inputs)


def test_a_session_in_several_threads() -> None:
    """Each call has its own memory and its own result."""
    run = session(model_of("patch_attention", {"qkv": ROWS}, ["qkv"] * 3, ATTRIBUTES), threads=2).run
    (expected,) = run(None, {"qkv": ROWS})
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for (found,) in pool.map(lambda _: run(None, {"qkv": ROWS}), range(64)):
            assert (found == expected).all()


def test_the_library_needs_neither_python_nor_torch() -> None:
    needed = subprocess.run(
        ["readelf", "-d", export.onnxruntime_library()], capture_output=True, text=True, check=True
    ).stdout
    libraries = [line.split("[")[1].rstrip("]\n") for line in needed.splitlines() if "(NEEDED)" in line]
    assert libraries
    assert {name.partition(".so")[0] for name in libraries} <= {
        "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64", "libpthread",
    }  # fmt: skip


def test_an_instruction_set_that_is_not_there() -> None:
    code = (
        "from mvkernels.export import onnxruntime_library\nimport onnxruntime\n"
        "onnxruntime.SessionOptions().register_custom_ops_library(onnxruntime_library())"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import os, mvkernels\nos.environ['MVKERNELS_CPU_ISA'] = 'sse9'\n{code}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode and "MVKERNELS_CPU_ISA" in done.stderr


# ---- models ----


def domains(path: Path) -> dict[str, int]:
    """How many nodes of each domain a file has."""
    found: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        found[node.domain] = found.get(node.domain, 0) + 1
    return found


def permutations(path: Path) -> int:
    return sum(node.op_type == "Transpose" for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", ["transformers", "timm"])
def test_a_block_keeps_its_attention(family: str, dynamic: bool, tmp_path: Path) -> None:
    """A node a layer that reads queries, keys and values where the product left them, for sizes that the patch does
    not divide as well."""
    block = timm_block() if family == "timm" else transformers_block()
    channels = next(m.in_channels for m in block.modules() if isinstance(m, nn.Conv2d))
    image = torch.rand(2, channels, 12, 14, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "block.onnx"
    found = export.export_model(block, image, "onnx", path, fused=True, dynamic=dynamic)
    layers = sum(type(m).__name__ in ("Block", "MobileViTTransformerLayer") for m in block.modules())
    assert found.ok and found.details["fused_nodes"] == layers == domains(path)[nodes.DOMAIN] > 0
    (first, *_) = (n for n in onnx.load(path).graph.node if n.domain == nodes.DOMAIN)
    assert len(set(first.input)) == 1  # one product


@pytest.mark.parametrize("name", ["mobile_former_26m", "efficientvit_b0"])
def test_models_of_other_ops(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(mvmodels.create_model(name))
    path = tmp_path / "model.onnx"
    found = export.export_model(model, torch.rand(2, 3, 64, 96), "onnx", path, fused=True, dynamic=True)
    assert found.ok and domains(path)[nodes.DOMAIN] == found.details["fused_nodes"] > 3


def test_windows_with_biases(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=4, num_classes=5
    )
    found = export.export_model(randomise(model), torch.rand(1, 3, 32, 32), "onnx", tmp_path / "m.onnx", fused=True)
    assert found.ok and found.details["fused_nodes"] == 2


def test_without_fused_no_node_is_of_this_library(tmp_path: Path) -> None:
    """The default, also after a fused export in the same process."""
    model, image = timm_block(), torch.rand(1, 12, 8, 8)
    export.export_model(model, image, "onnx", tmp_path / "fused.onnx", fused=True)
    plain = export.export_model(model, image, "onnx", tmp_path / "plain.onnx")
    assert plain.ok and set(domains(tmp_path / "plain.onnx")) == {""} and "fused_nodes" not in plain.details


def test_what_a_call_asks_for_is_kept(tmp_path: Path) -> None:
    """An op whose call asks for the reference is exported as that."""

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(1, (2, -1))
            fused = mvkernels.patch_attention(q, q, q, 2)
            return (fused + mvkernels.patch_attention(q, q, q, 1, backend="reference")).flatten(1, 2)

    found = export.export_model(Both(), torch.rand(1, 8, 4, 6), "onnx", tmp_path / "both.onnx", fused=True)
    assert found.ok and found.details["fused_nodes"] == 1


def test_one_op_reads_what_another_wrote(tmp_path: Path) -> None:
    class Chain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.permute(0, 2, 3, 1).contiguous().unflatten(-1, (2, -1)).permute(0, 3, 4, 1, 2)
            first = mvkernels.patch_attention(q, q, q, 2)
            second = mvkernels.window_attention(first, q, first, 2, shift=1)
            return mvkernels.relu_linear_attention(second, first, q, eps=1.0).flatten(1, 2)

    found = export.export_model(Chain(), torch.rand(1, 8, 4, 6), "onnx", tmp_path / "chain.onnx", fused=True)
    assert found.ok and found.details["fused_nodes"] == 3


def test_the_operators_alone_are_kept() -> None:
    """What is asked for, in this thread, and nothing after it."""
    model, image = timm_block(), torch.rand(1, 12, 8, 8)
    swap(model)
    with keep_in_exports("patch_attention"):
        kept = export.program(model, image)
    operators = [str(n.target) for n in kept.graph.nodes if "mvkernels" in str(n.target)]
    assert operators and all("patch_attention_forward" in name for name in operators)
    assert not any("mvkernels" in str(n.target) for n in export.program(model, image).graph.nodes)


@pytest.mark.parametrize("target", ["torch", "openvino", "coreml"])
def test_other_targets_have_no_such_ops(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "transformers:mobilevit_xxs", "--to", target, "--fused"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "has no ops of this library" in err and "onnx" in err


def test_an_installation_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(targets, "__file__", str(tmp_path / "export" / "targets.py"))
    with pytest.raises(UsageError, match="it has no kernels"):
        export.require("onnx", fused=True)


def test_the_command_names_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "transformers:mobilevit_xxs", "--to", "onnx", "--fused", "--size", "64"]) == 0
    out, _ = capsys.readouterr()
    assert "9 nodes of mvkernels" in out and export.onnxruntime_library() in out
    assert permutations(tmp_path / "mobilevit_xxs-fused.onnx") < 12
