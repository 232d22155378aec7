// Operands of a warp's products: of half types as they are, of float32 as TF32, split in two where products are exact.
//
// Left<K> is 16 rows of K columns (A of the PTX manual), Right<K> K rows of 8 columns (B), K is 16 or 8. Tiles lie in
// shared memory by rows of `stride` elements; `at` is the address of the first element that is asked for. A product
// over K = 8 columns of what a tile has left reads no more than those.
//
// Sums of a product become the left operand of the next without leaving their registers. Where TF32 is that operand,
// its columns t and t + 4 are the columns 2t and 2t + 1 of the sums: the right operand's rows go in the same order.
#pragma once

#include "matrix.cuh"

namespace mvk {

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }

__device__ __forceinline__ float load_shared(uint32_t at) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
}
__device__ __forceinline__ void load_shared(float4& x, uint32_t at) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_shared(uint4& x, uint32_t at) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void load_shared(uint2& x, uint32_t at) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
}
// Without a branch, around which the compiler would make two versions of all that follows.
__device__ __forceinline__ void load_shared_if(float4& x, uint32_t at, bool keep) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];}"
               : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
               : "r"(at), "r"(static_cast<int>(keep))
               : "memory");
}
__device__ __forceinline__ void load_shared_if(uint32_t& x, uint32_t at, bool keep) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %2, 0; @p ld.shared.b32 %0, [%1];}"
               : "+r"(x)
               : "r"(at), "r"(static_cast<int>(keep))
               : "memory");
}
__device__ __forceinline__ void store_shared_if(uint32_t at, const float4& x, bool keep) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.shared.v4.f32 [%0], {%1, %2, %3, %4};}" ::"r"(at), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w), "r"(static_cast<int>(keep))
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x), "f"(y) : "memory");
}

template <typename T>
struct Halves {
  using Element = T;
  static constexpr bool HALF = true;
  static constexpr bool ROUNDED = true;  // what becomes an operand
  // Of a row with `columns` elements: an odd number of 16 bytes, so that eight rows lie in different banks.
  static __host__ __device__ constexpr int stride(int columns) { return ((columns + 7) / 8 | 1) * 8; }
  // Of a row with a multiple of 16 tokens, written by pairs of them, read by columns.
  static __host__ __device__ constexpr int pairs_stride(int tokens) { return tokens + 8; }

  template <int K>
  struct Left {
    uint32_t of[K / 4];
  };
  template <int K>
  struct Right {
    uint32_t of[K / 8];
  };

  // What a lane adds to the address of a tile whose rows have STRIDE elements. Of loads of two matrices only the first
  // 16 lanes' addresses count: `row` serves all loads but those of right operands by 16 columns.
  template <int STRIDE>
  struct Lanes {
    uint32_t row = 2 * ((lane_id() & 15) * STRIDE + (lane_id() >> 4) * 8);
    uint32_t right = 2 * (((lane_id() & 7) + (lane_id() >> 4) * 8) * STRIDE + (lane_id() & 8));
    // Keeps the compiler from computing them anew at each use, where registers are to spare.
    __device__ __forceinline__ void keep() { asm volatile("" : "+r"(row), "+r"(right)); }
  };
  template <int K, int STRIDE>
  static __device__ __forceinline__ void load(Left<K>& a, uint32_t at, const Lanes<STRIDE>& lanes) {
    load_matrices(a.of, at + lanes.row);
  }
  // Of a tile whose rows are the operand's columns, of which there are 16.
  static __device__ __forceinline__ void load_transposed(Left<16>& a, uint32_t at, int stride) {
    const int lane = lane_id();
    const int row = (lane & 7) + (lane >> 4) * 8, column = lane & 8;
    load_matrices_transposed(a.of, at + 2 * (row * stride + column));
  }
  // Two neighbours, of a tile whose rows are the operands' columns.
  template <int K, int STRIDE>
  static __device__ __forceinline__ void load(Right<K> (&b)[2], uint32_t at, const Lanes<STRIDE>& lanes) {
    if constexpr (K == 16) {
      uint32_t both[4];
      load_matrices(both, at + lanes.right);
      b[0].of[0] = both[0], b[0].of[1] = both[1], b[1].of[0] = both[2], b[1].of[1] = both[3];
    } else {
      uint32_t both[2];
      load_matrices(both, at + lanes.row);
      b[0].of[0] = both[0], b[1].of[0] = both[1];
    }
  }
  // Rows as those of the tile: 16 tokens. Two neighbours, or one.
  template <int STRIDE>
  static __device__ __forceinline__ void load_tokens(Right<16> (&b)[2], uint32_t at, const Lanes<STRIDE>& lanes) {
    uint32_t both[4];
    load_matrices_transposed(both, at + lanes.row);
    b[0].of[0] = both[0], b[0].of[1] = both[1], b[1].of[0] = both[2], b[1].of[1] = both[3];
  }
  template <int STRIDE>
  static __device__ __forceinline__ void load_tokens(Right<16> (&b)[1], uint32_t at, const Lanes<STRIDE>& lanes) {
    load_matrices_transposed(b[0].of, at + lanes.row);
  }
  static __device__ __forceinline__ void from_sums(Left<16>& a, const float (&low)[4], const float (&high)[4]) {
    a.of[0] = pack<T>(low[0], low[1]), a.of[1] = pack<T>(low[2], low[3]);
    a.of[2] = pack<T>(high[0], high[1]), a.of[3] = pack<T>(high[2], high[3]);
  }
  // Two neighbouring columns of a row.
  static __device__ __forceinline__ void store(uint32_t at, float x, float y) { store_shared(at, pack<T>(x, y)); }
  // Sums and the left operand that was made of them, to 16 rows of 16 tokens.
  static __device__ __forceinline__ void store_tokens(
      uint32_t at, int stride, const Left<16>& a, const float (&)[4], const float (&)[4]) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    const uint32_t mine = at + 2 * (g * stride + 2 * t);
    store_shared(mine, a.of[0]), store_shared(mine + 16 * stride, a.of[1]);
    store_shared(mine + 16, a.of[2]), store_shared(mine + 16 * stride + 16, a.of[3]);
  }
  static __device__ __forceinline__ void set_ones(Right<16>& b) { b.of[0] = b.of[1] = pack<T>(1.0f, 1.0f); }
  template <bool TURNED>
  static __device__ __forceinline__ void multiply(float (&c)[4], const Left<16>& a, const Right<16>& b) {
    multiply_16<T>(c, a.of, b.of);
  }
  template <bool TURNED>
  static __device__ __forceinline__ void multiply(float (&c)[4], const Left<8>& a, const Right<8>& b) {
    multiply_8<T>(c, a.of, b.of[0]);
  }
};

// EXACT: each operand is a sum of two TF32 numbers, and of their four products three are taken.
template <bool EXACT>
struct Singles {
  using Element = float;
  static constexpr bool HALF = false;
  static constexpr bool ROUNDED = !EXACT;
  static __host__ __device__ constexpr int stride(int columns) { return (columns + 7) / 8 * 8 + 4; }
  static __host__ __device__ constexpr int pairs_stride(int tokens) { return tokens + 4; }

  template <int N>
  struct Numbers {
    uint32_t of[N], rest[EXACT ? N : 1];
    __device__ __forceinline__ void set(int i, float x) {
      of[i] = to_tf32(x);
      if constexpr (EXACT) {
        // An infinity is all rest: against the rest of its partner it would become one of either sign.
        if (!(fabsf(x) < __int_as_float(0x7f000000))) of[i] = 0;
        rest[i] = to_tf32(x - __uint_as_float(of[i]));
      }
    }
  };
  template <int K>
  struct Left : Numbers<K / 2> {};
  template <int K>
  struct Right : Numbers<K / 4> {};

  template <int STRIDE>
  struct Lanes {
    uint32_t row = 4 * ((lane_id() >> 2) * STRIDE + (lane_id() & 3));
    uint32_t tokens = 4 * (2 * (lane_id() & 3) * STRIDE + (lane_id() >> 2));
    __device__ __forceinline__ void keep() {}
  };
  template <int K, int STRIDE>
  static __device__ __forceinline__ void load(Left<K>& a, uint32_t at, const Lanes<STRIDE>& lanes) {
    const uint32_t mine = at + lanes.row;
#pragma unroll
    for (int i = 0; i < K / 2; i++) {
      a.set(i, load_shared(mine + 4 * ((i & 1) * 8 * STRIDE + (i >> 1) * 4)));
    }
  }
  static __device__ __forceinline__ void load_transposed(Left<16>& a, uint32_t at, int stride) {
    const uint32_t mine = at + 4 * (2 * (lane_id() & 3) * stride + (lane_id() >> 2));
#pragma unroll
    for (int i = 0; i < 8; i++) {
      a.set(i, load_shared(mine + 4 * (((i >> 2) * 8 + (i >> 1 & 1)) * stride + (i & 1) * 8)));
    }
  }
  template <int K, int STRIDE>
  static __device__ __forceinline__ void load(Right<K> (&b)[2], uint32_t at, const Lanes<STRIDE>& lanes) {
    const uint32_t mine = at + lanes.row;
#pragma unroll
    for (int i = 0; i < K / 2; i++) {
      b[i / (K / 4)].set(i % (K / 4), load_shared(mine + 4 * (i / (K / 4) * 8 * STRIDE + i % (K / 4) * 4)));
    }
  }
  template <int N, int STRIDE>
  static __device__ __forceinline__ void load_tokens(Right<16> (&b)[N], uint32_t at, const Lanes<STRIDE>& lanes) {
    const uint32_t mine = at + lanes.tokens;
#pragma unroll
    for (int i = 0; i < 4 * N; i++) {
      b[i / 4].set(i % 4, load_shared(mine + 4 * (((i >> 1 & 1) * 8 + (i & 1)) * STRIDE + i / 4 * 8)));
    }
  }
  static __device__ __forceinline__ void from_sums(Left<16>& a, const float (&low)[4], const float (&high)[4]) {
    constexpr int order[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; i++) a.set(i, low[order[i]]), a.set(4 + i, high[order[i]]);
  }
  static __device__ __forceinline__ void store(uint32_t at, float x, float y) { store_shared(at, x, y); }
  static __device__ __forceinline__ void store_tokens(
      uint32_t at, int stride, const Left<16>&, const float (&low)[4], const float (&high)[4]) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    const uint32_t mine = at + 4 * (g * stride + 2 * t);
    store_shared(mine, low[0], low[1]), store_shared(mine + 32 * stride, low[2], low[3]);
    store_shared(mine + 32, high[0], high[1]), store_shared(mine + 32 * stride + 32, high[2], high[3]);
  }
  static __device__ __forceinline__ void set_ones(Right<16>& b) {
#pragma unroll
    for (int i = 0; i < 4; i++) b.set(i, 1.0f);
  }
  // TURNED: the transpose of another product, whose sums are these in every bit.
  template <bool TURNED, int K>
  static __device__ __forceinline__ void multiply(float (&c)[4], const Left<K>& a, const Right<K>& b) {
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
      const uint32_t left[4] = {a.of[4 * i], a.of[4 * i + 1], a.of[4 * i + 2], a.of[4 * i + 3]};
      const uint32_t right[2] = {b.of[2 * i], b.of[2 * i + 1]};
      if constexpr (EXACT) {
        const uint32_t left_rest[4] = {a.rest[4 * i], a.rest[4 * i + 1], a.rest[4 * i + 2], a.rest[4 * i + 3]};
        const uint32_t right_rest[2] = {b.rest[2 * i], b.rest[2 * i + 1]};
        if constexpr (TURNED) {
          multiply_tf32(c, left, right_rest);
          multiply_tf32(c, left_rest, right);
        } else {
          multiply_tf32(c, left_rest, right);
          multiply_tf32(c, left, right_rest);
        }
      }
      multiply_tf32(c, left, right);
    }
  }
};

}  // namespace mvk
