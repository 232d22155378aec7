// A bias as order.cu leaves it: (copies, heads, tiles of rows, tiles of columns, 16 x 16), a tile as the lanes of a
// warp hold the sums of two products of 16 rows and 8 columns. In the second copy rows are keys.
#pragma once

#include "../common/fragments.cuh"

namespace mvk::attention {

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

  // What a lane has of a tile, in the order of its scores. Half types take 16 bytes, float32 twice that, 512 bytes
  // apart.
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
      float2 two;
      if constexpr (sizeof(T) == 2) {
        const uint4& all = words.of[0];
        two = unpack<T>(i == 0 ? all.x : i == 1 ? all.y : i == 2 ? all.z : all.w);
      } else {
        const uint4& half = words.of[i / 2];
        two = {__uint_as_float(i % 2 ? half.z : half.x), __uint_as_float(i % 2 ? half.w : half.y)};
      }
      float* const x = &s[i / 2][i % 2 * 2];
      x[0] = fmaf(x[0], scale, two.x), x[1] = fmaf(x[1], scale, two.y);
    }
  }
  static __device__ __forceinline__ void add(float (&s)[2][4], float scale, const T* tile) {
    Words words;
    load(words, tile);
    add(s, scale, words);
  }
};

constexpr float LOG2E = 1.4426950408889634f;

// A bias and a scale of scores.
template <typename T>
struct Scores {
  OrderedBias<T> bias;
  float scale, scale2;  // scale2: scale times log2(e)

  // Scores are multiplied before the maximum is looked for where there is a bias, and where that turns their order.
  __device__ __forceinline__ bool scaled() const { return bias.exists() || scale2 <= 0; }
  // By what scores are multiplied after that.
  __device__ __forceinline__ float factor() const { return scaled() ? LOG2E : scale2; }
};

}  // namespace mvk::attention
