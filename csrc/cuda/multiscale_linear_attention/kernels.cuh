// The kernels of one element type and one side of the depthwise convolution; names end in the type, that side, head_dim
// and, where there are two, the width of a block's tile.
#pragma once

#include "aggregate.cuh"
#include "map_gradient.cuh"
#include "weight_gradient.cuh"

extern __shared__ __align__(16) unsigned char global_smem[];

#define MULTISCALE_KERNELS_OF(T, K, D) \
  MULTISCALE_AGGREGATE(T, K, D, 8)     \
  MULTISCALE_AGGREGATE(T, K, D, 16)    \
  MULTISCALE_MAP_GRADIENT(T, K, D, 8)  \
  MULTISCALE_MAP_GRADIENT(T, K, D, 16) \
  MULTISCALE_WEIGHT_SUMS(T, K, D)

#define MULTISCALE_KERNELS(T, K)  \
  MULTISCALE_KERNELS_OF(T, K, 16) \
  MULTISCALE_KERNELS_OF(T, K, 32) \
  MULTISCALE_WEIGHT_GRADIENTS(T)
