// A map as the registration hands it to the kernels: plain data, no torch.
#pragma once

#include <cstdint>

// A member function of what all instruction sets are handed: in line, since the linker would merge copies of it, and keep
// perhaps that of a set which the processor does not have.
#define MVK_SHARED inline __attribute__((always_inline))

namespace mvk {

enum class DType { f32, f64, f16, bf16 };
MVK_SHARED int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// A map (B, heads, dim, H, W): strides in elements.
struct Map {
  void* data;
  int64_t b, h, d, y, x;
};

// A float32 map (B, C, H, W): strides in elements.
struct PixelMap {
  float* data;
  int64_t b, c, y, x;
};

}  // namespace mvk
