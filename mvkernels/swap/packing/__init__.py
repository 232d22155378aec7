"""Inference with packed weights: ``swap(model, inference=True)``.

Convolutions with their norms and activations, inverted residuals and linear layers run as the ops
:func:`mvkernels.conv3x3`, :func:`mvkernels.inverted_residual` and :func:`mvkernels.pointwise`, on weights that were
packed for them once. A block whose class is known takes what stands around its products into them; a Linear or a
convolution that nobody else does the work of runs by itself (``torch.py``).
"""
