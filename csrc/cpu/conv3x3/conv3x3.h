// What the registration and the kernels of the dense 3x3 convolution share: plain data, no torch.
#pragma once

#include "common/activations.h"
#include "common/each_isa.h"
#include "common/map.h"
#include "common/packed_sizes.h"

namespace mvk {

// The sizes of a convolution's weights, which packed weights begin with.
struct Conv3x3Sizes {
  int64_t panel;  // columns of a panel: of an instruction set
  int64_t inputs, outputs;
  int64_t tile;  // side of the outputs of Winograd's algorithm, 2 or 4; 0 for the direct one

  MVK_SHARED int64_t panels() const { return (outputs + panel - 1) / panel; }
  MVK_SHARED int64_t points() const { return tile ? (tile + 2) * (tile + 2) : 9; }
  // Winograd's [point][panel][input][column], or [panel][tap][input][column], then the bias [column].
  MVK_SHARED int64_t weights() const { return kPackedHeader; }
  MVK_SHARED int64_t bias() const { return weights() + points() * panels() * panel * inputs; }
  MVK_SHARED int64_t end() const { return bias() + panels() * panel; }
};

struct Conv3x3 {
  Conv3x3Sizes sizes;
  const float* packed;
  PixelMap in, beside;  // beside: the channels from `first` on; its data are null if there is no second map
  int64_t first;
  PixelMap residual, out;  // residual: data are null without
  int64_t B, H, W, Ho, Wo, stride;
  Activation activation;
  int64_t chunks;     // of a picture's work; a unit is one (picture, chunk)
  Stretch following;  // what is read first after this call, probably
  bool poison;        // fill scratch memory with NaN (tests)
};

// One set for each instruction set; the range is over units.
struct Conv3x3Kernels {
  int64_t panel;
  // weight (outputs, inputs, 3, 3), contiguous; bias (outputs,) or null
  void (*pack)(const Conv3x3Sizes&, const float* weight, const float* bias, float* packed);
  void (*forward)(const Conv3x3&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(Conv3x3Kernels, conv3x3_kernels)

}  // namespace mvk
