"""The papers' models in plain PyTorch, on the modules of :mod:`mvkernels.nn`."""

from mvmodels import irregular_vit, mobile_former, vit
from mvmodels.macs import count_macs
from mvmodels.registry import ModelInfo, WeightSource, create_model, list_models, load_weights, model_info
from mvmodels.sampler import MultiScaleBatchSampler, Resized, multi_scale_sizes

__all__ = [
    "ModelInfo",
    "MultiScaleBatchSampler",
    "Resized",
    "WeightSource",
    "count_macs",
    "create_model",
    "irregular_vit",
    "list_models",
    "load_weights",
    "mobile_former",
    "model_info",
    "multi_scale_sizes",
    "vit",
]
