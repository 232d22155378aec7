// The gradient of a bias: sums of the parts that the backward left, in their order, so that every run gives the same
// bits.
#include "../common/numbers.cuh"

namespace mvk::attention {

constexpr int THREADS = 128;

// A thread has a sum of the parts, which are as the lanes of the backward have them: by tiles of 16 queries and 16
// keys, of 8 columns and a lane of four sums each. Rows are queries, or, turned, keys. Neighbours are read together.
template <typename T>
__device__ __forceinline__ void sum_parts(
    const float* partial, T* out, int64_t size, int parts, int tiles, int tokens, int turned) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (at >= size) return;
  const int inside = at % 256, lane = inside / 4 % 32, tile = at / 256 % (tiles * tiles);
  const int column = inside / 128 * 8 + 2 * (lane % 4) + inside % 2, row = inside / 2 % 2 * 8 + lane / 4;
  const int query = tile / tiles * 16 + (turned ? column : row);
  const int key = tile % tiles * 16 + (turned ? row : column);
  if (query >= tokens || key >= tokens) return;
  float total = 0.0f;
#pragma unroll 16
  for (int part = 0; part < parts; part++) total += partial[part * size + at];
  const int64_t head = at / (256 * tiles * tiles);
  out[(head * tokens + query) * tokens + key] = from_float<T>(total);
}

}  // namespace mvk::attention

#define BIAS(NAME, TYPE)                                                                             \
  extern "C" __global__ void __launch_bounds__(mvk::attention::THREADS) attention_bias_##NAME(       \
      const float* partial, TYPE* out, int64_t size, int parts, int tiles, int tokens, int turned) { \
    mvk::attention::sum_parts(partial, out, size, parts, tiles, tokens, turned);                     \
  }

BIAS(bf16, mvk::bf16)
BIAS(f16, mvk::f16)
BIAS(f32, float)
