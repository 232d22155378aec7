import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch

# pytest-xdist already gives each core a process. On a busy machine a second thread in each would wait for a time slice
# at every barrier; the tests of threading ask for theirs.
torch.set_num_threads(1)

# A machine that is busy or emulated is slow at drawing examples too; that is no fault of a test.
hypothesis.settings.register_profile("slow machines", suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("slow machines")

# On a GPU all is tested twice: with PyTorch's own products, which ours are compared with, in float32 and in tf32.
torch.backends.cuda.matmul.allow_tf32 = os.environ.get("MVKERNELS_TEST_TF32") == "1"


def _operators_load() -> bool:
    """Whether torchvision's compiled operators fit this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    libraries = list(Path(spec.origin).parent.glob("_C*.*"))
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return bool(libraries)


# timm and transformers import torchvision where it is installed, and that import fails if the compiled operators do
# not load, unless these two are known. The name keeps the definitions: they go when the Library is collected.
if not _operators_load():
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _products_alike() -> None:
    """Let a product in Triton's interpreter and that of its transposes have the same bits, as on a GPU.

    Kernels rely on it: they make scores again, with keys for rows. NumPy's product of float32 sums in an order of its
    own for each, on some processors; summed in float64 the order leaves no trace.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _comparisons_are_bool() -> None:
    """Let the interpreter know what a comparison of scalars gives as bool, as the compiler does.

    It keeps the type of what was compared, and makes a tile of that type if a tile is masked by the scalar. From
    Triton 3.9 on its loads and stores refuse such a mask.
    """
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    binary_op = interpreter.InterpreterBuilder.binary_op

    def with_bool(self, lhs, rhs, op):  # type: ignore[no-untyped-def]
        result = binary_op(self, lhs, rhs, op)
        return interpreter.TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    interpreter.InterpreterBuilder.binary_op = with_bool


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _products_alike()
    _comparisons_are_bool()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-a-file",
        action="store_true",
        help="of each file the first test marked `core`, else its first that is quick",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--one-a-file"):
        return
    chosen: dict[Path, pytest.Item] = {}
    for item in items:
        known = chosen.get(item.path)
        if not item.get_closest_marker("slow") and (
            known is None or (item.get_closest_marker("core") and not known.get_closest_marker("core"))
        ):
            chosen[item.path] = item
    keep = set(chosen.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = [item for item in items if item in keep]
