// A bias in the order in which warps hold scores, so that a lane reads what it needs of a tile with one or two loads of
// 16 bytes: tile after tile of 16 queries and 16 keys, padded to whole tiles. Small beside any map, and read many
// times.
//
// A thread makes a lane's part of a tile: eight reads, which go on at once, and a write.
#include "ordered_bias.cuh"

namespace mvk::attention {

constexpr int ORDER_THREADS = 128;

// Keys beyond the last have no weight; queries beyond it are not stored. Of `copies`, the second is for tiles whose
// rows are keys.
template <typename T>
__device__ __forceinline__ void order_bias(
    const T* bias, T* ordered, int64_t head_stride, int64_t query_stride, int64_t key_stride, int heads, int tokens,
    int tiles, int copies) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * ORDER_THREADS + threadIdx.x;
  const int lane = at % 32;
  int64_t rest = at / 32;
  const int column = rest % tiles;
  rest /= tiles;
  const int row = rest % tiles;
  rest /= tiles;
  if (rest >= static_cast<int64_t>(heads) * copies) return;
  const bool turned = rest >= heads;
  const T* const from = bias + rest % heads * head_stride;
  T found[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int y = row * 16 + i / 2 % 2 * 8 + lane / 4, x = column * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int query = turned ? x : y, key = turned ? y : x;
    const bool there = query < tokens && key < tokens;
    found[i] = from_float<T>(key < tokens ? 0.0f : -INFINITY);
    if (there) found[i] = from[query * query_stride + key * key_stride];
  }
  OrderedBias<T>::store(ordered + at / 32 * 256, lane, found);
}

}  // namespace mvk::attention

#define ORDER(NAME, TYPE)                                                                                          \
  extern "C" __global__ void __launch_bounds__(mvk::attention::ORDER_THREADS) attention_order_##NAME(              \
      const TYPE* bias, TYPE* ordered, int64_t head, int64_t query, int64_t key, int heads, int tokens, int tiles, \
      int copies) {                                                                                                \
    mvk::attention::order_bias(bias, ordered, head, query, key, heads, tokens, tiles, copies);                     \
  }

ORDER(bf16, mvk::bf16)
ORDER(f16, mvk::f16)
ORDER(f32, float)
