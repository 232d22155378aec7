"""The fused ops, one folder each: contract, reference, kernels, autograd, shape suite."""
