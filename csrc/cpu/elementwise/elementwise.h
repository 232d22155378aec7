// What the registration and the element-wise kernels around attention share: plain data, no torch.
#pragma once

#include <cstdint>

#include "common/activations.h"
#include "common/each_isa.h"
#include "common/map.h"

namespace mvk {

// A dense float32 map (B, C, H, W) and its like.
struct Maps {
  const float* in;
  float* out;  // may be `in` where each element depends on itself alone
  int64_t B, C, H, W;
  bool channels_last;

  // Of work: planes, or rows of the picture.
  MVK_SHARED int64_t units() const { return channels_last ? B * H : B * C; }
  MVK_SHARED int64_t unit_size() const { return channels_last ? W * C : H * W; }
};

struct NormActivation {
  Maps maps;
  const float *scale, *shift;  // (C,)
  Activation activation;
};

struct Pooled {
  Maps maps;
  // Factors of the channels, `next` from picture to picture: the difference times them is added to the map. May be null.
  const float* factor;
  // A number near those of a picture, as far from picture to picture, which all pixels are taken from first: it cancels
  // but for what would be rounded off otherwise. May be null.
  const float* centre;
  int64_t next;
  bool poison;  // fill scratch memory with NaN (tests)
};

// One set for each instruction set; ranges are over units.
struct ElementwiseKernels {
  void (*norm_activation)(const NormActivation&, int64_t begin, int64_t end);
  void (*pooled_difference)(const Pooled&, int64_t begin, int64_t end);
  // Mean and variance of so many elements.
  void (*moments)(const float* x, int64_t count, double* mean, double* variance);
};

MVK_EACH_ISA(ElementwiseKernels, elementwise_kernels)

}  // namespace mvk
