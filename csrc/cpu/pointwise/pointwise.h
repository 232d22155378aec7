// What the registration and the kernels of the 1x1 convolution share: plain data, no torch.
#pragma once

#include "common/activations.h"
#include "common/each_isa.h"
#include "common/map.h"
#include "common/packed_sizes.h"

namespace mvk {

// The sizes of a product's weights, which packed weights begin with.
struct PointwiseSizes {
  int64_t panel;  // columns of a panel: of an instruction set
  int64_t inputs, outputs;
  int64_t normed;  // whether a LayerNorm stands before, whose weight and bias are folded in

  MVK_SHARED int64_t panels() const { return (outputs + panel - 1) / panel; }
  // [panel][input][column], then the bias [column].
  MVK_SHARED int64_t weights() const { return kPackedHeader; }
  MVK_SHARED int64_t bias() const { return weights() + panels() * panel * inputs; }
  MVK_SHARED int64_t end() const { return bias() + panels() * panel; }
};

// Weights as PyTorch has them, contiguous: (outputs, inputs) and (outputs,), and the norm's, (inputs,). All but `weight` may be null.
struct PointwiseWeights {
  PointwiseSizes sizes;
  const float *weight, *bias, *norm_weight, *norm_bias;
  float* packed;
};

struct Pointwise {
  PointwiseSizes sizes;
  const float* packed;
  PixelMap in, out, residual;  // residual: data are null without
  // Factors of the input's channels, `next_gate` from picture to picture, and what is subtracted from them first and added then. May
  // be null, the last two also alone.
  const float *gate, *centre, *shift;
  int64_t next_gate;
  int64_t H, W;
  double eps;  // of the norm
  Activation activation;
  // Pixels that are equally far apart in all maps are one line: of the whole call, of a picture, or of its rows. A unit of work is
  // a block of a line.
  int64_t lines, length, block;
  Stretch following;  // what is read first after this call, probably
  bool poison;        // fill scratch memory with NaN (tests)

  MVK_SHARED int64_t blocks() const { return (length + block - 1) / block; }
};

// One set for each instruction set; the range is over units.
struct PointwiseKernels {
  int64_t panel;
  void (*pack)(const PointwiseWeights&);
  void (*forward)(const Pointwise&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(PointwiseKernels, pointwise_kernels)

}  // namespace mvk
