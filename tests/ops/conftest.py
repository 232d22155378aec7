import pytest
import torch

from mvkernels.dispatch import extension


@pytest.fixture(scope="module")
def instruction_set(request):
    before = extension.module.set_instruction_set(request.param)
    yield request.param
    extension.module.set_instruction_set(before)


@pytest.fixture
def chosen():
    """Sets an instruction set, and puts back the one of before."""
    before = extension.module.instruction_set()
    yield extension.module.set_instruction_set
    extension.module.set_instruction_set(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
