// The gradient of a bias: sums of parts, in the order of the parts, so that every run gives the same bits.
#include "../common/numbers.cuh"

namespace mvk::attention {

constexpr int THREADS = 128;

// A thread has an element; neighbours are read together.
template <typename T>
__device__ __forceinline__ void sum_parts(const float* partial, T* out, int64_t size, int parts) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= size) return;
  float total = 0.0f;
#pragma unroll 8
  for (int part = 0; part < parts; part++) total += partial[part * size + at];
  out[at] = from_float<T>(total);
}

}  // namespace mvk::attention

#define BIAS(NAME, TYPE)                                                                \
  extern "C" __global__ void __launch_bounds__(mvk::attention::THREADS)                 \
      attention_bias_##NAME(const float* partial, TYPE* out, int64_t size, int parts) { \
    mvk::attention::sum_parts(partial, out, size, parts);                               \
  }

BIAS(bf16, mvk::bf16)
BIAS(f16, mvk::f16)
BIAS(f32, float)
