// What the kernels of multiscale_linear_attention's convolutions share.
//
// Maps have their channels contiguous. A block works on SLAB channels, whole groups of D, of a tile of TY x TX pixels.
// A warp has a square of 4 x 4 pixels of it, and a lane two channels of these: 32 sums, and every access to shared
// memory of a pixel is one run of all lanes.
#pragma once

#include "common/copies.cuh"
#include "common/matrix.cuh"

namespace mvk {
using f32 = float;
}

namespace mvk::multiscale {

constexpr int SIDE = 4;  // of a warp's square
constexpr int SQUARE = SIDE * SIDE;
constexpr int TY = 8;  // rows of a block's tile

template <typename T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));  // elements of a load

template <int D>
constexpr int SLAB = 64 / D * D;

// Elements from one pixel to the next in shared memory, where rows of a matrix are read 8 at once: these use all banks.
// What lanes read in runs alone is SLAB elements apart.
template <typename T, int D>
constexpr int PITCH = SLAB<D> + VECTOR<T>;

// The same of a tap's weights: what a thread writes of a channel after the other lies in other banks.
template <int D>
constexpr int TAP_PITCH = SLAB<D> + 2;

template <typename T, int D>
constexpr int MIX_PITCH = D + VECTOR<T>;

// Two neighbouring channels as float32, and back.
__device__ __forceinline__ float2 read_two(const float* at) { return *reinterpret_cast<const float2*>(at); }
template <typename T>
__device__ __forceinline__ float2 read_two(const T* at) {
  return unpack<T>(*reinterpret_cast<const uint32_t*>(at));
}

template <typename T>
__device__ __forceinline__ void write_two(T* to, float low, float high) {
  *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
}
template <>
__device__ __forceinline__ void write_two<float>(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = make_float2(low, high);
}

// The same number. What follows from it is computed where it is wanted: else the compiler does so before a loop, and
// keeps it in registers all the time.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A map (batch, pixels, channels) as kernels take it: strides in elements.
struct Strides {
  int64_t batch, y, x;
};

// Where the tile is that a block works on; the tiles of a map go one after the other, then those of the next map.
struct Place {
  int x, y, batch;

  __device__ Place(int tile, int columns, int rows) {
    const int row = tile / columns;
    x = tile - row * columns;
    batch = row / rows;
    y = row - batch * rows;
  }
  __device__ void advance(int columns, int rows) {
    if (++x == columns) {
      x = 0;
      if (++y == rows) {
        y = 0;
        ++batch;
      }
    }
  }
};

// Starts copying ROWS x COLS pixels from (y, x) on, which may lie outside of the map: zeros then, as for channels that
// are not there; of such a place the address is not read. A warp takes every WARPS-th row, a lane the same channels of
// all its pixels, so that addresses only advance.
template <typename T, int D, int ROWS, int COLS, int WARPS, int PIXEL>
__device__ __forceinline__ void copy_tile(
    T* to, const T* plane, int y, int x, int height, int width, const Strides& strides, int channels) {
  constexpr int PIECES = SLAB<D> / VECTOR<T>, PIXELS = 32 / PIECES;
  static_assert(32 % PIECES == 0);
  const int thread = opaque(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first = lane / PIECES, channel = lane % PIECES * VECTOR<T>;
  const uintptr_t from = reinterpret_cast<uintptr_t>(plane) +
                         ((y + warp) * strides.y + (x + first) * strides.x + channel) * static_cast<int>(sizeof(T));
  const int64_t down = strides.y * (WARPS * static_cast<int>(sizeof(T)));
  const int64_t right = strides.x * (PIXELS * static_cast<int>(sizeof(T)));
  const uint32_t at = shared_address(to + (warp * COLS + first) * PIXEL + channel);
  const bool used = channel < channels;
#pragma unroll
  for (int j = 0; j < (ROWS + WARPS - 1) / WARPS; ++j) {
    const bool row = used && static_cast<unsigned>(y + warp + j * WARPS) < static_cast<unsigned>(height);
    if (ROWS % WARPS == 0 || j < ROWS / WARPS || warp + j * WARPS < ROWS) {
#pragma unroll
      for (int i = 0; i < (COLS + PIXELS - 1) / PIXELS; ++i) {
        const bool keep = row && static_cast<unsigned>(x + first + i * PIXELS) < static_cast<unsigned>(width);
        if (COLS % PIXELS == 0 || i < COLS / PIXELS || first + i * PIXELS < COLS) {
          copy_async_if<16>(
              at + (j * WARPS * COLS + i * PIXELS) * PIXEL * static_cast<int>(sizeof(T)),
              reinterpret_cast<const void*>(from + j * down + i * right), keep);
        }
      }
    }
  }
}

// Calls each(place in shared memory, place in the map, whether there is such a place) for a square: 16 bytes a lane.
// `rows` and `columns`: of the map from the square's first pixel, `to`, on; PIXEL: elements from one pixel to the next.
template <typename T, int D, int PIXEL, typename Map, typename Each>
__device__ __forceinline__ void each_piece(
    T* own, Map* to, const Strides& strides, int rows, int columns, int channels, Each each) {
  constexpr int PIECES = SLAB<D> / VECTOR<T>, PIXELS = 32 / PIECES;
  static_assert(SIDE % PIXELS == 0);
  const int lane = threadIdx.x % 32, first = lane / PIECES, channel = lane % PIECES * VECTOR<T>;
  own += first * PIXEL + channel;
  to += first * strides.x + channel;
  rows = channel < channels ? rows : 0;
  columns -= first;
#pragma unroll
  for (int p = 0; p < SQUARE; p += PIXELS) {
    each(own + p * PIXEL, to + p / SIDE * strides.y + p % SIDE * strides.x, p / SIDE < rows && p % SIDE < columns);
  }
}

// Starts copying a warp's square, zeros where there is no map.
template <typename T, int D, int PIXEL>
__device__ __forceinline__ void copy_square(
    T* own, const T* from, const Strides& strides, int rows, int columns, int channels) {
  each_piece<T, D, PIXEL>(own, from, strides, rows, columns, channels, [](T* to, const T* at, bool there) {
    copy_async_if<16>(shared_address(to), at, there);
  });
}

// Stores a warp's square.
template <typename T, int D, int PIXEL>
__device__ __forceinline__ void store_square(
    T* own, T* to, const Strides& strides, int rows, int columns, int channels) {
  each_piece<T, D, PIXEL>(own, to, strides, rows, columns, channels, [](const T* from, T* at, bool there) {
    if (there) *reinterpret_cast<uint4*>(at) = *reinterpret_cast<const uint4*>(from);
  });
}

// A block's tiles of one slab, with the border that a kernel of K x K reaches, one after the other. WARPS: of a block;
// PIXEL: elements from one pixel to the next.
template <typename T, int K, int D, int TX, int WARPS = TY / SIDE * (TX / SIDE), int PIXEL = SLAB<D>>
struct Tiles {
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int ROWS = TY + K - 1, COLS = TX + K - 1;
  static constexpr int SQUARES = (ROWS * COLS + SQUARE - 1) / SQUARE;  // 16 pixels each, some of the last unused
  static constexpr int SIZE = SQUARES * SQUARE * PIXEL;                // elements of a buffer

  int left;  // channels of the map, from the slab's first on
  int height, width, rows, columns, begin, count, buffers;

  __device__ Tiles(int left, int height, int width, int rows, int columns, int begin, int tiles, int steps, int buffers)
      : left(left),
        height(height),
        width(width),
        rows(rows),
        columns(columns),
        begin(begin),
        count(min(steps, tiles - begin)),
        buffers(buffers) {}

  // Calls work(buffer, tile, batch, y, x) for each tile; `map` is its first channel. With two buffers the next tile is
  // copied while a block works on one. copy_more(buffer, batch, y, x) starts copying what else is read of a tile, and
  // prepare() is called once, while the first tile is on its way.
  template <typename More, typename Prepare, typename Work>
  __device__ __forceinline__ void each(
      T* memory, const T* map, const Strides& strides, More copy_more, Prepare prepare, Work work) const {
    const int lead = buffers - 1;
    Place place(begin, columns, rows);
    for (int i = -lead; i < count; ++i) {
      if (lead && i >= 0) {
        wait_copies<0>();
        __syncthreads();  // this tile is there, and the one before is read
      } else if (i > 0) {
        __syncthreads();
      }
      if (i + lead < count) {
        Place next = place;
        if (lead && i >= 0) next.advance(columns, rows);
        const int buffer = (i + lead) % 2 * lead;
        copy_tile<T, D, ROWS, COLS, WARPS, PIXEL>(
            memory + buffer * SIZE, map + next.batch * strides.batch, next.y * TY - K / 2, next.x * TX - K / 2, height,
            width, strides, left);
        copy_more(buffer, next.batch, next.y * TY, next.x * TX);
        commit_copies();
      }
      if (i + lead == 0) prepare();
      if (i < 0) continue;
      if (!lead) {
        wait_copies<0>();
        __syncthreads();
      }
      const int buffer = i % 2 * lead;
      work(buffer, memory + buffer * SIZE, place.batch, place.y * TY, place.x * TX);
      place.advance(columns, rows);
    }
  }
};

// The weights (channels, K * K) of a slab as float32 (K * K, TAP_PITCH); REVERSED: the last tap first.
template <typename T, int K, int D, int THREADS, bool REVERSED>
__device__ __forceinline__ void read_taps(float* taps, const T* wide, int channels) {
  constexpr int TAPS = K * K, ALL = TAPS * SLAB<D>, EACH = (ALL + THREADS - 1) / THREADS;
  const int thread = opaque(threadIdx.x);
  T found[EACH];  // all are asked for before the first is there
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int i = thread + j * THREADS;
    found[j] = i < min(ALL, channels * TAPS) ? wide[i] : from_float<T>(0.0f);
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int i = thread + j * THREADS, channel = i / TAPS, tap = i % TAPS;
    if (i < ALL) taps[(REVERSED ? TAPS - 1 - tap : tap) * TAP_PITCH<D> + channel] = to_float(found[j]);
  }
}

// Starts copying the weights (out, D in) of a slab's groups.
template <typename T, int D, int THREADS>
__device__ __forceinline__ void copy_mixing(T* to, const T* mixing, int channels) {
  constexpr int PIECES = D / VECTOR<T>;
  for (int i = threadIdx.x; i < SLAB<D> * PIECES; i += THREADS) {
    const int row = i / PIECES, part = i % PIECES * VECTOR<T>;
    const bool keep = row < channels;
    copy_async_if<16>(shared_address(to + row * MIX_PITCH<T, D> + part), mixing + (keep ? row * D + part : 0), keep);
  }
}

// A bias of a slab, or zeros.
template <typename T, int D, int THREADS>
__device__ __forceinline__ void read_bias(float* to, const T* bias, bool given, int channels) {
  for (int i = threadIdx.x; i < SLAB<D>; i += THREADS) to[i] = given && i < channels ? to_float(bias[i]) : 0.0f;
}

// Adds to a lane's sums the taps of its two channels; `tile` is the first pixel under the square's first tap. Every
// pixel is read and made float32 once.
template <typename T, int K, int D, int COLS, int PIXEL>
__device__ __forceinline__ void add_taps(float (&sums)[SQUARE][2], const T* tile, const float* taps) {
#pragma unroll
  for (int row = 0; row < SIDE + K - 1; ++row) {
#pragma unroll
    for (int col = 0; col < SIDE + K - 1; ++col) {
      const float2 value = read_two(tile + (row * COLS + col) * PIXEL);
#pragma unroll
      for (int y = 0; y < SIDE; ++y) {
#pragma unroll
        for (int x = 0; x < SIDE; ++x) {
          const int dy = row - y, dx = col - x;
          if (dy >= 0 && dy < K && dx >= 0 && dx < K) {
            const float2 tap = read_two(taps + (dy * K + dx) * TAP_PITCH<D>);
            sums[y * SIDE + x][0] = fmaf(value.x, tap.x, sums[y * SIDE + x][0]);
            sums[y * SIDE + x][1] = fmaf(value.y, tap.y, sums[y * SIDE + x][1]);
          }
        }
      }
    }
  }
}

// Of 16 pixels of a half type the product of each group's D channels with its weights `mix` (out, in), or with their
// TRANSPOSE: fragments of 8 channels each. All are made before one is used: none waits for another. `bias`: what is
// added, or null.
template <typename T, int D, bool TRANSPOSE>
__device__ __forceinline__ void multiply_halves(
    float (&c)[SLAB<D> / 8][4], const T* rows, const T* mix, const float* bias) {
  const int lane = threadIdx.x % 32;
  constexpr int GROUPS = SLAB<D> / D;
  uint32_t a[GROUPS][D / 16][4];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const T* row = rows + lane % 16 * PITCH<T, D> + group * D + k * 16 + lane / 16 * 8;
      load_matrices(a[group][k], shared_address(row));
    }
  }
#pragma unroll
  for (int n = 0; n < SLAB<D> / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = bias ? bias[n * 8 + lane % 4 * 2 + i % 2] : 0.0f;
  }
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {  // two tiles of 8 channels
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        uint32_t b[4];
        if constexpr (TRANSPOSE) {
          const T* row = mix + (group * D + k * 16 + lane % 16) * MIX_PITCH<T, D> + n * 16 + lane / 16 * 8;
          load_matrices_transposed(b, shared_address(row));
        } else {
          const int out = group * D + n * 16 + lane / 16 * 8 + lane % 8;
          load_matrices(b, shared_address(mix + out * MIX_PITCH<T, D> + k * 16 + lane / 8 % 2 * 8));
        }
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        multiply_16<T>(c[(group * D + n * 16) / 8], a[group][k], low);
        multiply_16<T>(c[(group * D + n * 16) / 8 + 1], a[group][k], high);
      }
    }
  }
}

// The same of any type: `store(pixel, channel, low, high)` gets two neighbouring channels at once. All is read before
// anything is stored, so that it may be stored in place.
template <typename T, int D, bool TRANSPOSE, typename Store>
__device__ __forceinline__ void multiply_groups(const T* rows, const T* mix, const float* bias, Store store) {
  const int lane = opaque(threadIdx.x) % 32;
  if constexpr (sizeof(T) == 4) {
    // Exact products, by fma: a lane has the two channels of all 16 pixels.
    const int channel = 2 * lane, first = channel / D * D;
    float sums[SQUARE][2];
    const bool used = channel < SLAB<D>;
    if (used) {
#pragma unroll
      for (int p = 0; p < SQUARE; ++p) {
        sums[p][0] = bias ? bias[channel] : 0.0f;
        sums[p][1] = bias ? bias[channel + 1] : 0.0f;
      }
#pragma unroll 1
      for (int k = 0; k < D; k += 4) {
        float weights[2][4];
        if constexpr (TRANSPOSE) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 two = read_two(mix + (first + k + i) * MIX_PITCH<T, D> + channel - first);
            weights[0][i] = two.x;
            weights[1][i] = two.y;
          }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float4 four = *reinterpret_cast<const float4*>(mix + (channel + i) * MIX_PITCH<T, D> + k);
            weights[i][0] = four.x, weights[i][1] = four.y, weights[i][2] = four.z, weights[i][3] = four.w;
          }
        }
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) {
          const float4 in = *reinterpret_cast<const float4*>(rows + p * PITCH<T, D> + first + k);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sums[p][i] = fmaf(in.x, weights[i][0], sums[p][i]);
            sums[p][i] = fmaf(in.y, weights[i][1], sums[p][i]);
            sums[p][i] = fmaf(in.z, weights[i][2], sums[p][i]);
            sums[p][i] = fmaf(in.w, weights[i][3], sums[p][i]);
          }
        }
      }
    }
    __syncwarp();
    if (used) {
#pragma unroll
      for (int p = 0; p < SQUARE; ++p) store(p, channel, sums[p][0], sums[p][1]);
    }
  } else {
    float c[SLAB<D> / 8][4];
    multiply_halves<T, D, TRANSPOSE>(c, rows, mix, bias);
    __syncwarp();
#pragma unroll
    for (int n = 0; n < SLAB<D> / 8; ++n) {
      store(lane / 4, n * 8 + lane % 4 * 2, c[n][0], c[n][1]);
      store(lane / 4 + 8, n * 8 + lane % 4 * 2, c[n][2], c[n][3]);
    }
  }
}

}  // namespace mvk::multiscale
