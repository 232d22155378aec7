"""``swap``: finds the attention modules of a model and gives them a fused class."""

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
from mvkernels.swap.swapped import packing, swapped_class

Only = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Family:
    """A class of another package, known by its name. So the package is imported only if a model uses it."""

    source: str
    """The module that defines the class."""
    class_name: str
    adapter: str
    """The file of families/ that has ``SWAPPED``, the fused form, or ``form(module)`` for several classes, and
    ``why_not(module) -> str``; and ``CALLS_PARTS = True`` if the form calls the parts of the module as the original
    does, so that these may have forms of their own."""
    parameters: tuple[str, ...] | None = None
    """The names of the forward's parameters after self, if it has more than one."""


@dataclass(frozen=True)
class Structure:
    """Modules of published code that is not a package, recognised by their attributes, whatever the class name."""

    holds: frozenset[str]
    """Names of attributes and children that such a module has."""
    adapter: str
    """The file of families/ that has ``form(module)``, the fused one, and ``why_not(module, model) -> str``."""
    parameters: tuple[str, ...] | None = None
    """As in :class:`Family`."""


@dataclass(frozen=True)
class Processor:
    """A class of another package that calls a processor object. The processor is exchanged; the class stays."""

    source: str
    class_name: str
    adapter: str
    """The file of families/ that has ``FUSED``, constructed from the original processor, and ``why_not(module)``."""


AnyFamily = Family | Processor | Structure

# Another family needs one file and one line here.
FAMILIES: tuple[Family | Processor, ...] = (
    Family("transformers.models.mobilevit.modeling_mobilevit", "MobileViTLayer", "transformers_mobilevit"),
    Family("timm.models.mobilevit", "MobileVitBlock", "timm_mobilevit"),
    Family("timm.models.efficientvit_mit", "LiteMLA", "timm_efficientvit"),
    Family("timm.models.efficientformer", "Attention", "timm_efficientformer"),
    Family("timm.models.maxxvit", "Attention2d", "timm_coatnet", ("x", "shared_rel_pos")),
    Family("timm.models.maxxvit", "PartitionAttentionCl", "timm_maxvit"),
    Family("timm.models.maxxvit", "PartitionAttention2d", "timm_maxvit"),
    Family("timm.models.maxxvit", "ParallelPartitionAttention", "timm_maxvit"),
    Family("timm.models.swin_transformer", "SwinTransformerBlock", "timm_swin"),
    Family("timm.models.swin_transformer_v2", "SwinTransformerV2Block", "timm_swin_v2"),
    Family("timm.models.tiny_vit", "TinyVitBlock", "timm_tiny_vit"),
    Family("timm.models.levit", "Attention", "timm_levit"),
    Family("timm.models.levit", "AttentionDownsample", "timm_levit"),
    Family("timm.models.efficientformer_v2", "Attention2dDownsample", "timm_efficientformer_v2"),
    Family("timm.models.cpubone", "ConvAttention", "timm_conv_attention"),
    Family("timm.models.lowformer", "ConvAttention", "timm_conv_attention"),
    Family("timm.layers.attention2d", "MultiQueryAttention2d", "timm_attention2d", ("x", "attn_mask")),
    Family("timm.layers.attention2d", "Attention2d", "timm_attention2d", ("x", "attn_mask")),
    Family(
        "transformers.models.swin.modeling_swin",
        "SwinLayer",
        "transformers_swin",
        ("hidden_states", "input_dimensions", "always_partition", "kwargs"),
    ),
    Family(
        "transformers.models.swinv2.modeling_swinv2",
        "Swinv2Layer",
        "transformers_swin_v2",
        ("hidden_states", "input_dimensions", "output_attentions"),
    ),
    Family(
        "transformers.models.donut.modeling_donut_swin",
        "DonutSwinLayer",
        "transformers_donut_swin",
        ("hidden_states", "input_dimensions", "output_attentions", "always_partition"),
    ),
    Family(
        "transformers.models.maskformer.modeling_maskformer_swin",
        "MaskFormerSwinLayer",
        "transformers_maskformer_swin",
        ("hidden_states", "input_dimensions", "output_attentions"),
    ),
    Family("transformers.models.levit.modeling_levit", "LevitAttention", "transformers_levit"),
    Family("transformers.models.levit.modeling_levit", "LevitAttentionSubsample", "transformers_levit"),
    Family("torchvision.models.swin_transformer", "ShiftedWindowAttention", "torchvision_swin"),
    Family("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2", "torchvision_swin"),
    Family("diffusers.models.attention_processor", "SanaMultiscaleLinearAttention", "diffusers_dc_ae"),
    Processor("diffusers.models.attention_processor", "Attention", "diffusers_sana"),
)
_BY_CLASS = {(family.source, family.class_name): family for family in FAMILIES}
# Classes without a fused form, and why: one line each.
DECLINED = {
    (
        "timm.models.efficientformer_v2",
        "Attention2d",
    ): "it mixes scores and probabilities between heads (talking heads)",
    ("timm.models.mobilevit", "LinearSelfAttention"): "its scores are one number a pixel: attention is a weighted sum",
    (
        "timm.models.swin_transformer_v2_cr",
        "WindowMultiHeadAttention",
    ): "no fused form of the swinv2_cr models is known",
}
STRUCTURES = (
    Structure(
        frozenset(("block", "num_heads", "token_num", "use_dynamic", "remove_proj_local", "proj", "drop_path")),
        "authors_mobile_former",
    ),
    Structure(frozenset(("eps", "dim", "qkv", "aggreg", "kernel_func", "proj")), "authors_efficientvit"),
    Structure(
        frozenset(("conv_proj", "pwise", "sda", "o_proj", "upsampling", "num_heads", "att_stride", "o_proj_inpdim")),
        "authors_cpubone",
    ),
    Structure(
        frozenset(("local_rep", "global_rep", "conv_proj", "fusion", "patch_h", "patch_w", "patch_area", "n_heads")),
        "cvnets_mobilevit",
        ("x", "args", "kwargs"),
    ),
)


def swap(
    model: nn.Module,
    only: Only | None = None,
    backend: str | None = None,
    fold_norms: bool = False,
    inference: bool = False,
) -> SwapReport:
    """Make the attention blocks of ``model`` run on the fused ops, in place.

    A swapped block gets another class, with the name of the old one, or another processor if it has one. Parameters,
    buffers, hooks, module names and training mode stay, so the state_dict is the same. Inputs and outputs keep
    their shapes and dtypes. A block is not swapped if its fused form would not compute the same function; the
    report gives the reason. A swapped block runs its original forward, and logs this once, in calls that the fused form
    does not support: if a hook or an adapter was added inside, in training mode with drop path or with dropout on the
    attention probabilities, and under torch.jit tracing.

    Args:
        model: any module; it may be a block itself.
        only: which of the blocks to swap: a name, several names, or a function of (name, module) that returns a bool.
            None swaps all.
        backend: backend of the fused ops in these blocks; None chooses at each call. For blocks that were swapped
            before, a new backend replaces theirs ("auto" chooses at each call again), and None keeps theirs.
        fold_norms: whether batch norms are also folded at inference, into the convolution before or the activation
            after them. This applies to the whole model, whatever ``only`` is (see :mod:`mvkernels.swap.folding`).
        inference: whether calls that record no gradient also run on weights that are packed for them, in the whole
            model, whatever ``only`` is: convolutions with the norms and activations around them, inverted residuals and
            linear layers, on a CPU in float32. It includes ``fold_norms``. See :mod:`mvkernels.swap.packing`.

    Returns:
        A :class:`SwapReport` with one entry for each attention module. Its ``restore()`` undoes this call. Blocks that
        were swapped before stay swapped, with the reason "already swapped" in their entries; ``count`` leaves them out.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``only`` is not one of the forms above.
        ValueError: ``only`` has a name that is not an attention module of the model, or the backend is unknown.

    If the backend cannot run a block, the call of this block raises BackendUnavailable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model is a {class_name(type(model))}, want a torch.nn.Module")
    if backend is not None:
        requested(backend, "swap")
    found = find(model)
    chosen = _predicate(only, [name for name, _, _ in found])
    # Before anything is changed, because a predicate may raise.
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
            reason, swapped = _unknown(module), False
        else:
            reason, change = _exchange(module, model, family, inference)
            swapped = not reason
            if swapped:
                change()
                note_swap(module, report._call, backend)
                report._changed[name] = module
        report.entries.append(SwapEntry(name, kind.__name__, swapped, reason))
    if inference:
        report._packed += _pack(model)
    if fold_norms or inference:
        blocks = [(module, _adapter(family)) for _, module, family in found if family is not None]
        report._folded += fold(model, blocks, packs=inference)
    return report


def _pack(model: nn.Module) -> list[tuple[nn.Module, type, type]]:
    """Give modules that were swapped before forms that pack weights. Returns them, their classes and the new ones."""
    changed = []
    for module in model.modules():
        kind: Any = type(module)
        if "mvk_form" in kind.__dict__ and not kind.mvk_packs:
            module.__class__ = swapped_class(kind.mvk_original, packing(kind.mvk_form))
            changed.append((module, kind, type(module)))
    return changed


def unswap(model: nn.Module) -> None:
    """Restore all swapped modules of ``model``, whichever call of swap they come from."""
    for module in [*model.modules()]:
        restore_module(module)


def _exchange(module: nn.Module, model: nn.Module, family: AnyFamily, packs: bool) -> tuple[str, Callable[[], None]]:
    """Why a module of ``model`` may not be swapped (empty if it may), and what swaps it."""
    adapter = _adapter(family)

    def class_() -> None:
        form = adapter.form(module) if hasattr(adapter, "form") else adapter.SWAPPED
        module.__class__ = swapped_class(type(module), packing(form) if packs else form)

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
    """The attention modules in the order of the model: blocks of the families, and others that mix tokens by attention.

    Others inside a block are left out. Where they are nested, the innermost is taken.
    """
    found: list[tuple[str, nn.Module, AnyFamily | None]] = []
    seen: dict[int, bool] = {}

    def mark(module: nn.Module) -> None:
        """Leave out the parts of a block, also where they are used elsewhere in the model."""
        for part in children(module).values():
            if id(part) not in seen:
                seen[id(part)] = True
                mark(part)

    def visit(name: str, module: nn.Module) -> bool:
        """Whether the module is attention or contains attention."""
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


def _unknown(module: nn.Module) -> str:
    """Why a module of no family stays as it is."""
    named = ((base.__module__, base.__qualname__) for base in type(module).__mro__)
    known = (DECLINED[name] for name in named if name in DECLINED)
    return next(known, "no fused form of this class is known")


def _family(module: nn.Module) -> AnyFamily | None:
    """The family of the module's class or of one of its bases, else the one with the module's structure, else None."""
    for base in type(module).__mro__:
        family = _BY_CLASS.get((base.__module__, base.__qualname__))
        if family is not None:
            return family
    attributes = module.__dict__
    held = attributes.get("_modules") or ()
    return next((s for s in STRUCTURES if all(name in attributes or name in held for name in s.holds)), None)


def _why_not(module: nn.Module, why_not: Callable[[nn.Module], str], parameters: tuple[str, ...] | None = None) -> str:
    if "forward" in module.__dict__:
        return not_hooked(module, "it") or "it has a replaced forward"
    taken = [*inspect.signature(type(module).forward).parameters][1:]
    if len(taken) != 1 if parameters is None else tuple(taken) != parameters:
        return "its forward takes other arguments than in the supported versions of its code"
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
        raise TypeError(f"swap: only is a {kind}, want a name, a list of names, or a function of (name, module)")
    wanted = list(only)
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"swap: only contains a {class_name(type(name))}, want names of modules (str)")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else "no attention module was found in it"
            raise ValueError(f"swap: only: the model has no attention module named {name!r}: {hint}")
    return lambda name, module: name in wanted
