// A bias as order.cu leaves it: (copies, heads, tiles of rows, tiles of columns, 16 x 16), a tile as the lanes of a warp
// hold the sums of two products of 16 rows and 8 columns. In the second copy rows are keys.
#pragma once

#include "../common/fragments.cuh"

namespace mvk::attention {

__device__ __forceinline__ void to_floats(float (&x)[2], uint32_t both, bf16) {
  x[0] = __uint_as_float(both << 16), x[1] = __uint_as_float(both & 0xffff0000u);
}
__device__ __forceinline__ void to_floats(float (&x)[2], uint32_t both, f16) {
  const float2 found = __half22float2(*reinterpret_cast<const __half2*>(&both));
  x[0] = found.x, x[1] = found.y;
}

template <typename T>
struct OrderedBias {
  const T* at;
  int heads, tiles;  // of a row of scores; 0: there is no bias

  __device__ __forceinline__ bool exists() const { return tiles > 0; }

  // The first tile of a row of tiles; the next 256 numbers are those of the next one. TURNED: rows are keys.
  template <bool TURNED>
  __device__ __forceinline__ const T* row(int64_t head, int tile) const {
    return at + ((TURNED ? heads + head : head) * tiles + tile) * (256 * tiles);
  }

  // What a lane has of a tile, in the order of its scores. Half types take 16 bytes, float32 twice that, 512 bytes apart.
  static __device__ __forceinline__ void store(T* tile, int lane, const T (&from)[8]) {
    if constexpr (sizeof(T) == 2) {
      uint4 all;
      uint32_t* const words = reinterpret_cast<uint32_t*>(&all);
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = pack<T>(to_float(from[2 * i]), to_float(from[2 * i + 1]));
      reinterpret_cast<uint4*>(tile)[lane] = all;
    } else {
      reinterpret_cast<float4*>(tile)[lane] = {from[0], from[1], from[2], from[3]};
      reinterpret_cast<float4*>(tile)[lane + 32] = {from[4], from[5], from[6], from[7]};
    }
  }

  // The words of a lane.
  struct Words {
    uint4 of[sizeof(T) / 2];
  };
  static __device__ __forceinline__ void load(Words& words, const T* tile) {
#pragma unroll
    for (int n = 0; n < static_cast<int>(sizeof(T) / 2); n++) {
      words.of[n] = __ldg(reinterpret_cast<const uint4*>(tile) + lane_id() + 32 * n);
    }
  }
  // scores * scale + bias. Their exponentials are then powers of e.
  static __device__ __forceinline__ void add(float (&s)[2][4], float scale, const Words& words) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float two[2];
      if constexpr (sizeof(T) == 2) {
        const uint4& all = words.of[0];
        to_floats(two, i == 0 ? all.x : i == 1 ? all.y : i == 2 ? all.z : all.w, T());
      } else {
        const uint4& half = words.of[i / 2];
        two[0] = __uint_as_float(i % 2 ? half.z : half.x), two[1] = __uint_as_float(i % 2 ? half.w : half.y);
      }
      float* const x = &s[i / 2][i % 2 * 2];
      x[0] = fmaf(x[0], scale, two[0]), x[1] = fmaf(x[1], scale, two[1]);
    }
  }
  static __device__ __forceinline__ void add(float (&s)[2][4], float scale, const T* tile) {
    Words words;
    load(words, tile);
    add(s, scale, words);
  }
};

}  // namespace mvk::attention
