"""Inference with packed weights: ``swap(model, inference=True)``.

Convolutions with their norms and activations, inverted residuals and linear layers with their LayerNorms run as the ops
:func:`mvkernels.conv3x3`, :func:`mvkernels.inverted_residual` and :func:`mvkernels.pointwise`, on weights that were
packed for them once.
"""
