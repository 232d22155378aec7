"""What depends most on the luck of PyTorch's rounding, as other processors see it."""

import pytest

from mvkernels.dispatch import extension
from tests.ops.bridges import INSTRUCTION_SETS, interpreter
from tests.processors import PROCESSORS, python


def run(processor, *tests):
    done = python(processor, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(extension.module is None, reason=extension.reason or "it loads")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_cpp_where_what_is_summed_cancels(processor):
    if processor not in INSTRUCTION_SETS:
        pytest.skip(f"no {processor} on this processor")
    run(processor, "tests/ops/test_patch_attention.py", "-m", "not interpreter", "-k", "values_with_a_mean")


@interpreter
@pytest.mark.parametrize("processor", PROCESSORS)
def test_triton_where_pytorch_is_lucky(processor):
    test = "tests/ops/test_patch_attention_triton.py::test_bias_and_its_gradient"
    run(processor, test, "-m", "interpreter", "-k", "shape1")
