import pytest

from mvkernels.dispatch import extension


@pytest.fixture(scope="module")
def instruction_set(request):
    before = extension.module.set_instruction_set(request.param)
    yield request.param
    extension.module.set_instruction_set(before)
