"""Finding attention modules, and giving them a fused class."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mvkernels.dispatch.backend import requested
from mvkernels.swap.attention import children, mixes_tokens
from mvkernels.swap.eligibility import asked, class_name, not_exactly, not_hooked, sharded
from mvkernels.swap.folding import fold
from mvkernels.swap.report import SwapEntry, SwapReport, note_choice, note_swap, original_of, restore_module
from mvkernels.swap.swapped import swapped_class

Only = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Family:
    """A third party's class, known by name, so that its package is imported only once a model has brought it."""

    source: str
    """The module that defines the class."""
    class_name: str
    adapter: str
    """The file of families/ that has ``SWAPPED``, the fused form, and ``why_not(module) -> str``."""
    parameters: tuple[str, ...] | None = None
    """The names that its forward takes beside self, where that is more than one."""


@dataclass(frozen=True)
class Structure:
    """Modules of published code that is no package, known by what they hold, whatever their class is called."""

    holds: frozenset[str]
    """Names of attributes and children that a module has if it is one of these."""
    adapter: str
    """The file of families/ that has ``form(module)``, the fused one, and ``why_not(module, model) -> str``."""
    parameters: tuple[str, ...] | None = None
    """As of :class:`Family`."""


@dataclass(frozen=True)
class Processor:
    """A third party's class that leaves its work to a processor object, which is exchanged; the class stays."""

    source: str
    class_name: str
    adapter: str
    """The file of families/ that has ``FUSED``, made of the processor that it replaces, and ``why_not(module)``."""


AnyFamily = Family | Processor | Structure

# A further family is one file and one line.
FAMILIES: tuple[Family | Processor, ...] = (
    Family("transformers.models.mobilevit.modeling_mobilevit", "MobileViTLayer", "transformers_mobilevit"),
    Family("timm.models.mobilevit", "MobileVitBlock", "timm_mobilevit"),
    Family("timm.models.efficientvit_mit", "LiteMLA", "timm_efficientvit"),
    Family("timm.models.efficientformer", "Attention", "timm_efficientformer"),
    Family("timm.models.maxxvit", "Attention2d", "timm_coatnet", ("x", "shared_rel_pos")),
    Family("diffusers.models.attention_processor", "SanaMultiscaleLinearAttention", "diffusers_dc_ae"),
    Processor("diffusers.models.attention_processor", "Attention", "diffusers_sana"),
)
_BY_CLASS = {(family.source, family.class_name): family for family in FAMILIES}
STRUCTURES = (
    Structure(
        frozenset(("block", "num_heads", "token_num", "use_dynamic", "remove_proj_local", "proj", "drop_path")),
        "authors_mobile_former",
    ),
    Structure(frozenset(("eps", "dim", "qkv", "aggreg", "kernel_func", "proj")), "authors_efficientvit"),
    Structure(
        frozenset(("local_rep", "global_rep", "conv_proj", "fusion", "patch_h", "patch_w", "patch_area", "n_heads")),
        "cvnets_mobilevit",
        ("x", "args", "kwargs"),
    ),
)


def swap(
    model: nn.Module, only: Only | None = None, backend: str | None = None, fold_norms: bool = False
) -> SwapReport:
    """Swap the attention blocks of ``model`` for fused ones, in place.

    A block keeps its parameters, buffers, hooks, names and training mode and changes its class alone (or, where it
    has one, its processor), so the state_dict is the same; the new class has the name of the old one. What the fused
    block would not compute exactly as the original is declined with a reason, whatever mode the model is in; what
    changes later (a hook or an adapter inside, training mode with a drop path or with dropout on the attention
    probabilities, torch.jit tracing) sends the call to the original forward, which is logged once.

    Args:
        model: any module, or a block itself.
        only: a name, names, or a predicate on (name, module), to choose among the blocks found.
        backend: handed to the fused ops of these blocks (None: chosen at each call). On blocks that were swapped
            before, another one takes effect ("auto": chosen at each call again); None leaves theirs.
        fold_norms: also have the work of batch norms done by the convolutions before or with the activations after
            them, at inference: in the whole model, whatever ``only`` says (see :mod:`mvkernels.swap.folding`).

    Returns:
        A :class:`SwapReport`; ``restore()`` undoes this call. Blocks that were swapped before stay swapped, with
        ``swapped`` true and the reason "already swapped", and are not in ``count``.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``only`` none of its forms.
        ValueError: a name in ``only`` is no attention module of the model, or the backend is unknown.

    A named backend that cannot run raises BackendUnavailable when the block is called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model is a {class_name(type(model))}, want a torch.nn.Module")
    if backend is not None:
        requested(backend)
    found = find(model)
    chosen = _predicate(only, [name for name, _, _ in found])
    # Asked before anything is changed: a predicate may raise.
    picked = {name for name, module, _ in found if chosen(name, module)}
    report = SwapReport()
    for name, module, family in found:
        kind = getattr(type(module), "mvk_original", type(module))
        if original_of(module) is not None:
            reason, swapped = "already swapped", True
            report._before[name] = module
            if backend is not None and name in picked and note_choice(module, report._call, backend):
                reason += f", now with backend {backend}"
        elif name not in picked:
            reason, swapped = "not chosen by only", False
        elif family is None:
            reason, swapped = "no fused form of this class is known", False
        else:
            reason, change = _exchange(module, model, family)
            swapped = not reason
            if swapped:
                change()
                note_swap(module, report._call, backend)
                report._changed[name] = module
        report.entries.append(SwapEntry(name, kind.__name__, swapped, reason))
    if fold_norms:
        report._folded += fold(model, [(module, _adapter(family)) for _, module, family in found if family is not None])
    return report


def unswap(model: nn.Module) -> None:
    """Restore every swapped module of ``model``, whoever swapped it."""
    for module in [*model.modules()]:
        restore_module(module)


def _exchange(module: nn.Module, model: nn.Module, family: AnyFamily) -> tuple[str, Callable[[], None]]:
    """Why a module of ``model`` may not be swapped (empty if it may), and what swaps it."""
    adapter = _adapter(family)

    def class_() -> None:
        form = adapter.form(module) if isinstance(family, Structure) else adapter.SWAPPED
        module.__class__ = swapped_class(type(module), form)

    def processor() -> None:
        module.set_processor(adapter.FUSED(module.processor))  # type: ignore[operator]

    reason = sharded(module)
    if reason:
        return reason, class_
    if isinstance(family, Structure):
        return _why_not(module, functools.partial(adapter.why_not, model=model), family.parameters), class_
    if isinstance(family, Processor):
        return asked(adapter.why_not, module), processor
    reason = not_exactly(module, getattr(sys.modules[family.source], family.class_name, nn.Module))
    return reason or _why_not(module, adapter.why_not, family.parameters), class_


def _adapter(family: AnyFamily) -> Any:
    return importlib.import_module(f"mvkernels.swap.families.{family.adapter}")


def find(model: nn.Module) -> list[tuple[str, nn.Module, AnyFamily | None]]:
    """Attention modules in the order of the model: the blocks of the families, and others that mix tokens by attention.

    Of the others, those outside the blocks, and the innermost where they nest.
    """
    found: list[tuple[str, nn.Module, AnyFamily | None]] = []
    seen: dict[int, bool] = {}

    def mark(module: nn.Module) -> None:
        """What a block holds is not listed, wherever else it may be."""
        for part in children(module).values():
            if id(part) not in seen:
                seen[id(part)] = True
                mark(part)

    def visit(name: str, module: nn.Module) -> bool:
        """Whether it is attention, or something in it is."""
        if id(module) in seen:
            return seen[id(module)]
        family = _family(module)
        seen[id(module)] = family is not None
        if family is not None:
            found.append((name, module, family))
            mark(module)
            return True
        inside = [visit(f"{name}.{child}" if name else child, part) for child, part in children(module).items()]
        seen[id(module)] = any(inside)
        if not any(inside) and mixes_tokens(module):
            found.append((name, module, None))
            seen[id(module)] = True
        return seen[id(module)]

    visit("", model)
    return found


def _family(module: nn.Module) -> AnyFamily | None:
    """The family whose class is the module's, or is among its bases; else that whose structure it has."""
    for base in type(module).__mro__:
        family = _BY_CLASS.get((base.__module__, base.__qualname__))
        if family is not None:
            return family
    attributes = module.__dict__
    held = attributes.get("_modules") or ()
    return next((s for s in STRUCTURES if all(name in attributes or name in held for name in s.holds)), None)


def _why_not(module: nn.Module, why_not: Callable[[nn.Module], str], parameters: tuple[str, ...] | None = None) -> str:
    if "forward" in module.__dict__:
        return not_hooked(module, "it") or "it has had its forward replaced"
    taken = [*inspect.signature(type(module).forward).parameters][1:]
    if len(taken) != 1 if parameters is None else tuple(taken) != parameters:
        return "this version of its code has another forward"
    return asked(why_not, module)


def _predicate(only: Only | None, names: list[str]) -> Callable[[str, nn.Module], bool]:
    if only is None:
        return lambda name, module: True
    if isinstance(only, str):
        only = [only]
    if callable(only):
        return only
    if not isinstance(only, Iterable):
        kind = class_name(type(only))
        raise TypeError(f"swap: only is a {kind}, want a name, names, or a predicate on (name, module)")
    wanted = list(only)
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"swap: only has a {class_name(type(name))}, want names")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "there is none in it"
            raise ValueError(f"swap: only: {name!r} is no attention module of the model: {hint}")
    return lambda name, module: name in wanted
