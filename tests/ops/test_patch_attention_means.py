"""Keys and values far from 0, as biased projections leave them: what is small then is the difference of large sums."""

import pytest
import torch

from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from tests.ops.bridges import INSTRUCTION_SETS, assert_ok, needs_cpp

PATCH_ATTENTION = OPS["patch_attention"]


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_cpp("patch_attention")
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat"])
@pytest.mark.parametrize("size", [(17, 17), (13, 41)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_half_types_in_groups_of_several_blocks(instruction_set, dtype, size, biased, threads):
    generator = torch.Generator().manual_seed(3)
    n = size[0] * size[1]
    for mean in (0.0, 5.0, 20.0):
        query, key, value = torch.randn(3, 1, 2, 20, *size, generator=generator)
        arguments = {"query": query, "key": key + mean, "value": value + mean}
        if biased:
            arguments["bias"] = torch.randn(2, n, n, generator=generator)
        arguments = {name: tensor.to(dtype) for name, tensor in arguments.items()}
        assert_ok(testing.check(PATCH_ATTENTION, {**arguments, "patch_size": 1}, "cpp"))
