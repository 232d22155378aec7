// The gradients of both convolutions' weights and biases: sums over all pixels, in two stages.
//
// First stage: a block takes `steps` tiles of 8 x 8 pixels of one slab and keeps its sums in registers; at the end it
// leaves them in `parts`. Of each tile come the map, with its border, and the gradient of the scale, by asynchronous
// copies. Each square of the tile has two warps, so that neither needs more than half of the registers. One, a maker,
// makes again what the depthwise convolution gave, rounded to the map's dtype as in the forward. The other brings the
// gradient back through the pointwise convolution, in float32, and a lane multiplies it with every pixel that the taps
// of its two channels reach: K * K sums for each. Then the makers multiply the gradient of the scale with what they
// made, over all pixels of the tile, one band of 16 outputs a warp. Second stage: the parts are added in the order of
// the blocks.
//
// Beyond the border the map and the gradient are zeros, so that no product needs a mask. But zero times an infinity or
// NaN is NaN. So a lane whose sums of taps are not finite at the end sums again, without what lies beyond the border.
#pragma once

#include "tiles.cuh"

namespace mvk::multiscale {

// Floats of a channel in `parts`: taps, the D inputs of the pointwise weight, and both biases.
template <int K, int D>
constexpr int PARTS = K * K + D + 2;

template <typename T, int K, int D>
struct WeightSums {
  static constexpr int OWNERS = 4, PIXELS = OWNERS * SQUARE;  // warps of a kind, one for each square of the tile
  static constexpr int WARPS = 2 * OWNERS, THREADS = 32 * WARPS;
  using Input = Tiles<T, K, D, 8, WARPS>;
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int WIDE_PITCH = SLAB<D> + 8;  // of float32 rows: a fragment's lanes store to different banks
  static_assert(SLAB<D> == 64);                   // two channels a lane, and a band of 16 outputs for each maker

  // A lane's registers: the sums of taps; or what the makers keep from one tile to the next, and their sums of a
  // square.
  using Taps = float[K * K][2];
  using Mixed = float[D / 8][4];
  using Sums = float[SQUARE][2];
  static constexpr int BIAS = D / 2, SUMS = BIAS + 2;
  static constexpr int KEPT = 2 * K * K > SUMS + 2 * SQUARE ? 2 * K * K : SUMS + 2 * SQUARE;

  static __device__ __forceinline__ void run(
      unsigned char* memory, const T* grad, const T* x, const T* wide, const T* mixing, const T* first, float* parts,
      Strides from_grad, Strides from, int channels, int height, int width, int rows, int columns, int tiles, int steps,
      int buffers, int first_given, int biased) {
    const int slabs = (channels + SLAB<D> - 1) / SLAB<D>;
    const int slab = blockIdx.x % slabs, begin = blockIdx.x / slabs * steps;
    const int channel = slab * SLAB<D>, left = channels - channel;
    // What does not depend on the number of buffers comes first, at known addresses.
    T* depthwise = reinterpret_cast<T*>(memory);
    T* mix = depthwise + PIXELS * PITCH<T, D>;
    float* back = reinterpret_cast<float*>(mix + SLAB<D> * MIX_PITCH<T, D>);
    float* bias = back + (HALF ? PIXELS / 2 * WIDE_PITCH : 0);
    float* taps = bias + SLAB<D>;
    T* tile = reinterpret_cast<T*>(taps + (K * K * TAP_PITCH<D> + 3) / 4 * 4);
    T* grads = tile + buffers * Input::SIZE;

    copy_mixing<T, D, THREADS>(mix, mixing + static_cast<int64_t>(channel) * D, left);
    const auto read_weights = [&] {
      read_bias<T, D, THREADS>(bias, first + (first_given ? channel : 0), first_given, left);
      read_taps<T, K, D, THREADS, false>(taps, wide + static_cast<int64_t>(channel) * (K * K), left);
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % OWNERS;
    const bool makes = threadIdx.x < 32 * OWNERS;
    const int square_y = warp / 2 * SIDE, square_x = warp % 2 * SIDE;
    float kept[KEPT] = {};
    const Input input(left, height, width, rows, columns, begin, tiles, steps, buffers);
    const auto copy_grad = [&](int buffer, int batch, int y, int x_) {
      if (makes) return;
      const T* square = grad + batch * from_grad.batch + (y + square_y) * from_grad.y + (x_ + square_x) * from_grad.x;
      copy_square<T, D, PITCH<T, D>>(
          grads + (buffer * OWNERS + warp) * SQUARE * PITCH<T, D>, square + channel, from_grad, height - y - square_y,
          width - x_ - square_x, left);
    };
    input.each(tile, x + channel, from, copy_grad, read_weights, [&](int buffer, const T* pixels, int, int y, int x_) {
      const bool inside = y + square_y < height && x_ + square_x < width;
      const T* corner = pixels + (square_y * Input::COLS + square_x) * SLAB<D> + 2 * lane;
      const T* given = grads + buffer * PIXELS * PITCH<T, D>;
      if (makes) {
        Sums& sums = *reinterpret_cast<Sums*>(kept + SUMS);
        const float2 start = read_two(bias + 2 * lane);
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) sums[p][0] = start.x, sums[p][1] = start.y;
        if (inside) add_taps<T, K, D, Input::COLS, SLAB<D>>(sums, corner, taps + 2 * lane);
        const int down = height - y - square_y, right = width - x_ - square_x;
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) {
          const bool there = p / SIDE < down && p % SIDE < right;  // beyond the border the sum may be infinite
          T* to = depthwise + (warp * SQUARE + p) * PITCH<T, D> + 2 * lane;
          write_two(to, there ? sums[p][0] : 0.0f, there ? sums[p][1] : 0.0f);
        }
      } else if (inside) {
        const T* own = given + warp * SQUARE * PITCH<T, D>;
        float2 returned[SQUARE];
        bring_back(returned, own, back + warp * (SQUARE / 2) * WIDE_PITCH, mix);
        add_products(*reinterpret_cast<Taps*>(kept), corner, returned);
      }
      __syncthreads();
      if (!makes) return;
      add_mixed(*reinterpret_cast<Mixed*>(kept), given, depthwise);
      if (biased) {
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) {
          const float2 g = read_two(given + (warp * SQUARE + p) * PITCH<T, D> + 2 * lane);
          kept[BIAS] += g.x, kept[BIAS + 1] += g.y;
        }
      }
    });
    const int blocks = opaque(blockIdx.x), all_slabs = (opaque(channels) + SLAB<D> - 1) / SLAB<D>;
    const int slice = blocks / all_slabs;
    if (!makes && !finite(*reinterpret_cast<Taps*>(kept))) {
      const Input again(left, height, width, rows, columns, slice * steps, tiles, steps, buffers);
      sum_inside(*reinterpret_cast<Taps*>(kept), grad + channel, x + channel, mix, from_grad, from, again);
    }
    parts += static_cast<int64_t>(slice) * PARTS<K, D> * channels;
    if (makes) {
      store_mixed(
          parts + static_cast<int64_t>(channels) * (K * K) + channel * D, *reinterpret_cast<Mixed*>(kept), left);
    }
    finish(reinterpret_cast<float*>(tile), kept, mix, parts, channel, channels, biased);
  }

  // The gradient of a square's depthwise sums, of a lane's channels: the products of `grads` with the pointwise
  // weights, in float32. Fragments go through 8 rows of a warp's own.
  static __device__ __forceinline__ void bring_back(float2 (&to)[SQUARE], const T* grads, float* rows, const T* mix) {
    if constexpr (HALF) {
      const int lane = threadIdx.x % 32;
      float c[SLAB<D> / 8][4];
      multiply_halves<T, D, true>(c, grads, mix, nullptr);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < SLAB<D> / 8; ++n) {
          write_two(rows + lane / 4 * WIDE_PITCH + n * 8 + lane % 4 * 2, c[n][2 * half], c[n][2 * half + 1]);
        }
        __syncwarp();
#pragma unroll
        for (int p = 0; p < SQUARE / 2; ++p) {
          to[half * (SQUARE / 2) + p] = read_two(rows + p * WIDE_PITCH + 2 * lane);
        }
      }
    } else {
      multiply_groups<T, D, true>(grads, mix, nullptr, [&](int p, int, float low, float high) {
        to[p] = make_float2(low, high);  // these are the lane's own channels
      });
    }
  }

  // To each tap's sum: the gradient of every pixel of the square, times the pixel that the tap reaches from it.
  static __device__ __forceinline__ void add_products(Taps& sums, const T* corner, const float2 (&given)[SQUARE]) {
#pragma unroll
    for (int row = 0; row < SIDE + K - 1; ++row) {
#pragma unroll
      for (int col = 0; col < SIDE + K - 1; ++col) {
        const float2 value = read_two(corner + (row * Input::COLS + col) * SLAB<D>);
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) {
          const int dy = row - p / SIDE, dx = col - p % SIDE;
          if (dy >= 0 && dy < K && dx >= 0 && dx < K) {
            sums[dy * K + dx][0] = fmaf(value.x, given[p].x, sums[dy * K + dx][0]);
            sums[dy * K + dx][1] = fmaf(value.y, given[p].y, sums[dy * K + dx][1]);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ bool finite(const Taps& sums) {
    float zero = 0.0f;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) zero = fmaf(sums[tap][0], 0.0f, fmaf(sums[tap][1], 0.0f, zero));
    return zero == 0.0f;
  }

  // A lane's sums of taps once more, from global memory: only pixels of the map are multiplied. This is slow, and rare.
  static __device__ __forceinline__ void sum_inside(
      Taps& sums, const T* grad, const T* x, const T* mix, const Strides& from_grad, const Strides& from,
      const Input& input) {
    const int thread = opaque(threadIdx.x), warp = thread / 32 % OWNERS;
    const int own = thread % 32 * 2, first = own / D * D;
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) sums[tap][0] = sums[tap][1] = 0.0f;
    Place place(input.begin, input.columns, input.rows);
#pragma unroll 1
    for (int i = 0; i < input.count * SQUARE; ++i) {
      if (i && i % SQUARE == 0) place.advance(input.columns, input.rows);
      const int y = place.y * TY + warp / 2 * SIDE + i % SQUARE / SIDE;
      const int x_ = place.x * 8 + warp % 2 * SIDE + i % SIDE;
      if (y >= input.height || x_ >= input.width) continue;
      const T* given = grad + place.batch * from_grad.batch + y * from_grad.y + x_ * from_grad.x + first;
      float2 returned = make_float2(0.0f, 0.0f);
#pragma unroll 1
      for (int out = 0; out < D; ++out) {
        const float2 weight = read_two(mix + (first + out) * MIX_PITCH<T, D> + own - first);
        const float g = to_float(given[out]);
        returned.x = fmaf(g, weight.x, returned.x), returned.y = fmaf(g, weight.y, returned.y);
      }
      const T* pixel = x + place.batch * from.batch + (y - K / 2) * from.y + (x_ - K / 2) * from.x + own;
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) {
        if (tap && tap % K == 0) pixel += from.y - (K - 1) * from.x;
        if (tap % K) pixel += from.x;
        const int row = opaque(y) + tap / K - K / 2, col = opaque(x_) + tap % K - K / 2;
        if (row < 0 || row >= input.height || col < 0 || col >= input.width) continue;
        const float2 value = read_two(pixel);
        sums[tap][0] = fmaf(value.x, returned.x, sums[tap][0]);
        sums[tap][1] = fmaf(value.y, returned.y, sums[tap][1]);
      }
    }
  }

  // The product, over the pixels of tiles, of the gradient of the scale (transposed) and what the depthwise convolution
  // gave: of 16-bit types a maker has 16 outputs and all inputs of their group, of float32 a thread four outputs and an
  // eighth of the inputs.
  static constexpr int OUTS = SLAB<D> / 4;  // threads along the outputs of float32

  static __device__ __forceinline__ void add_mixed(Mixed& sums, const T* grads, const T* depthwise) {
    const int thread = opaque(threadIdx.x), lane = thread % 32, warp = thread / 32;
    if constexpr (HALF) {
      const int out = warp * 16, in = out / D * D;
#pragma unroll 2
      for (int k = 0; k < PIXELS / 16; ++k) {
        uint32_t a[4];
        const int pixel = k * 16 + lane / 16 * 8 + lane % 8;
        load_matrices_transposed(a, shared_address(grads + pixel * PITCH<T, D> + out + lane / 8 % 2 * 8));
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          uint32_t b[4];
          load_matrices_transposed(
              b, shared_address(depthwise + (k * 16 + lane % 16) * PITCH<T, D> + in + n * 16 + lane / 16 * 8));
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          multiply_16<T>(sums[2 * n], a, low);
          multiply_16<T>(sums[2 * n + 1], a, high);
        }
      }
    } else {
      const int out = thread % OUTS * 4, part = thread / OUTS;
      const T* inputs = depthwise + out / D * D + part * (D / 8);
#pragma unroll 2
      for (int p = 0; p < PIXELS; ++p) {
        const float4 g = *reinterpret_cast<const float4*>(grads + p * PITCH<T, D> + out);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          const float value = inputs[p * PITCH<T, D> + j];
          sums[j][0] = fmaf(g.x, value, sums[j][0]);
          sums[j][1] = fmaf(g.y, value, sums[j][1]);
          sums[j][2] = fmaf(g.z, value, sums[j][2]);
          sums[j][3] = fmaf(g.w, value, sums[j][3]);
        }
      }
    }
  }

  // To (channels, D), from the slab's first channel on.
  static __device__ __forceinline__ void store_mixed(float* to, const Mixed& sums, int left) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      if constexpr (HALF) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int out = warp * 16 + lane / 4 + half * 8;
          if (out < left) write_two(to + out * D + j * 8 + lane % 4 * 2, sums[j][2 * half], sums[j][2 * half + 1]);
        }
      } else {
        const int out = threadIdx.x % OUTS * 4, part = threadIdx.x / OUTS;
        if (out < left) {
#pragma unroll
          for (int i = 0; i < 4; ++i) to[(out + i) * D + part * (D / 8) + j] = sums[j][i];
        }
      }
    }
  }

  // The sums of taps and biases of the block's warps, one after the other, to this slice's parts: (K * K, channels),
  // (channels, D), and two rows of channels for the biases. That of the depthwise convolution has the gradient that the
  // pointwise weights bring back: their product with the sums of the other.
  static __device__ __forceinline__ void finish(
      float* shared, const float (&kept)[KEPT], const T* mix, float* parts, int channel, int channels, int biased) {
    constexpr int TAPS = K * K, LINES = TAPS + 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, left = channels - channel;
    float* own = shared + warp % OWNERS * LINES * SLAB<D> + 2 * lane;
    __syncthreads();
    if (warp < OWNERS) {
      write_two(own + TAPS * SLAB<D>, kept[BIAS], kept[BIAS + 1]);
    } else {
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) write_two(own + tap * SLAB<D>, kept[2 * tap], kept[2 * tap + 1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < LINES * SLAB<D>; i += THREADS) {
      const int line = i / SLAB<D>, at = i % SLAB<D>;
      float sum = shared[i];
#pragma unroll
      for (int w = 1; w < OWNERS; ++w) sum += shared[w * LINES * SLAB<D> + i];
      const int64_t row = line < TAPS ? line : TAPS + D + 1;
      if (at < left) parts[row * channels + channel + at] = sum;
      if (line == TAPS) shared[i] = sum;
    }
    if (!biased) return;
    __syncthreads();
    const int at = threadIdx.x;
    if (at >= min(left, SLAB<D>)) return;
    float sum = 0.0f;
    for (int out = 0; out < D; ++out) {
      const int from = at / D * D + out;
      sum = fmaf(to_float(mix[from * MIX_PITCH<T, D> + at % D]), shared[TAPS * SLAB<D> + from], sum);
    }
    parts[static_cast<int64_t>(TAPS + D) * channels + channel + at] = sum;
  }
};

// Second stage: a thread adds one number of all slices and stores it where it belongs.
template <typename T>
__device__ __forceinline__ void weight_gradients(
    const float* parts, T* wide, T* mixing, T* first, T* second, int channels, int slices, int taps, int dim,
    int first_given, int second_given, int threads) {
  const int64_t size = static_cast<int64_t>(taps + dim + 2) * channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (i >= size) return;
  const int line = static_cast<int>(i / channels),
            channel = static_cast<int>(i - static_cast<int64_t>(line) * channels);
  if ((line == taps + dim && !first_given) || (line == taps + dim + 1 && !second_given)) return;
  float sum = 0.0f;
#pragma unroll 32
  for (int slice = 0; slice < slices; ++slice) sum += parts[slice * size + i];
  const T value = from_float<T>(sum);
  if (line < taps) {
    wide[static_cast<int64_t>(channel) * taps + line] = value;
  } else if (line < taps + dim) {
    mixing[i - static_cast<int64_t>(taps) * channels] = value;
  } else {
    (line == taps + dim ? first : second)[channel] = value;
  }
}

#define MULTISCALE_WEIGHT_SUMS(T, K, D)                                                                              \
  extern "C" __global__ void __launch_bounds__(256, sizeof(mvk::T) == 2 ? 2 : 1)                                     \
      multiscale_weight_sums_##T##_##K##_##D(                                                                        \
          const mvk::T* grad, const mvk::T* x, const mvk::T* wide, const mvk::T* mixing, const mvk::T* first,        \
          float* parts, int64_t gsb, int64_t gsy, int64_t gsx, int64_t xsb, int64_t xsy, int64_t xsx, int channels,  \
          int height, int width, int rows, int columns, int tiles, int steps, int buffers, int first_given,          \
          int biased) {                                                                                              \
    mvk::multiscale::WeightSums<mvk::T, K, D>::run(                                                                  \
        global_smem, grad, x, wide, mixing, first, parts, {gsb, gsy, gsx}, {xsb, xsy, xsx}, channels, height, width, \
        rows, columns, tiles, steps, buffers, first_given, biased);                                                  \
  }

#define MULTISCALE_WEIGHT_GRADIENTS(T)                                                                           \
  extern "C" __global__ void __launch_bounds__(128) multiscale_weight_gradients_##T(                             \
      const float* parts, mvk::T* wide, mvk::T* mixing, mvk::T* first, mvk::T* second, int channels, int slices, \
      int taps, int dim, int first_given, int second_given) {                                                    \
    mvk::multiscale::weight_gradients<mvk::T>(                                                                   \
        parts, wide, mixing, first, second, channels, slices, taps, dim, first_given, second_given, 128);        \
  }

}  // namespace mvk::multiscale
