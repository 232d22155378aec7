// What the registration and the kernels of the inverted residual share: plain data, no torch.
#pragma once

#include "common/activations.h"
#include "common/each_isa.h"
#include "common/map.h"
#include "common/packed_sizes.h"

namespace mvk {

// The sizes of a block's weights, which packed weights begin with.
struct InvertedResidualSizes {
  int64_t panel;  // columns of a panel: of an instruction set
  int64_t inputs, hidden;
  int64_t outputs;  // 0 if there is no projection: the result is the hidden map
  int64_t kernel;
  int64_t expands;  // 1, or 0 if the depthwise convolution is the first

  MVK_SHARED int64_t panels(int64_t channels) const { return (channels + panel - 1) / panel; }
  // Where the parts of packed weights begin: expansion [panel][input][column] and its bias [column], depthwise weights
  // [panel][tap][column] and bias, projection [panel][hidden][column] and bias.
  MVK_SHARED int64_t expand() const { return kPackedHeader; }
  MVK_SHARED int64_t expand_bias() const { return expand() + expands * panels(hidden) * panel * inputs; }
  MVK_SHARED int64_t depthwise() const { return expand_bias() + expands * panels(hidden) * panel; }
  MVK_SHARED int64_t depthwise_bias() const { return depthwise() + panels(hidden) * panel * kernel * kernel; }
  MVK_SHARED int64_t project() const { return depthwise_bias() + panels(hidden) * panel; }
  MVK_SHARED int64_t project_bias() const { return project() + panels(outputs) * panel * hidden; }
  MVK_SHARED int64_t end() const { return project_bias() + panels(outputs) * panel; }
};

// Weights of convolutions as PyTorch has them, contiguous: (hidden, inputs), (hidden, kernel * kernel), (outputs, hidden); biases may
// be null.
struct InvertedResidualWeights {
  InvertedResidualSizes sizes;
  const float *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias;
  float* packed;
};

struct InvertedResidual {
  InvertedResidualSizes sizes;
  const float* packed;
  PixelMap in, out;
  int64_t B, H, W, Ho, Wo, stride;
  Activation before, activation;  // after the expansion and after the depthwise convolution
  // Of a dynamic ReLU after each of the two, in place of its activation, (B, 2, hidden): max(slope 0 * x, slope 1 * x). May be null.
  const float *slopes_before, *slopes;
  bool residual;
  int64_t chunks;     // of the rows of a picture of the output; a unit of work is one (picture, chunk)
  Stretch following;  // what is read first after this call, probably
  bool poison;        // fill scratch memory with NaN (tests)
};

// One set for each instruction set; the range is over units.
struct InvertedResidualKernels {
  int64_t panel;
  void (*pack)(const InvertedResidualWeights&);
  void (*forward)(const InvertedResidual&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(InvertedResidualKernels, inverted_residual_kernels)

}  // namespace mvk
