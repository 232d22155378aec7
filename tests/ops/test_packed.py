"""Packed weights of the ops for inference: what they are, when they are refused, and how they compile."""

import itertools

import pytest
import torch

import mvkernels
from mvkernels import testing
from mvkernels.dispatch.registry import OPS
from mvkernels.ops.conv3x3 import operators as conv3x3
from mvkernels.ops.inverted_residual import operators as inverted_residual
from mvkernels.ops.pointwise import operators as pointwise
from tests.ops.bridges import INSTRUCTION_SETS
from tests.ops.inference import NAMES, example, full, needs_cpp, pack, weights_of

pytestmark = needs_cpp
EACH = pytest.mark.parametrize("name", NAMES)
BATCHES = [*((2, strides) for strides in testing.STRIDES), (0, "contiguous"), (0, "channels_last")]
WIDTHS = (8, 32, 33, 170)

SIZES = [
    ("inverted_residual", {"inputs": 16 if expands else hidden, "hidden": hidden, "outputs": 20, "expands": expands,
                           "biases": biases})
    for hidden in WIDTHS for expands in (True, False) for biases in ((True,) * 3, (False,) * 3, (True, False, True))
]  # fmt: skip
SIZES += [
    ("conv3x3", {"inputs": inputs, "outputs": outputs, "bias": bias, "stride": stride, "size": size, "beside": beside})
    for inputs, outputs in ((3, 16), (16, 33), (100, 170)) for bias in (True, False)
    for stride, size, beside in ((1, (6, 17), 0), (1, (18, 17), 9), (2, (18, 17), 9))
]  # fmt: skip
SIZES += [
    ("patch_transformer_layer", {"heads": heads, "head_dim": head_dim, "hidden": hidden, "bias": bias})
    for heads, head_dim in ((1, 3), (4, 8), (3, 11)) for hidden in WIDTHS for bias in (True, False)
]  # fmt: skip
SIZES += [
    ("pointwise", {"inputs": 19, "outputs": outputs, "bias": bias, "norm": norm})
    for outputs in WIDTHS for bias in (True, False)
    for norm in (None, (True, True), (True, False), (False, True), (False, False))
]  # fmt: skip


@pytest.mark.parametrize("setting", INSTRUCTION_SETS)
@pytest.mark.parametrize(("name", "sizes"), SIZES)
def test_packed_is_unpacked_bit_for_bit(chosen, setting, name, sizes):
    chosen(setting)
    op, arguments = OPS[name], example(name, **sizes)
    with testing.poisoned():
        packed = pack(name, arguments)
        assert packed.dtype == torch.float32 and packed.dim() == 1 and packed.isfinite().all()
        assert torch.equal(op.function(**arguments, packed=packed), op.function(**arguments, backend="cpp"))


@EACH
def test_packed_is_a_copy(name):
    op, arguments = OPS[name], example(name)
    packed, before = pack(name, arguments), op.function(**example(name), backend="cpp")
    for value in testing.tensors_in(weights_of(name, arguments)).values():
        value.mul_(3.0)
    assert torch.equal(op.function(**arguments, packed=packed, backend="cpp"), before)
    again = op.function(**arguments, packed=pack(name, arguments), backend="cpp")
    assert torch.equal(again, op.function(**arguments, backend="cpp")) and not torch.allclose(again, before)


@EACH
def test_a_parameter_may_be_packed(name):
    op, arguments = OPS[name], example(name)
    weights = testing.tensors_in(weights_of(name, arguments))
    recorded = testing.with_tensors(arguments, {key: torch.nn.Parameter(value) for key, value in weights.items()})
    packed = pack(name, recorded)
    assert not packed.requires_grad and torch.equal(packed, pack(name, arguments))
    with torch.no_grad():
        assert torch.equal(op.function(**recorded, packed=packed), op.function(**arguments, backend="cpp"))
    assert op.function(**recorded, packed=packed).requires_grad  # the reference, which reads the weights
    wanting = packed.clone().requires_grad_()
    assert not mvkernels.can_run(name, "cpp", **arguments, packed=wanting)[0]
    assert torch.equal(op.function(**arguments, packed=wanting), op.function(**arguments, backend="reference"))


def of(name, **sizes):
    return lambda packed: pack(name, example(name, **sizes))


REFUSED = {
    "shorter": (lambda p: p[:-1], ValueError, "want what pack_{} makes"),
    "longer": (lambda p: torch.cat((p, p)), ValueError, "want what pack_{} makes"),
    "two axes": (lambda p: p[None], ValueError, "want what pack_{} makes"),
    "strided": (lambda p: torch.stack((p, p), 1)[:, 0], ValueError, "want what pack_{} makes"),
    "expanded": (lambda p: p[:1].expand(len(p)), ValueError, "want what pack_{} makes"),
    "elsewhere": (lambda p: p.to("meta"), ValueError, "packed is on meta"),
    "no tensor": (lambda p: p.tolist(), TypeError, "packed is a list"),
    "float64": (lambda p: p.double(), TypeError, "packed has dtype float64, want float32"),
    "bfloat16": (lambda p: p.to(torch.bfloat16), TypeError, "packed has dtype bfloat16, want float32"),
    "integers": (lambda p: p.view(torch.int32), TypeError, "packed has dtype int32"),
    "sparse": (lambda p: p.to_sparse(), TypeError, "packed has layout sparse_coo"),
    "zeros": (torch.zeros_like, RuntimeError, "packed is of other sizes"),
    "not numbers": (lambda p: p * float("nan"), RuntimeError, "packed is of other sizes"),
}
OTHERS = [
    ("inverted_residual", {"hidden": 40}, ValueError),
    ("inverted_residual", {"kernel": 5}, ValueError),
    ("inverted_residual", {"inputs": 24, "expands": False}, ValueError),
    ("inverted_residual", {"outputs": 7}, RuntimeError),  # in as much room
    ("conv3x3", {"inputs": 17}, ValueError),
    ("conv3x3", {"outputs": 33}, ValueError),
    ("conv3x3", {"stride": 2}, ValueError),
    ("conv3x3", {"outputs": 17}, RuntimeError),
    ("pointwise", {"inputs": 17}, ValueError),
    ("pointwise", {"outputs": 33}, ValueError),
    ("pointwise", {"outputs": 25}, RuntimeError),
    ("pointwise", {"norm": None}, RuntimeError),
    ("patch_transformer_layer", {"hidden": 40}, ValueError),
    ("patch_transformer_layer", {"head_dim": 16}, ValueError),
    ("patch_transformer_layer", {"hidden": 21}, ValueError),
    ("patch_transformer_layer", {"head_dim": 4, "hidden": 36}, RuntimeError),
]
WRONG = [(name, *rest) for name in NAMES for rest in REFUSED.values()]
WRONG += [
    (name, of(name, **sizes), error, "want what pack_{} makes" if error is ValueError else "packed is of other sizes")
    for name, sizes, error in OTHERS
]
IDS = [f"{name} {kind}" for name in NAMES for kind in REFUSED] + [f"{name} {sizes}" for name, sizes, _ in OTHERS]


def test_what_is_packed_for_maps_of_another_size_is_refused():
    large, small = (example("conv3x3", inputs=96, size=size) for size in ((16, 16), (16, 15)))
    for arguments, other in ((large, small), (small, large)):
        with pytest.raises(ValueError, match="want what pack_conv3x3 makes"):
            OPS["conv3x3"].function(**arguments, packed=pack("conv3x3", other))


@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG, ids=IDS)
def test_what_is_not_packed_of_these_weights_is_refused(name, change, error, message):
    arguments = example(name)
    for backend in (None, "cpp"):
        with pytest.raises(error, match=message.format(name)) as caught:
            OPS[name].function(**arguments, packed=change(pack(name, arguments)), backend=backend)
        assert "\n" not in str(caught.value)


@EACH
def test_a_freed_storage_is_refused(name):
    op, arguments = OPS[name], example(name)
    packed = pack(name, arguments)
    packed.untyped_storage().resize_(0)
    # PyTorch itself refuses to divide what was freed, where the op's weights are several products'.
    with pytest.raises(RuntimeError, match=r"storage of (a tensor has been freed|size 0)"):
        op.function(**arguments, packed=packed)
    for which, value in testing.tensors_in(arguments).items():  # what has to be copied is asked for first
        strided = torch.stack((value, value), -1)[..., 0]
        strided.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="the storage of a tensor has been freed"):
            op.function(**testing.with_tensors(arguments, {which: strided}))


@EACH
@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(INSTRUCTION_SETS, 2)))
@pytest.mark.parametrize("outputs", [8, 64])
def test_packed_under_another_instruction_set_is_refused(chosen, name, one, other, outputs):
    which = "hidden" if name == "patch_transformer_layer" else "outputs"
    op, arguments = OPS[name], example(name, **{which: outputs})
    chosen(one)
    packed = pack(name, arguments)
    chosen(other)
    with pytest.raises(RuntimeError, match="packed is of other sizes, or was packed under another instruction set"):
        op.function(**arguments, packed=packed)
    chosen(one)
    assert torch.equal(op.function(**arguments, packed=packed), op.function(**arguments, backend="cpp"))


@EACH
def test_what_the_reference_is_given_it_does_not_read(name):
    op, arguments = OPS[name], example(name)
    packed = torch.zeros_like(pack(name, arguments))
    wanted = op.function(**arguments, backend="reference")
    assert torch.equal(op.function(**arguments, packed=packed, backend="reference"), wanted)
    doubles = {key: value.double() for key, value in testing.tensors_in(arguments).items()}
    op.function(**testing.with_tensors(arguments, doubles), packed=packed)


UNPACKABLE = [
    ("inverted_residual", {"depthwise": None}, TypeError, "depthwise is a NoneType, want a pair"),
    ("inverted_residual", {"project": (torch.ones(8, 25, 1, 1), None)}, ValueError, r"project\[0\] is \(8, 25, 1, 1\)"),
    ("conv3x3", {"weight": None}, TypeError, "weight is a NoneType"),
    ("conv3x3", {"weight": torch.ones(16, 16, 3)}, ValueError, "weight has 3 axes"),
    ("conv3x3", {"weight": torch.ones(16, 16, 3, 5)}, ValueError, r"weight is \(16, 16, 3, 5\)"),
    ("conv3x3", {"bias": torch.ones(15)}, ValueError, r"bias is \(15,\), want"),
    ("conv3x3", {"stride": 3}, ValueError, "stride is 3, want 1 or 2"),
    ("conv3x3", {"size": (3, 0)}, ValueError, "size"),
    ("conv3x3", {"size": 2.5}, TypeError, "size"),
    ("pointwise", {"weight": None}, TypeError, "weight is a NoneType"),
    ("pointwise", {"weight": torch.ones(24, 16, 3, 3)}, ValueError, r"weight is \(24, 16, 3, 3\)"),
    ("pointwise", {"bias": torch.ones(23)}, ValueError, r"bias is \(23,\), want"),
    ("patch_transformer_layer", {"fc1_weight": None}, TypeError, "fc1_weight is a NoneType"),
    ("patch_transformer_layer", {"qkv_weight": torch.ones(36)}, ValueError, "qkv_weight has 1 axes"),
    ("patch_transformer_layer", {"qkv_weight": torch.ones(35, 12)}, ValueError, r"qkv_weight is \(35, 12\), want"),
    ("patch_transformer_layer", {"qkv_weight": torch.ones(0, 0)}, ValueError, r"qkv_weight is \(0, 0\): C is 0"),
    ("patch_transformer_layer", {"qkv_bias": torch.ones(35)}, ValueError, r"qkv_bias is \(35,\), want"),
    ("patch_transformer_layer", {"norm2_bias": torch.ones(11)}, ValueError, r"norm2_bias is \(11,\), want"),
    ("patch_transformer_layer", {"fc2_weight": torch.ones(20, 12)}, ValueError, r"fc2_weight is \(20, 12\), want"),
    ("pointwise", {"norm": torch.ones(2, 16)}, TypeError, "norm is a Tensor, want a pair"),
    ("pointwise", {"norm": (torch.ones(15), None)}, ValueError, r"norm\[0\] is \(15,\), want"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), UNPACKABLE)
def test_packing_says_what_is_wrong(name, change, error, message):
    weights = weights_of(name, example(name))
    with pytest.raises(error, match=f"^{name}: {message}") as caught:
        getattr(mvkernels, f"pack_{name}")(**weights | change)
    assert "\n" not in str(caught.value)


@EACH
def test_packing_wants_one_dtype_and_one_device(name):
    arguments = example(name)
    tensors = testing.tensors_in(weights_of(name, arguments))
    last = list(tensors)[-1]
    for other, message in ((tensors[last].double(), "want one dtype"), (tensors[last].to("meta"), "want one device")):
        with pytest.raises(ValueError, match=f"^{name}: .* {message}"):
            pack(name, testing.with_tensors(arguments, {last: other}))
    meta = {key: value.to("meta") for key, value in tensors.items()}
    with pytest.raises(mvkernels.BackendUnavailable, match="run on CPU tensors"):
        pack(name, testing.with_tensors(arguments, meta))


@EACH
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("strides", ["channels_last", "contiguous"])
def test_compiled_as_one_graph(name, packs, strides):
    torch._dynamo.reset()
    op, arguments = OPS[name], full(name)
    packed = pack(name, arguments) if packs else None
    compiled = torch.compile(
        lambda maps: op.function(**arguments | maps, packed=packed).sin(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, size in ((2, (6, 7)), (3, (9, 4))):
        given = full(name, batch=batch, size=size, kind=strides)
        maps = {key: given[key] for key in op.maps if isinstance(given.get(key), torch.Tensor)}
        wanted = op.function(**arguments | maps, backend="cpp")
        found = compiled(maps)
        assert torch.equal(found, wanted.sin()) and found.stride() == wanted.stride()


@EACH
def test_autocast_takes_the_reference(name):
    op, arguments = OPS[name], full(name)
    packed = pack(name, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.function(**arguments, packed=packed), op.function(**arguments, backend="reference"))
        with pytest.raises(mvkernels.BackendUnavailable, match=r"weights cannot be packed: .* are bfloat16"):
            pack(name, arguments)


@pytest.mark.parametrize(("batch", "strides"), BATCHES)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_operators_of_inverted_residual_keep_to_what_they_say(batch, strides, stride):
    arguments = example("inverted_residual", size=(5, 6))
    given = [part for name in ("expand", "depthwise", "project") for part in arguments[name]]
    torch.library.opcheck(inverted_residual.pack, given)
    torch.library.opcheck(inverted_residual.pack, [None, None, *given[2:4], given[4], None])
    x = testing.make_map((batch, 8, 5, 6), strides)
    call = (x, pack("inverted_residual", arguments), 24, 8, 3, True, stride, 2, stride == 1)
    torch.library.opcheck(inverted_residual.forward, call)


@pytest.mark.parametrize(("batch", "strides"), BATCHES)
@pytest.mark.parametrize(("tile", "stride", "size"), [(4, 1, (17, 16)), (2, 1, (5, 6)), (0, 2, (5, 6))])
def test_the_operators_of_conv3x3_keep_to_what_they_say(batch, strides, tile, stride, size):
    kinds = {"kind": strides, "beside_kind": strides, "residual": strides}
    inputs = 96 if tile == 4 else 16
    arguments = example("conv3x3", batch=batch, size=size, inputs=inputs, stride=stride, beside=5, outputs=18, **kinds)
    for bias in (arguments["bias"], None):
        torch.library.opcheck(conv3x3.pack, (arguments["weight"], bias, tile))
    x, beside, plus, packed = *(arguments[name] for name in ("x", "beside", "residual")), pack("conv3x3", arguments)
    torch.library.opcheck(conv3x3.forward, (x, beside, packed, 18, tile, stride, 2, plus))
    torch.library.opcheck(conv3x3.forward, (x, beside, packed, 18, tile, stride, 2, None))


@pytest.mark.parametrize(("batch", "strides"), BATCHES)
@pytest.mark.parametrize("norm", [None, (True, True), (True, False), (False, True), (False, False)])
def test_the_operators_of_pointwise_keep_to_what_they_say(batch, strides, norm):
    arguments = example("pointwise", batch=batch, norm=norm, kind=strides, residual=strides)
    normed = norm is not None
    parts = arguments["norm"] if normed else (None, None)
    for bias in (arguments["bias"], None):
        torch.library.opcheck(pointwise.pack, (arguments["weight"], bias, normed, *parts))
    packed = pack("pointwise", arguments)
    for plus in (arguments["residual"], None):
        torch.library.opcheck(pointwise.forward, (arguments["x"], packed, 24, normed, 1e-5, 2, plus))


def assert_refuses(name, forward, right, wrong):
    forward(*right)
    for at, value in wrong:
        with pytest.raises(RuntimeError, match=rf"^mvkernels: {name}: "):
            forward(*right[:at], value, *right[at + 1 :])


def test_the_operators_refuse_what_does_not_fit():
    arguments = example("inverted_residual")
    x, packed = arguments["x"], pack("inverted_residual", arguments)
    right = (x, packed, 24, 8, 3, True, 1, 2, True)
    wrong = [(0, x[0]), (0, x.double()), (0, x[:, :, :0]), (0, x[:, :7]), (2, 23), (3, 9), (4, 5), (5, False),
             (6, 3), (6, 0), (6, 2), (1, packed[:-1]), (1, packed.double())]  # fmt: skip
    assert_refuses("inverted_residual", inverted_residual.forward, right, wrong)

    arguments = example("conv3x3", beside=5, residual="contiguous")
    x, beside, plus, packed = *(arguments[each] for each in ("x", "beside", "residual")), pack("conv3x3", arguments)
    right = (x, beside, packed, 16, 2, 1, 2, plus)
    wrong = [(0, x[0]), (0, x.double()), (0, x[:, :, :0]), (0, x[:, :15]), (0, x[:1]), (1, beside[:1]), (1, None),
             (1, beside[..., 1:]), (1, beside.double()), (1, beside[0]), (2, packed[:-1]), (2, packed.double()),
             (3, 17), (4, 4), (4, 0), (4, 3), (5, 2), (5, 0), (5, 3), (7, plus[:1]), (7, plus[:, 1:]), (7, plus[0]),
             (7, plus.double()), (7, plus[..., 1:])]  # fmt: skip
    assert_refuses("conv3x3", conv3x3.forward, right, wrong)
    for weight, bias, tile in ((x[0], None, 2), (arguments["weight"], None, 3), (arguments["weight"], None, -1),
                               (arguments["weight"][:, :, 1:], None, 2), (arguments["weight"].double(), None, 2),
                               (arguments["weight"], arguments["bias"][1:], 2)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"^mvkernels: conv3x3: "):
            conv3x3.pack(weight, bias, tile)

    arguments = example("pointwise", residual="contiguous")
    x, plus, packed = arguments["x"], arguments["residual"], pack("pointwise", arguments)
    right = (x, packed, 24, True, 1e-5, 2, plus)
    wrong = [(0, x[0]), (0, x.double()), (0, x[:, :, :0]), (0, x[:, :15]), (0, x[:, :0]), (0, x[:1]), (2, 23),
             (3, False), (1, packed[:-1]), (1, packed.double()), (6, plus[:1]), (6, plus[:, 1:]), (6, plus[0]),
             (6, plus.double()), (6, plus[..., 1:])]  # fmt: skip
    assert_refuses("pointwise", pointwise.forward, right, wrong)
    weight, bias, norm = arguments["weight"], arguments["bias"], arguments["norm"]
    two_taps = weight[..., None].expand(24, 16, 2)
    for given in ((bias, None, False, None, None), (weight.double(), None, False, None, None),
                  (weight, bias[1:], False, None, None), (weight, bias, True, norm[0][1:], None),
                  (weight, bias, True, None, norm[1][1:]), (two_taps, None, False, None, None)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"^mvkernels: pointwise: "):
            pointwise.pack(*given)
