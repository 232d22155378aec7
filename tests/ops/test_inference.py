"""What all ops for inference keep to: the suite's shapes, gradients by the reference, other dtypes."""

import pytest
import torch

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import checks
from mvkernels.dispatch.registry import OPS
from tests.ops.bridges import assert_ok
from tests.ops.inference import NAMES, assert_takes_the_reference, full, needs_cpp, pack

CASES = [
    pytest.param(name, case, id=f"{name} {case.model} {case.label}")
    for name in NAMES
    for case in OPS[name].suite("full")
]
TENSORS = [(name, which) for name in NAMES for which in testing.tensors_in(full(name))]


@needs_cpp
@pytest.mark.parametrize(("name", "case"), CASES)
def test_cpp_on_the_suite(name, case):
    assert_ok(testing.check(OPS[name], case.make(), "cpp"))


@needs_cpp
@pytest.mark.parametrize(("name", "which"), TENSORS)
def test_a_recorded_gradient_is_the_references(name, which):
    op, arguments = OPS[name], full(name)
    tensors = testing.tensors_in(arguments)
    tensors[which] = tensors[which].clone().requires_grad_()
    recorded = testing.with_tensors(arguments, tensors)
    out = op.function(**recorded)
    (found,) = torch.autograd.grad(out.square().sum(), tensors[which])
    (wanted,) = torch.autograd.grad(op.reference(**recorded).square().sum(), tensors[which])
    assert torch.equal(found, wanted)
    assert not mvkernels.can_run(name, "cpp", **recorded)[0]
    with pytest.raises(
        mvkernels.BackendUnavailable, match="a gradient is recorded, and the C\\+\\+ kernel has no backward"
    ):
        op.function(**recorded, backend="cpp")
    kernel = op.function(**arguments, backend="cpp")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(op.function(**recorded), kernel)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_of_the_reference_are_right(name):
    arguments = full(name)
    found = testing.check(OPS[name], arguments, "reference")
    assert_ok(found)
    assert {each.name for each in found} == {"out", *(f"d{which}" for which in testing.tensors_in(arguments))}


@needs_cpp
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=checks.short)
def test_other_dtypes_take_the_reference(name, dtype):
    arguments = full(name)
    tensors = {key: value.to(dtype) for key, value in testing.tensors_in(arguments).items()}
    arguments = testing.with_tensors(arguments, tensors)
    assert_takes_the_reference(OPS[name], arguments, f"for float32, but these tensors are {checks.short(dtype)}")
    with pytest.raises(
        mvkernels.BackendUnavailable, match="weights cannot be packed: the C\\+\\+ kernel is for float32"
    ):
        pack(name, arguments)


@needs_cpp
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strides", testing.STRIDES)
def test_other_dtypes_lie_as_the_kernels_result_does(name, strides):
    arguments = full(name, kind=strides)
    doubles = {key: value.double() for key, value in testing.tensors_in(arguments).items()}
    doubles["x"] = testing.make_map(arguments["x"].shape, strides, torch.float64)
    found = OPS[name].function(**arguments, backend="cpp")
    assert found.stride() == OPS[name].function(**testing.with_tensors(arguments, doubles)).stride()
