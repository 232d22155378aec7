"""inverted_residual's packed weights: what they are, when they are refused, and how they compile."""

import itertools

import pytest
import torch

import mvkernels
from mvkernels import testing
from mvkernels.dispatch import extension
from mvkernels.ops.inverted_residual import operators
from tests.ops.bridges import INSTRUCTION_SETS
from tests.ops.test_inverted_residual import OP, example, needs_cpp

pytestmark = needs_cpp
NAMES = ("expand", "depthwise", "project")


def weights_of(arguments):
    return {name: arguments[name] for name in NAMES}


def pack(arguments):
    return mvkernels.pack_inverted_residual(**weights_of(arguments))


@pytest.fixture
def chosen():
    """Sets an instruction set, and puts back the one of before."""
    before = extension.module.instruction_set()
    yield extension.module.set_instruction_set
    extension.module.set_instruction_set(before)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("hidden", [8, 32, 33, 170])
@pytest.mark.parametrize("expands", [True, False])
@pytest.mark.parametrize("biases", [(True,) * 3, (False,) * 3, (True, False, True)])
def test_packed_is_unpacked_bit_for_bit(chosen, name, hidden, expands, biases):
    chosen(name)
    arguments = example(inputs=16 if expands else hidden, hidden=hidden, outputs=20, expands=expands, biases=biases)
    with testing.poisoned():
        packed = pack(arguments)
        assert packed.dtype == torch.float32 and packed.dim() == 1 and packed.isfinite().all()
        assert torch.equal(OP.function(**arguments, packed=packed), OP.function(**arguments, backend="cpp"))


def test_packed_is_a_copy():
    arguments = example()
    packed, before = pack(arguments), OP.function(**example(), backend="cpp")
    for value in testing.tensors_in(weights_of(arguments)).values():
        value.mul_(3.0)
    assert torch.equal(OP.function(**arguments, packed=packed, backend="cpp"), before)
    again = OP.function(**arguments, packed=pack(arguments), backend="cpp")
    assert torch.equal(again, OP.function(**arguments, backend="cpp")) and not torch.allclose(again, before)


def test_a_parameter_may_be_packed():
    arguments = example()
    parameters = {key: torch.nn.Parameter(value) for key, value in testing.tensors_in(weights_of(arguments)).items()}
    recorded = testing.with_tensors(arguments, parameters)
    packed = pack(recorded)
    assert not packed.requires_grad and torch.equal(packed, pack(arguments))
    with torch.no_grad():
        assert torch.equal(OP.function(**recorded, packed=packed), OP.function(**arguments, backend="cpp"))
    assert OP.function(**recorded, packed=packed).requires_grad  # the reference, which reads the weights
    wanting = packed.clone().requires_grad_()
    assert not mvkernels.can_run(OP.name, "cpp", **arguments, packed=wanting)[0]
    assert torch.equal(OP.function(**arguments, packed=wanting), OP.function(**arguments, backend="reference"))


REFUSED = {
    "other sizes": (lambda p: pack(example(hidden=40)), ValueError, "want what pack_inverted_residual makes"),
    "another kernel": (lambda p: pack(example(kernel=5)), ValueError, "want what pack_inverted_residual makes"),
    "no expansion": (lambda p: pack(example(inputs=24, expands=False)), ValueError, "want what pack_inverted_residual"),
    "shorter": (lambda p: p[:-1], ValueError, "want what pack_inverted_residual makes"),
    "longer": (lambda p: torch.cat((p, p)), ValueError, "want what pack_inverted_residual makes"),
    "two axes": (lambda p: p[None], ValueError, "want what pack_inverted_residual makes"),
    "strided": (lambda p: torch.stack((p, p), 1)[:, 0], ValueError, "want what pack_inverted_residual makes"),
    "expanded": (lambda p: p[:1].expand(len(p)), ValueError, "want what pack_inverted_residual makes"),
    "elsewhere": (lambda p: p.to("meta"), ValueError, "on meta, want what pack_inverted_residual makes"),
    "float64": (lambda p: p.double(), TypeError, "packed has dtype float64, want float32"),
    "bfloat16": (lambda p: p.to(torch.bfloat16), TypeError, "packed has dtype bfloat16, want float32"),
    "integers": (lambda p: p.view(torch.int32), TypeError, "packed has dtype int32"),
    "sparse": (lambda p: p.to_sparse(), TypeError, "packed has layout sparse_coo"),
    "other outputs in as much room": (lambda p: pack(example(outputs=7)), RuntimeError, "packed for other sizes"),
    "zeros": (torch.zeros_like, RuntimeError, "packed for other sizes"),
    "not numbers": (lambda p: p * float("nan"), RuntimeError, "packed for other sizes"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_packed_of_these_weights_is_refused(kind):
    change, error, message = REFUSED[kind]
    arguments = example()
    for backend in (None, "cpp"):
        with pytest.raises(error, match=message) as caught:
            OP.function(**arguments, packed=change(pack(arguments)), backend=backend)
        assert "\n" not in str(caught.value)


def test_a_freed_storage_is_refused():
    arguments = example()
    packed = pack(arguments)
    packed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="the storage of a tensor has been freed"):
        OP.function(**arguments, packed=packed)
    for which, value in testing.tensors_in(arguments).items():
        if value.dim() == 4:  # what has to be copied is asked for first
            strided = torch.stack((value, value), -1)[..., 0]
            strided.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="the storage of a tensor has been freed"):
                OP.function(**testing.with_tensors(arguments, {which: strided}))


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(INSTRUCTION_SETS, 2)))
@pytest.mark.parametrize("hidden", [8, 64])
def test_packed_under_another_instruction_set_is_refused(chosen, one, other, hidden):
    arguments = example(hidden=hidden)
    chosen(one)
    packed = pack(arguments)
    chosen(other)
    with pytest.raises(RuntimeError, match="packed for other sizes, or for another instruction set"):
        OP.function(**arguments, packed=packed)
    chosen(one)
    assert torch.equal(OP.function(**arguments, packed=packed), OP.function(**arguments, backend="cpp"))


def test_what_the_reference_is_given_it_does_not_read():
    arguments = example()
    packed = torch.zeros_like(pack(arguments))
    wanted = OP.function(**arguments, backend="reference")
    assert torch.equal(OP.function(**arguments, packed=packed, backend="reference"), wanted)
    doubles = {key: value.double() for key, value in testing.tensors_in(arguments).items()}
    OP.function(**testing.with_tensors(arguments, doubles), packed=packed)


def test_packing_says_what_is_wrong():
    weights = weights_of(example())
    for change, error, message in (
        ({"depthwise": None}, TypeError, "depthwise is a NoneType, want a pair"),
        ({"project": (torch.ones(8, 25, 1, 1), None)}, ValueError, r"project\[0\] is \(8, 25, 1, 1\)"),
        ({"project": (torch.ones(8, 24, 1, 1).double(), None)}, ValueError, ".* want one dtype"),
        ({"project": (torch.ones(8, 24, 1, 1, device="meta"), None)}, ValueError, ".* want one device"),
    ):
        with pytest.raises(error, match=f"^inverted_residual: {message}"):
            mvkernels.pack_inverted_residual(**weights | change)
    meta = {name: tuple(part.to("meta") for part in pair) for name, pair in weights.items()}
    with pytest.raises(mvkernels.BackendUnavailable, match="run on CPU tensors"):
        mvkernels.pack_inverted_residual(**meta)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("strides", ["channels_last", "contiguous"])
def test_compiled_as_one_graph(packs, strides):
    torch._dynamo.reset()
    arguments = example()
    packed = pack(arguments) if packs else None
    compiled = torch.compile(
        lambda x: OP.function(**arguments | {"x": x}, packed=packed, residual=True).sin(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, size in ((2, (6, 7)), (3, (9, 4))):
        x = testing.make_map((batch, 8, *size), strides)
        wanted = OP.function(**arguments | {"x": x}, residual=True, backend="cpp")
        found = compiled(x)
        assert torch.equal(found, wanted.sin()) and found.stride() == wanted.stride()


@pytest.mark.parametrize("strides", testing.STRIDES)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_operators_keep_to_what_they_say(strides, stride):
    arguments = example()
    given = [part for name in NAMES for part in arguments[name]]
    torch.library.opcheck(operators.pack, given)
    torch.library.opcheck(operators.pack, [None, None, *given[2:4], given[4], None])
    for batch in (2, 0):
        x = testing.make_map((2, 8, 5, 6), strides)[:batch]
        torch.library.opcheck(operators.forward, (x, pack(arguments), 24, 8, 3, True, stride, 2, stride == 1))


def test_the_operator_refuses_what_does_not_fit():
    arguments = example()
    x, packed = arguments["x"], pack(arguments)
    right = (x, packed, 24, 8, 3, True, 1, 2, True)
    operators.forward(*right)
    for at, value in ((0, x[0]), (0, x.double()), (0, x[:, :, :0]), (0, x[:, :7]), (2, 23), (3, 9), (4, 5), (5, False),
                      (6, 3), (6, 0), (6, 2), (1, packed[:-1]), (1, packed.double())):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"^mvkernels: inverted_residual: "):
            operators.forward(*right[:at], value, *right[at + 1 :])
