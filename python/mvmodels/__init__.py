"""The papers' models in plain PyTorch, on the modules of :mod:`mvkernels.nn`."""

from mvmodels import efficientvit, mobile_former
from mvmodels.macs import count_macs
from mvmodels.registry import ModelInfo, WeightSource, create_model, list_models, load_weights, model_info

__all__ = [
    "ModelInfo",
    "WeightSource",
    "count_macs",
    "create_model",
    "efficientvit",
    "list_models",
    "load_weights",
    "mobile_former",
    "model_info",
]
