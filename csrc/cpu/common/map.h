// A map as the registration hands it to the kernels: plain data, no torch.
#pragma once

#include <cstdint>

namespace mvk {

enum class DType { f32, f64, f16, bf16 };

// A map (B, heads, dim, H, W): strides in elements.
struct Map {
  void* data;
  int64_t b, h, d, y, x;
};

}  // namespace mvk
