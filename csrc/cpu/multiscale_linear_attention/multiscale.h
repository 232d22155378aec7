// What the registration and the kernels of multi-scale linear attention share: plain data, no torch.
#pragma once

#include "common/each_isa.h"
#include "common/linear_attention.h"

namespace mvk {

// One more scale: a depthwise convolution, then a pointwise one in groups of D channels. Strides in elements.
struct Scale {
  int64_t k;
  const void *depthwise, *depthwise_bias, *pointwise, *pointwise_bias;  // biases may be null
  int64_t depthwise_c, depthwise_y, depthwise_x, depthwise_bias_c, pointwise_o, pointwise_c, pointwise_bias_o;
  void *ddepthwise, *ddepthwise_bias, *dpointwise, *dpointwise_bias;  // contiguous; those of biases may be null
};

// The channels of qkv are, for each head, D of each of the three parts q, k and v; those of the output heads of D, the first scale's
// first.
struct Multiscale {
  DType dtype;
  int64_t B, heads, D, H, W, S;  // S scales besides qkv itself
  double eps;
  Map qkv, dqkv;  // (B, 3 * heads, D, H, W)
  Map out, grad;  // (B, (1 + S) * heads, D, H, W)
  const Scale* scales;
  void *kv, *keys;  // (B, (1 + S) * heads, D, D), (B, (1 + S) * heads, D); null in a forward: not wanted

  // A unit of work is one (batch, head, chunk): chunks split the rows of the map when there are fewer units than threads. A
  // kernel then runs in stages, with what they share in memory that is there for each (batch, head).
  int64_t chunks;
  Stage stage;
  void* partial;  // sums of each unit and scale: [units][1 + S][D + 1][D], if chunks > 1
  void* planes;   // of the backward: [B * heads][planes_size()], if chunks > 1
  void* weights;  // sums of each unit for the weights: [units][weights_size()]

  bool poison;

  MVK_SHARED int64_t groups() const { return (1 + S) * heads; }
  MVK_SHARED int64_t pixels() const { return H * W; }
  MVK_SHARED int64_t units() const { return B * heads * chunks; }
  MVK_SHARED int64_t sums_size() const { return (D + 1) * D; }
  MVK_SHARED int64_t row_size() const { return (pixels() + 63) / 64 * 64 + 64; }
  MVK_SHARED int64_t plane_size(int64_t k) const { return (H * (W + k - 1) + 63) / 64 * 64 + 64; }
  // Gradients on their way to qkv: of the scale without convolutions, then of what each depthwise convolution gave.
  MVK_SHARED int64_t planes_size() const {
    int64_t size = 3 * D * row_size();
    for (int64_t s = 0; s < S; ++s) size += 3 * D * plane_size(scales[s].k);
    return size;
  }
  // For each scale: [3 D][k k], [3 D], [3 D][D], [3 D].
  MVK_SHARED int64_t weights_of(int64_t s) const { return 3 * D * (scales[s].k * scales[s].k + 1 + D + 1); }
  MVK_SHARED int64_t weights_size() const {
    int64_t size = 0;
    for (int64_t s = 0; s < S; ++s) size += weights_of(s);
    return size;
  }
};

// For each instruction set; ranges are over units, of the last over heads.
struct MultiscaleKernels {
  void (*forward)(const Multiscale&, int64_t begin, int64_t end);
};
struct MultiscaleBackwardKernels {
  void (*backward)(const Multiscale&, int64_t begin, int64_t end);
  void (*sum_weights)(const Multiscale&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(MultiscaleKernels, multiscale_kernels)
MVK_EACH_ISA(MultiscaleBackwardKernels, multiscale_backward_kernels)

}  // namespace mvk
