// What all packed weights have in common: plain data, no torch.
#pragma once

#include "common/map.h"

namespace mvk {

// Elements before the weights, which begin with their sizes.
constexpr int64_t kPackedHeader = 16;

// Elements of packed weights: the same for all instruction sets, as HEADER and wide() in mvkernels/ops/common/packed.py have it.
template <class Sizes>
MVK_SHARED int64_t packed_count(Sizes sizes) {
  sizes.panel = 32;  // of the widest
  return sizes.end();
}

// A stretch of memory.
struct Stretch {
  const float* from;
  int64_t bytes;
};

}  // namespace mvk
