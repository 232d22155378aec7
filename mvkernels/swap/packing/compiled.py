"""Modules on packed weights in graphs of torch.compile: one operator stands for the call of a module.

The graph has no packing and no weights in it. The operator finds the module by its number and does what an eager call
does: it looks whether the plan holds, makes another if not, and runs the module's own forward where there is none. The
graph is only told the shape of the result. What decides it is read while Dynamo looks on, so that another stride or
another number of channels makes another graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from mvkernels.dispatch import extension, library
from mvkernels.dispatch.backend import requested
from mvkernels.dispatch.exporting import exporting
from mvkernels.swap.eligibility import class_name, class_of
from mvkernels.swap.packing import plans
from mvkernels.swap.packing.kinds import ROWS, SAME, side_after, sizes_of

_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_numbers: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_next = itertools.count(1)


def call(module: Any, x: Any, *beside: Any) -> Tensor | tuple[Tensor] | None:
    """The module's result in a graph that is being made, for the input x and the tensors ``beside`` it; None if the
    module is to be traced."""
    if (
        exporting()
        or torch.is_grad_enabled()
        or extension.module is None
        or requested(None) not in ("auto", "cpp")
        or not _fits(x, module.mvk_axes)
        or not all(_fits(each, axes) for each, axes in zip(beside, module.mvk_beside))
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    number = _number(module)
    sizes = module.mvk_sizes() if number else None
    if sizes is None:
        return None
    last = False
    if sizes[1] != ROWS:
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if x.dim() != 4 or not (module.mvk_any_layout or (last and not x.is_contiguous())):
            return None
        last = last or not module.mvk_keeps_layout
    out: Tensor = _call(x, beside, number, *sizes, last)
    return (out,) if module.mvk_in_tuple else out


def _fits(x: Any, axes: int | None) -> bool:
    return isinstance(x, Tensor) and x.dim() == (axes or max(2, x.dim())) and x.dtype == torch.float32 and x.is_cpu


def _number(module: Any) -> int:
    """The module's number; 0 if it has no plan, or none whose result has a known shape, or if the graph must see its
    weights, because it changes them or is transformed."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or _changed_by_graph(module):
        return 0
    if plans.attempted(module.mvk_sizes) is None or _otherwise(module) or plans.run_for_now(module) is None:
        return 0
    if module not in _numbers:
        _numbers[module] = next(_next)
        _modules[_numbers[module]] = module
    return _numbers[module]


# What torch.compiler.assume_constant_result() does, which imports the compiler: half a second of `import mvkernels`.
_number._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _changed_by_graph(module: nn.Module) -> bool:
    """Whether the code that Dynamo traces now has given the module or its parts other attributes, or written to their
    memory: ``functional_call``, say, or an optimizer's step in the same graph. The module does not show it yet."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
        effects, written = output.side_effects, _written(output)
    except AttributeError:  # somebody else traces
        return True

    def modified(holder: Any) -> bool:
        known = effects.id_to_variable.get(id(holder))
        return known is not None and effects.is_modified(known)

    return any(
        any(map(modified, (part, part._parameters, part._buffers, part._modules)))
        or any(_memory(x) in written for x in (*part._parameters.values(), *part._buffers.values()) if x is not None)
        for part in module.modules()
    )


def _written(output: Any) -> set[int]:
    """The memory of the inputs of Dynamo's graph that its operations write to, so far."""
    graphs = [tracer.graph for tracer in output.tracers]
    # Most writes count the version of the tensor that stands for the real one; those to lists of tensors do not.
    in_place = [node for graph in graphs for node in graph.nodes if _name(node.target).endswith("_")]
    fakes = tree_leaves([[x.meta.get("example_value") for x in node.all_input_nodes] for node in in_place])
    changed = {x.untyped_storage()._cdata for x in fakes if isinstance(x, Tensor) and x.layout == torch.strided}
    found = set()
    for graph in graphs:
        for node in graph.nodes:
            fake, of = node.meta.get("example_value"), node.meta.get("grapharg")
            given = node.op == "placeholder" and of is not None and isinstance(fake, Tensor)
            if given and (
                fake._version > 0 or (fake.layout == torch.strided and fake.untyped_storage()._cdata in changed)
            ):
                found.add(_memory(of.example))
    return found


def _name(target: Any) -> str:
    """Of a function, an operator (without its overload) or a method."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return "" if name.endswith("__") else name.split(".")[0]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


def _otherwise(module: nn.Module) -> bool:
    """Whether a layer makes other channels than it says, since somebody has given it another weight."""
    layers = (part for part in module.modules() if class_of(part) in (nn.Linear, nn.Conv2d))
    return any(sizes_of(layer)[0] != layer.weight.shape[0] for layer in layers)  # type: ignore[index, union-attr]


def _run(x: Tensor, beside: Sequence[Tensor], number: int, outputs: int, stride: int, last: bool) -> Tensor:
    module: Any = _modules[number]
    out: Any = plans.called(module, getattr(module.mvk_unpacked, module.mvk_runs), (x, *beside), (x, *beside))
    if module.mvk_in_tuple and isinstance(out, tuple) and len(out) == 1:
        out = out[0]
    promised = _shape(x, outputs, stride)
    if not isinstance(out, Tensor) or tuple(out.shape) != promised or out.dtype != x.dtype:
        found = f"{tuple(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else f"a {class_name(type(out))}"
        raise RuntimeError(
            f"{class_name(class_of(module))} gave {found} and not {promised} of {x.dtype}, for which its caller was "
            "compiled: call torch.compiler.reset() after such a change of the module"
        )
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _shape(x: Tensor, outputs: int, stride: int) -> tuple[int, ...]:
    if stride == ROWS:
        return (*x.shape[:-1], x.shape[-1] if outputs == SAME else outputs)
    b, channels, height, width = x.shape
    return b, channels if outputs == SAME else outputs, side_after(height, stride), side_after(width, stride)


def _fake(x: Tensor, beside: Sequence[Tensor], number: int, outputs: int, stride: int, last: bool) -> Tensor:
    shape = _shape(x, outputs, stride)
    if not last:
        return x.new_empty(shape)
    b, channels, height, width = shape
    return x.new_empty((b, height, width, channels)).permute(0, 3, 1, 2)


_SCHEMA = "(Tensor x, Tensor[] beside, int module, int outputs, int stride, bool last) -> Tensor"
_call = library.define("swap", "packed", _SCHEMA, _fake, _run)
