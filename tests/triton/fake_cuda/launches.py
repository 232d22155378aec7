"""Launches over a libcuda that does nothing: prints, as JSON, what each check found. test_launch_cost.py runs it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher

from mvkernels.ops.mobile_to_former.triton import launcher as mobile_to_former
from mvkernels.ops.multiscale_linear_attention.triton import launcher as multiscale_linear_attention
from mvkernels.ops.patch_attention.triton import launcher as patch_attention
from mvkernels.ops.patch_transformer_layer.triton import launcher as patch_transformer_layer
from mvkernels.ops.relu_linear_attention.triton import launcher as relu_linear_attention
from mvkernels.triton import configs
from mvkernels.triton.launch import Launch
from mvkernels.triton.repeated import OPTIONS
from tests.devices import PRETENDED
from tests.triton.fake_cuda.driver import pretend

# From here on CPU tensors are this GPU's.
FAKE = pretend("sm_90")
configs.device_of = lambda *place: PRETENDED["sm_90"]


Call = tuple[Launch, dict[str, torch.Tensor], dict[str, float]]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def maps(heads: int, head_dim: int, side: int) -> list[torch.Tensor]:
    packed = random(1, side, side, 3 * heads * head_dim)
    return [part.unflatten(-1, (heads, head_dim)).permute(0, 3, 4, 1, 2) for part in packed.chunk(3, dim=-1)]


def calls() -> dict[str, Callable[[], Any]]:
    """Kernels of each op that has its own way to launch, by name."""
    q, k, v = maps(4, 36, 32)
    a, b, c = maps(4, 32, 16)
    scales = random(1, 384, 16, 16).to(memory_format=torch.channels_last)
    weights = [random(384, 1, 5, 5)], [random(384, 32, 1, 1)], 32, [None], [None], 1e-6
    out, sums = scales.new_empty((1, 256, 16, 16)), torch.empty((2, 1, 4, 33, 32))
    tokens, pixels = random(1, 2, 6, 32), random(1, 14, 14, 64).unflatten(-1, (2, 32)).permute(0, 3, 4, 1, 2)
    d = 144
    layer = [random(1, d, 32, 32).to(memory_format=torch.channels_last)]
    layer += [random(*size) for size in ((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (2 * d, d),
                                         (2 * d,), (d, 2 * d), (d,))]  # fmt: skip
    return {
        "patch_attention": lambda: patch_attention.forward(q, k, v, 2, 2, None, 36**-0.5),
        "relu_linear_attention": lambda: relu_linear_attention.forward(a, b, c, 1e-6),
        "multiscale_linear_attention": lambda: multiscale_linear_attention.forward(scales, *weights),
        "multiscale_linear_attention backward": lambda: multiscale_linear_attention.backward(
            out, scales, sums, *weights, True
        ),
        "mobile_to_former": lambda: mobile_to_former.forward(tokens, pixels, 0.2),
        "patch_transformer_layer": lambda: patch_transformer_layer.forward(
            *layer, 4, 2, 2, 1e-5, 36**-0.5, False
        ),
    }  # fmt: skip


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def recorded(call: Callable[[], Any]) -> list[Call]:
    """The launches of a call."""
    found: list[Call] = []

    def make(before: Any) -> Any:
        def launched(self: Launch, tensors: dict[str, torch.Tensor], floats: dict[str, float]) -> None:
            found.append((self, dict(tensors), floats))
            before(self, tensors, floats)

        return launched

    with replaced(Launch, "__call__", make):
        call()
    return found


class Watch:
    """What reached the compiled kernels' launchers, and how often Triton's own path was taken."""

    def __init__(self) -> None:
        self.arguments: list[tuple[Any, ...]] = []
        self.by_triton = 0

    @contextmanager
    def __call__(self) -> Iterator[Watch]:
        self.arguments, self.by_triton = [], 0

        def launcher(before: Any) -> Any:
            def launched(compiled: Any, *arguments: Any) -> None:
                self.arguments.append(arguments)
                before(compiled, *arguments)

            return launched

        def run(before: Any) -> Any:
            def counted(kernel: Any, *arguments: Any, **named: Any) -> Any:
                self.by_triton += 1
                return before(kernel, *arguments, **named)

            return counted

        with replaced(CudaLauncher, "__call__", launcher), replaced(triton.JITFunction, "run", run):
            yield self


watch = Watch()


def launched(call: Call) -> tuple[int, int]:
    """(launches through Triton's path: 0 or 1; the kernel's function)."""
    each, tensors, floats = call
    with watch():
        each(tensors, floats)
    return watch.by_triton, watch.arguments[-1][4]


def by_triton(call: Call) -> Any:
    each, tensors, floats = call
    return each.kernel[(each.grid,)](
        *[tensors[name] for name in each.pointers],
        *[floats[name] for name in each.floats],
        *each.ints,
        **each.meta,
        **(OPTIONS | each.options),
    )


def differences(call: Call) -> list[str]:
    """Where the arguments of the compiled kernel's launcher are not those of Triton's path."""
    taken, _ = launched(call)
    kept = watch.arguments[-1]
    with watch():
        by_triton(call)
    theirs = watch.arguments[-1]
    found = ["Triton's path was taken"] if taken else []
    if len(kept) != len(theirs):
        return [*found, f"{len(kept)} arguments, not {len(theirs)}"]
    # Between these and the kernel's own: metadata for hooks, and the hooks, of which there are none.
    for index in (*range(6), *range(9, len(kept))):
        mine, other = kept[index], theirs[index]
        same = mine is other or (type(mine) is type(other) and not isinstance(mine, torch.Tensor) and mine == other)
        if not same:
            found.append(f"argument {index}: {mine!r}, not {other!r}")
    return found


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same, beginning beside a multiple of 16 bytes."""
    storage = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size() + 1, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), 1)


def with_hooks(call: Call) -> dict[str, Any]:
    seen: list[str] = []
    found: dict[str, Any] = {}
    for name in ("launch_enter_hook", "launch_exit_hook"):

        def hook(metadata: Any) -> None:
            seen.append(metadata.get()["name"] if metadata else "")

        before = getattr(knobs.runtime, name)
        if hasattr(before, "add"):
            before.add(hook)
        else:
            setattr(knobs.runtime, name, hook)
        try:
            found[name] = (launched(call)[0], len(seen))
        finally:
            if hasattr(before, "remove"):
                before.remove(hook)
            else:
                setattr(knobs.runtime, name, before)
    found["afterwards"] = launched(call)[0], len(seen)
    return found


def after_changes(call: Call) -> dict[str, list[int]]:
    """Triton's path is taken (1) after what may change the compiled kernel, and not again (0)."""
    kernel, found = call[0].kernel, {}
    before = knobs.runtime.debug
    knobs.runtime.debug = True
    try:
        found["debug"] = [launched(call)[0] for _ in range(2)]
    finally:
        knobs.runtime.debug = before
    found["debug again off"] = [launched(call)[0]]
    kernel.device_caches.clear()
    found["caches emptied"] = [launched(call)[0] for _ in range(2)]
    source = kernel.src
    kernel._unsafe_update_src(source + "\n    pass\n")
    kernel.device_caches.clear()
    try:
        found["source"] = [launched(call)[0] for _ in range(2)]
    finally:
        kernel._unsafe_update_src(source)
        kernel.device_caches.clear()
    found["source again"] = [launched(call)[0] for _ in range(2)]
    called: list[int] = []
    kernel.add_pre_run_hook(lambda *arguments, **named: called.append(1))
    found["pre-run hook"] = [launched(call)[0], len(called)]
    kernel.pre_run_hooks.clear()
    found["no pre-run hook"] = [launched(call)[0]]
    return found


def changed_global(call: Call) -> str:
    """What Triton raises for a kernel one of whose global values has changed."""
    _, (_, values) = next(item for item in call[0].kernel.used_global_vals.items())
    name = next(iter(call[0].kernel.used_global_vals))[0]
    before = values[name]
    values[name] = triton.language.constexpr(-1)
    try:
        launched(call)
    except RuntimeError as error:
        return str(error)
    finally:
        values[name] = before
    return ""


def other_device(call: Call) -> dict[str, Any]:
    function = launched(call)[1]
    FAKE.device = 1
    try:
        first, second = launched(call), launched(call)
        stream = watch.arguments[-1][3]
    finally:
        FAKE.device = 0
    back = launched(call)
    return {
        "taken": [first[0], second[0], back[0]],
        "own": first[1] == second[1] != function == back[1],
        "streams": [stream, watch.arguments[-1][3]],
    }


def microseconds(call: Callable[[], Any], repeats: int = 30, number: int = 50) -> float:
    """CPU time of a call, the least of several."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        for _ in range(number):
            call()
        best = min(best, time.thread_time() - begin)
    return best / number * 1e6


def main() -> None:
    torch.set_num_threads(1)
    every = calls()
    launches = {name: recorded(call) for name, call in every.items()}
    found: dict[str, Any] = {}
    found["differences"] = {name: [differences(one) for one in each] for name, each in launches.items()}
    found["new tensors"] = {}
    for name, call in every.items():
        with watch():
            call()
        found["new tensors"][name] = watch.by_triton

    one = launches["patch_attention"][0]
    each, tensors, floats = one
    aligned = launched(one)
    moved = (each, tensors | {"q": shifted(tensors["q"])}, floats)
    first, second, back = launched(moved), launched(moved), launched(one)
    found["misaligned"] = {
        "taken": [first[0], second[0], back[0]],
        "own": first[1] == second[1] != aligned[1] == back[1],
        "differences": differences(moved),
    }
    other = (each, tensors | {"bias": tensors["bias"].to(torch.float16)}, floats)
    found["dtype"] = [launched(other)[0], launched(other)[0], launched(one)[0]]
    whole = (each, tensors, {"scale2": 1})
    found["int for a float"] = [launched(whole)[0], launched(whole)[0]]
    found["hooks"] = with_hooks(one)
    found["device"] = other_device(one)
    found["changes"] = after_changes(one)
    found["global"] = changed_global(one)
    found["launch"] = {"arguments": len(each.kernel.arg_names), "us": microseconds(lambda: each(tensors, floats)),
                       "triton_us": microseconds(lambda: by_triton(one))}  # fmt: skip
    found["calls"] = {name: microseconds(call) for name, call in every.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
