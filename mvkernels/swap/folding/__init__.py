"""Folding of batch norms at inference: ``swap(model, fold_norms=True)``.

At inference a batch norm multiplies each channel by a factor and adds an offset. If an activation follows, a C++ kernel
computes norm and activation in one pass over the output of the convolution. Otherwise factor and offset go into the
weight and bias of the convolution, where they cost nothing. The class is changed of the module that calls convolution,
norm and activation, not the class of these three. Factor and offset are computed in every call, which takes
microseconds, so they are always up to date.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from torch import nn

from mvkernels.swap.eligibility import name_of, not_its_own, replaced
from mvkernels.swap.folding.forms import Folding
from mvkernels.swap.swapped import Swapped, packing, swapped_class

# Classes that call a convolution and directly after it the norm. Another one needs a class in the file and a line here.
_CALLERS = {
    ("transformers.models.mobilevit.modeling_mobilevit", "MobileViTConvLayer"): "transformers",
    ("transformers.models.levit.modeling_levit", "LevitConvEmbeddings"): "transformers",
    ("transformers.models.poolformer.modeling_poolformer", "PoolFormerPooling"): "transformers",
    ("timm.layers.conv_bn_act", "ConvNormAct"): "timm",
    ("timm.models.efficientvit_mit", "ConvNormAct"): "timm",
    ("timm.models.efficientformer", "ConvMlpWithNorm"): "timm",
    ("timm.models.efficientformer", "Downsample"): "timm",
    ("timm.models.efficientformer", "Pooling"): "timm",
    ("timm.models.metaformer", "Pooling"): "timm",
    ("timm.models.levit", "ConvNorm"): "timm",
    ("timm.models.tiny_vit", "ConvNorm"): "timm",
    ("timm.models.efficientformer_v2", "ConvNorm"): "timm",
    ("timm.layers.norm_act", "BatchNormAct2d"): "timm",
}
# Blocks that run on packed weights: for ``swap(model, inference=True)``. Those of mvmodels, which is not imported here,
# have their forms by name.
_PACKED = {
    ("timm.models.byobnet", "BottleneckBlock"): "timm",
    ("timm.models.efficientvit_mit", "MBConv"): "timm",
    ("timm.models.efficientvit_mit", "DSConv"): "timm",
    ("timm.layers.mlp", "Mlp"): "timm_blocks",
    ("timm.layers.mlp", "ConvMlp"): "timm_blocks",
    ("timm.models.tiny_vit", "NormMlp"): "timm_blocks",
    ("timm.models.levit", "LevitMlp"): "timm_blocks",
    ("timm.models.levit", "LinearNorm"): "timm_blocks",
    ("timm.models.levit", "Stem8"): "timm_blocks",
    ("timm.models.levit", "Stem16"): "timm_blocks",
    ("timm.models.efficientformer", "Stem4"): "timm_blocks",
    ("timm.models.efficientformer", "MetaBlock1d"): "timm_blocks",
    ("timm.models.efficientformer", "MetaBlock2d"): "timm_blocks",
    ("timm.models.metaformer", "MetaFormerBlock"): "timm_blocks",
    ("timm.models.maxxvit", "MbConvBlock"): "timm_blocks",
    ("timm.models.maxxvit", "TransformerBlock2d"): "timm_coatnet",
    ("transformers.models.mobilevit.modeling_mobilevit", "MobileViTInvertedResidual"): "transformers",
    ("transformers.models.levit.modeling_levit", "MLPLayerWithBN"): "transformers",
    ("transformers.models.levit.modeling_levit", "LevitMLPLayer"): "transformers",
    ("transformers.models.poolformer.modeling_poolformer", "PoolFormerLayer"): "transformers_poolformer",
    ("transformers.models.poolformer.modeling_poolformer", "PoolFormerOutput"): "transformers_poolformer",
    ("torchvision.ops.misc", "MLP"): "torchvision",
    ("torchvision.models.swin_transformer", "SwinTransformerBlock"): "torchvision",
    ("diffusers.models.normalization", "RMSNorm"): "diffusers",
    ("diffusers.models.transformers.sana_transformer", "GLUMBConv"): "diffusers",
    ("diffusers.models.autoencoders.autoencoder_dc", "ResBlock"): "diffusers",
    ("diffusers.models.autoencoders.autoencoder_dc", "DCDownBlock2d"): "diffusers",
    ("diffusers.models.autoencoders.autoencoder_dc", "DCUpBlock2d"): "diffusers",
    # Whose files have the names in place of the classes, since mvmodels is on top of this package.
    ("mvkernels.nn.mobile_former", "Mobile"): "own_mobile",
    ("mvkernels.nn.mobile_former", "DownsampleMobile"): "own_mobile",
    ("mvmodels.mobile_former", "FirstBlock"): "own_mobile",
    ("mvmodels.mobile_former", "Stem"): "own_mobile",
    ("mvmodels.mobile_former", "Head"): "own_mobile",
    ("mvmodels.coatnet", "MBConv"): "own_mobile",
    ("mvkernels.nn.efficientvit", "ConvNormAct"): "own",
    ("mvkernels.nn.efficientvit", "LiteMLA"): "own",
    ("mvkernels.nn.efficientvit", "MBConv"): "own",
    ("mvkernels.nn.efficientvit", "Residual"): "own",
    ("mvkernels.nn.patch_transformer", "PatchTransformer"): "own",
    ("mvmodels.layers", "ConvNorm"): "own_models",
    ("mvmodels.layers", "Mlp"): "own_models",
    ("mvmodels.layers", "PoolMixer"): "own_models",
    ("mvmodels.layers", "ToChannelsFirst"): "own_models",
    ("mvmodels.layers", "ToChannelsLast"): "own_models",
    ("mvmodels.mobilevit", "InvertedResidual"): "own_models",
    ("mvmodels.mobilevit", "MobileViTBlock"): "own_models",
    ("mvmodels.efficientformer", "ConvMlp"): "own_models",
    ("mvmodels.efficientformer", "MB3D"): "own_models",
    ("mvmodels.efficientformer", "MB4D"): "own_models",
    ("mvmodels.poolformer", "PoolFormerBlock"): "own_models",
    ("mvmodels.coatnet", "TransformerBlock"): "own_models",
    ("mvmodels.encoder", "EncoderBlock"): "own_models",
}
# The same by what a block holds, in code that is not a package. Their files say with ``form`` which form it gets.
_STRUCTURES = {
    ("conv1", "conv2", "conv3", "hyper1", "local_global", "global_block", "global_local"): "authors_mobile_former",
    ("conv", "identity"): "authors_mobile_former",
}
# Modules that call packed ones in turn: one look at all of them is enough. ``Sequential`` is one of them.
_CHAINS = {
    ("timm.models.efficientvit_mit", "ResidualBlock"): "timm_chains",
    ("timm.models.efficientvit_mit", "EfficientVitBlock"): "timm_chains",
    ("timm.models.efficientvit_mit", "EfficientVitStage"): "timm_chains",
    ("diffusers.models.autoencoders.autoencoder_dc", "EfficientViTBlock"): "diffusers",
}


def fold(
    model: nn.Module, blocks: Iterable[tuple[nn.Module, Any]], packs: bool = False
) -> list[tuple[nn.Module, type[nn.Module]]]:
    """Give each of these callers in ``model`` its folding class. Returns the changed modules with their old classes.

    ``blocks``: modules that are swapped or can be, and their adapters. ``packs``: whether weights are packed too. Then
    the Linears and convolutions that are left, which somebody calls as modules, get packing forms of their own.
    """
    changed: list[tuple[nn.Module, type[nn.Module]]] = []
    claimed = _claimed(blocks)
    for module in model.modules():  # a caller comes before what it calls
        kind = type(module)
        name = name_of(kind)
        adapter = f"folding.{_CALLERS[name]}" if name in _CALLERS else None
        if packs and name in _PACKED:
            adapter = f"packing.{_PACKED[name]}"
        if adapter is not None and module not in claimed and not isinstance(module, Swapped):
            forms = importlib.import_module(f"mvkernels.swap.{adapter}").FORMS
            _give(module, forms[kind if kind in forms else name], packs, changed)
        elif packs and module not in claimed and _structure(module):
            by_structure = importlib.import_module(f"mvkernels.swap.packing.{_structure(module)}")
            _give(module, by_structure.form(module), packs, changed)
        if isinstance(module, Folding):
            claimed.update(getattr(module, norm) for _, norm in module.mvk_pairs)
    if packs:
        claimed |= _computed(model)
        for module, caller in _callers(model).items():
            if type(module) in (nn.Linear, nn.Conv2d) and module not in claimed:
                adapter = "mvkernels.swap.packing.torch"
                _give(module, importlib.import_module(adapter).form(module, caller), packs, changed)
        for module in reversed([*model.modules()]):  # the inner ones first
            kind = type(module)
            name = (kind.__module__, kind.__qualname__)
            if module in claimed or isinstance(module, Swapped):
                continue
            if name in _CHAINS:
                form = importlib.import_module(f"mvkernels.swap.packing.{_CHAINS[name]}").FORMS[kind]
            elif kind.forward is nn.Sequential.forward:
                form = importlib.import_module("mvkernels.swap.packing.chain").PackingSequential
            else:
                continue
            _give(module, form, packs, changed)
    return changed


def _structure(module: nn.Module) -> str:
    """The file for blocks that hold what this module does; empty if there is none."""
    held = (module.__dict__, module._modules)
    return next((f for names, f in _STRUCTURES.items() if all(any(n in h for h in held) for n in names)), "")


def _give(module: nn.Module, form: Any, packs: bool, changed: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Give a module this form, unless there is nothing in it for the form."""
    kind = type(module)
    if replaced(kind, "forward") or not_its_own(module, "forward") or form.mvk_why_not(module):
        return
    module.__class__ = swapped_class(kind, packing(form) if packs else form)
    changed.append((module, kind))


def _callers(model: nn.Module) -> dict[nn.Module, str]:
    """The file whose code calls each module: that of the next module above which is not of PyTorch."""
    callers = {model: ""}
    for module in model.modules():
        own = type(module).__module__
        for child in module.children():
            callers.setdefault(child, callers[module] if own.partition(".")[0] == "torch" else own)
    return callers


def _claimed(blocks: Iterable[tuple[nn.Module, Any]]) -> set[nn.Module]:
    """The modules that a fused block does not call but computes itself. Their classes must not be changed."""
    claimed: set[nn.Module] = set()
    for block, adapter in blocks:
        if getattr(adapter, "CALLS_PARTS", False):
            continue
        for name in getattr(adapter, "_WATCHED", block._modules):
            child = block._modules.get(name)
            claimed.update(child.modules() if child is not None else ())
    return claimed


def _computed(model: nn.Module) -> set[nn.Module]:
    """The parts whose work a form with a plan does itself, and those of this library's own modules."""
    computed: set[nn.Module] = set()
    for module in model.modules():
        plans = isinstance(module, Swapped) and type(module).mvk_plan is not Swapped.mvk_plan
        if plans or type(module).__module__.startswith("mvkernels."):
            calls = module.mvk_calls if isinstance(module, Swapped) else ()
            for name, child in module.named_children():
                computed.update(() if calls is None or name in calls else child.modules())
    return computed
