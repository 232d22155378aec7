"""The floor of the criterion: what PyTorch is expected to err, on no machine in particular."""

import json

import pytest
import torch

from mvkernels import rounding, testing
from mvkernels.dispatch.registry import OPS
from mvkernels.rounding import ExpectedRounding
from tests.processors import python


def pixels(case):
    return case.shape["height"] * case.shape["width"]


def held(name, dtype=torch.float32):
    """The yardstick of an op on the smallest map of its suite."""
    op = OPS[name]
    arguments = testing.normalised(op, min(op.suite("small"), key=pixels).make(batch=2, dtype=dtype))
    # Drawn in float64: in float32 torch.randn differs between processors.
    generator = torch.Generator().manual_seed(0)
    for key, value in testing.tensors_in(arguments).items():
        spread = 1.0 if key in op.maps else value[0].numel() ** -0.5
        drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64) * spread
        arguments = testing.with_tensors(arguments, {key: torch.empty_like(value).copy_(drawn)})
    return testing.yardstick(op, arguments, list(testing.tensors_in(arguments)))[0]


def errors(yardstick):
    return {name: yardstick.expected_error(name) for name in yardstick.exact}


SUMS = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1) * x.shape[1],
    "product": lambda x: (x @ torch.ones(x.shape[1], 1))[:, 0],
    "addmm": lambda x: torch.addmm(torch.zeros(1), x, torch.ones(x.shape[1], 1))[:, 0],
    "convolution": lambda x: torch.conv1d(x[:, None], torch.ones(1, 1, x.shape[1]))[:, 0, 0],
    "softmax": lambda x: 1 / (x.log().softmax(1) / x)[:, 0],
}


@pytest.mark.parametrize(
    ("operation", "signs"),
    [(name, signs) for name in SUMS for signs in ("mixed", "alike") if (name, signs) != ("softmax", "mixed")],
)
@pytest.mark.parametrize("terms", [30, 500])
def test_a_sum_is_off_by_what_adding_up_one_after_the_other_leaves(terms, signs, operation):
    x = torch.randn(500, terms, generator=torch.Generator().manual_seed(terms))
    x = x.abs() + 0.1 if signs == "alike" else x
    added = x[:, 0].clone()
    for term in x.T[1:]:
        added += term
    exact = x.double().sum(1)
    with ExpectedRounding():
        expected = SUMS[operation](x)
    assert 0.5 < testing.rms_error(expected, exact) / testing.rms_error(added, exact) < 2


@pytest.mark.parametrize("operation", ["sum", "product", "addmm", "convolution"])
def test_a_sum_of_one_large_term_is_off_by_no_more_than_its_rounding(operation):
    x = torch.full((50, 300), 1e-20)
    x[:, 7] = 1.0
    with ExpectedRounding():
        assert torch.equal(SUMS[operation](x), torch.ones(50))


def test_a_row_of_softmax_with_one_weight_is_exact():
    scores = torch.zeros(3, 300)
    scores[:, 7] = 200.0
    scores.requires_grad_()
    with ExpectedRounding():
        weights = scores.softmax(1)
        (gradient,) = torch.autograd.grad(weights, scores, torch.randn(3, 300))
    assert torch.equal(weights[:, 7], torch.ones(3)) and not gradient[:, 7].any()


@pytest.mark.parametrize("name", OPS)
def test_what_pytorch_computes_passes_by_the_expected_errors_alone(name):
    found = held(name)
    # The luckiest machine there can be: every result is the exact one, rounded.
    lucky = {key: value.to(torch.float32) for key, value in found.exact.items()}
    computed, found.baseline = found.baseline, lucky
    comparisons = found.compare(computed)
    assert all(each.ok for each in comparisons), "; ".join(map(str, comparisons))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_result_has_the_dtype_of_pytorch_and_errs_as_much(name, dtype):
    found = held(name, dtype)
    for key, exact in found.exact.items():
        expected, baseline = found.expected(key)[0], found.baseline[key]
        assert expected.dtype == baseline.dtype and expected.shape == baseline.shape
        if dtype == torch.float64:
            assert testing.max_error(expected, exact) < 1e-9 * (1 + float(exact.abs().max()))
        elif baseline.isfinite().all():
            # In half types nearly all of the error is the rounding of each step, which is alike everywhere.
            assert 0.5 < testing.rms_error(expected, exact) / testing.rms_error(baseline, exact) < 2


CODE = """
import json
from tests.test_rounding import OPS, errors, held
print(json.dumps({name: errors(held(name)) for name in OPS}))
"""


def test_the_expected_errors_are_the_same_on_another_processor():
    done = python("baseline", "-c", CODE)
    assert done.returncode == 0, done.stderr
    elsewhere = json.loads(done.stdout)
    for name in OPS:
        assert elsewhere[name] == pytest.approx(errors(held(name)), rel=1e-3)


def test_operands_of_products_in_tf32_are_rounded_to_nearest():
    near = torch.tensor([1 + 2**-11, 1 + 2**-11 - 2**-20, -1 - 2**-11, 2.0**-130, float("inf"), float("nan")])
    rounded = torch.tensor([1 + 2**-10, 1.0, -1 - 2**-10, 2.0**-130, float("inf"), float("nan")])
    torch.testing.assert_close(rounding.to_tf32(near), rounded, rtol=0, atol=0, equal_nan=True)
    a, b, c = (torch.randn(5, 7, 7, requires_grad=True) for _ in range(3))
    operands = [rounding.to_tf32(t.detach()).requires_grad_() for t in (a, b)]
    with rounding.Tf32Products():
        out = torch.baddbmm(c, a, b)
    expected = torch.baddbmm(c, *operands)
    assert torch.equal(out, expected) and not torch.equal(out, torch.baddbmm(c, a, b))
    grad = rounding.to_tf32(torch.randn(5, 7, 7))
    with rounding.Tf32Products():
        found = torch.autograd.grad(out, (a, b, c), grad)
    for one, other in zip(found, torch.autograd.grad(expected, (*operands, c), grad), strict=True):
        assert torch.equal(one, other)


def test_the_errors_of_tf32_are_drawn_with_random_signs():
    operand, exact = torch.tensor([[1 + 2**-12, -1.0]]), torch.ones(2, 1)

    def formula(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"difference": operand.to(dtype) @ exact.to(dtype)}

    held = testing.Yardstick(formula, torch.float32, tf32=True)
    assert held.exact["difference"] == 2**-12 and held.baseline["difference"] == 0
    # What tf32 holds stays as it is; what it rounds is off by as much, up or down.
    assert {round(drawn.item() * 2**11, 3) for drawn in held.expected("difference", 16)} == {0, 1}
