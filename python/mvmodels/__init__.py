"""The papers' models in plain PyTorch, on the modules of :mod:`mvkernels.nn`."""

from mvmodels import (
    coatnet,
    efficientformer,
    efficientvit,
    mobile_former,
    mobilevit,
    mobilevit_dense,
    poolformer,
)
from mvmodels.macs import count_macs
from mvmodels.registry import ModelInfo, WeightSource, create_model, list_models, load_weights, model_info

__all__ = [
    "ModelInfo",
    "WeightSource",
    "coatnet",
    "count_macs",
    "create_model",
    "efficientformer",
    "efficientvit",
    "list_models",
    "load_weights",
    "mobile_former",
    "mobilevit",
    "mobilevit_dense",
    "model_info",
    "poolformer",
]
