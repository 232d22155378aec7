"""The models of the papers, in PyTorch with the modules of :mod:`mvkernels.nn`."""

from mvmodels import (
    coatnet,
    efficientformer,
    efficientvit,
    irregular_vit,
    mobile_former,
    mobilevit,
    mobilevit_dense,
    poolformer,
    vit,
)
from mvmodels.macs import count_macs
from mvmodels.registry import ModelInfo, WeightSource, create_model, list_models, load_weights, model_info
from mvmodels.sampler import MultiScaleBatchSampler, Resized, multi_scale_sizes

__all__ = [
    "ModelInfo",
    "MultiScaleBatchSampler",
    "Resized",
    "WeightSource",
    "coatnet",
    "count_macs",
    "create_model",
    "efficientformer",
    "efficientvit",
    "irregular_vit",
    "list_models",
    "load_weights",
    "mobile_former",
    "mobilevit",
    "mobilevit_dense",
    "model_info",
    "multi_scale_sizes",
    "poolformer",
    "vit",
]
