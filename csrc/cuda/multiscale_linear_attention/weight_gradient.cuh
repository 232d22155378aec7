// The gradients of both convolutions' weights and biases: sums over all pixels, in two stages.
//
// First stage: a block takes `steps` tiles of 8 x 8 pixels of one slab and keeps its sums in registers; at the end it
// leaves them in `parts`. Of each tile come the map, with its border, and the gradient of the scale, by asynchronous
// copies. A warp makes again what the depthwise convolution gave in its square, rounded to the map's dtype as in the
// forward. It brings the gradient of the square back through the pointwise convolution, in float32, and a lane multiplies
// it with every pixel that the taps of its two channels reach: K * K sums for each. At last the block multiplies the
// gradient of the scale with what the depthwise convolution gave, over all pixels of the tile, one band of 16 outputs a
// warp. Second stage: the parts are added in the order of the blocks.
#pragma once

#include "tiles.cuh"

namespace mvk::multiscale {

// Floats of a channel in `parts`: taps, the D inputs of the pointwise weight, and both biases.
template <int K, int D>
constexpr int PARTS = K * K + D + 2;

template <typename T, int K, int D>
struct WeightSums {
  using Input = Tiles<T, K, D, 8>;
  static constexpr int WARPS = Input::WARPS, THREADS = Input::THREADS;
  static constexpr int PIXELS = WARPS * SQUARE;
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int BANDS = SLAB<D> / 16;
  static constexpr int WIDE_PITCH = SLAB<D> + 8;  // of float32 rows: a fragment's lanes store to different banks

  static __device__ __forceinline__ void run(
      unsigned char* memory, const T* grad, const T* x, const T* wide, const T* mixing, const T* first, float* parts,
      Strides from_grad, Strides from, int channels, int height, int width, int rows, int columns, int tiles, int steps,
      int buffers, int first_given, int biased) {
    const int slabs = (channels + SLAB<D> - 1) / SLAB<D>;
    const int slab = blockIdx.x % slabs, slice = blockIdx.x / slabs, begin = slice * steps;
    const int channel = slab * SLAB<D>, left = channels - channel;
    T* tile = reinterpret_cast<T*>(memory);
    T* grads = tile + buffers * Input::SIZE;
    T* depthwise = grads + PIXELS * PITCH<T, D>;  // of float32 it takes the map's place once that is read
    T* mix = depthwise + (HALF ? PIXELS * PITCH<T, D> : 0);
    float* back = reinterpret_cast<float*>(mix + SLAB<D> * MIX_PITCH<T, D>);
    float* taps = back + (HALF ? PIXELS / 2 * WIDE_PITCH : 0);
    float* bias = taps + K * K * TAP_PITCH<D>;

    copy_mixing<T, D, THREADS>(mix, mixing + static_cast<int64_t>(channel) * D, left);
    const auto read_weights = [&] {
      read_bias<T, D, THREADS>(bias, first + (first_given ? channel : 0), first_given, left);
      read_taps<T, K, D, THREADS, false>(taps, wide + static_cast<int64_t>(channel) * (K * K), left);
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int square_y = warp / 2 * SIDE, square_x = warp % 2 * SIDE;
    const bool used = 2 * lane < SLAB<D>;
    T* own_grads = grads + warp * SQUARE * PITCH<T, D>;
    float* own_back = back + warp * (SQUARE / 2) * WIDE_PITCH;
    float tap_sums[K * K][2] = {};
    float bias_sums[2][2] = {};
    Mixed mixed = {};
    const Input input(channels, channel, height, width, rows, columns, begin, tiles, steps, buffers);
    const auto copy_grad = [&](int batch, int y, int x_) {
      const T* square = grad + batch * from_grad.batch + (y + square_y) * from_grad.y + (x_ + square_x) * from_grad.x;
      copy_square<T, D>(own_grads, square + channel, from_grad, height - y - square_y, width - x_ - square_x, left);
    };
    input.template each<true>(tile, x + channel, from, read_weights, copy_grad, [&](T* pixels, int, int y, int x_) {
      const bool inside = y + square_y < height && x_ + square_x < width && used;
      const T* corner = pixels + (square_y * Input::COLS + square_x) * SLAB<D> + 2 * lane;
      T* made = HALF ? depthwise : pixels;
      const auto make = [&] {
        float sums[SQUARE][2] = {};
        if (inside) {
          const float2 start = read_two(bias + 2 * lane);
#pragma unroll
          for (int p = 0; p < SQUARE; ++p) sums[p][0] = start.x, sums[p][1] = start.y;
          add_taps<T, K, D, Input::COLS, SLAB<D>>(sums, corner, taps + 2 * lane);
        }
        if (!HALF) __syncthreads();
        if (used) {
#pragma unroll
          for (int p = 0; p < SQUARE; ++p) {
            write_two(made + (warp * SQUARE + p) * PITCH<T, D> + 2 * lane, sums[p][0], sums[p][1]);
          }
        }
      };
      if (HALF) make();  // while the gradient is on its way
      wait_copies<1>();
      __syncwarp();
      if (y + square_y < height && x_ + square_x < width) {
        float2 given[SQUARE];
        bring_back(given, own_grads, own_back, mix);
        if (used) {
          if (biased) {
#pragma unroll
            for (int p = 0; p < SQUARE; ++p) {
              const float2 g = read_two(own_grads + p * PITCH<T, D> + 2 * lane);
              bias_sums[0][0] += given[p].x, bias_sums[0][1] += given[p].y;
              bias_sums[1][0] += g.x, bias_sums[1][1] += g.y;
            }
          }
          add_products(tap_sums, corner, given);
        }
      }
      if (!HALF) make();
      __syncthreads();
      mixed.add(grads, made);
    });
    finish(
        reinterpret_cast<float*>(memory), tap_sums, bias_sums, mixed,
        parts + static_cast<int64_t>(slice) * PARTS<K, D> * channels, channel, channels);
  }

  // The gradient of a square's depthwise sums, of a lane's channels: the products of `grads` with the pointwise weights,
  // in float32. Fragments go through 8 rows of a warp's own.
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
          to[half * (SQUARE / 2) + p] = read_two(rows + p * WIDE_PITCH + min(2 * lane, SLAB<D> - 2));
        }
      }
    } else {
      multiply_groups<T, D, true>(grads, mix, nullptr, [&](int p, int, float low, float high) {
        to[p] = make_float2(low, high);  // these are the lane's own channels
      });
    }
  }

  // To each tap's sum: the gradient of every pixel of the square, times the pixel that the tap reaches from it.
  static __device__ __forceinline__ void add_products(
      float (&sums)[K * K][2], const T* corner, const float2 (&given)[SQUARE]) {
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

  // The product, over the pixels of tiles, of the gradient of the scale (transposed) and what the depthwise convolution
  // gave: of 16-bit types a warp has 16 outputs and all inputs of their group, of float32 a thread four outputs and an
  // eighth of the inputs.
  struct Mixed {
    static constexpr int OUTS = SLAB<D> / 4;  // threads along the outputs of float32
    float sums[D / 8][4];

    __device__ __forceinline__ void add(const T* grads, const T* depthwise) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      if constexpr (HALF) {
        if (warp >= BANDS) return;
        const int out = warp * 16, in = out / D * D;
#pragma unroll
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
        const int out = threadIdx.x % OUTS * 4, part = threadIdx.x / OUTS;
        if (part >= 8) return;
        const T* inputs = depthwise + out / D * D + part * (D / 8);
#pragma unroll 4
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
    __device__ __forceinline__ void store(float* to, int left) const {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        if constexpr (HALF) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int out = warp * 16 + lane / 4 + half * 8;
            if (warp < BANDS && out < left) {
              write_two(to + out * D + j * 8 + lane % 4 * 2, sums[j][2 * half], sums[j][2 * half + 1]);
            }
          }
        } else {
          const int out = threadIdx.x % OUTS * 4, part = threadIdx.x / OUTS;
          if (part < 8 && out < left) {
#pragma unroll
            for (int i = 0; i < 4; ++i) to[(out + i) * D + part * (D / 8) + j] = sums[j][i];
          }
        }
      }
    }
  };

  // The sums of the block's warps, one after the other, to this slice's parts: (K * K, channels), (channels, D), and
  // two rows of channels for the biases.
  static __device__ __forceinline__ void finish(
      float* shared, const float (&tap_sums)[K * K][2], const float (&bias_sums)[2][2], const Mixed& mixed,
      float* parts, int channel, int channels) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, left = channels - channel;
    mixed.store(parts + static_cast<int64_t>(channels) * (K * K) + channel * D, left);
    __syncthreads();
    constexpr int LINES = K * K + 2;
    if (2 * lane < SLAB<D>) {
      float* own = shared + warp * LINES * SLAB<D> + 2 * lane;
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) write_two(own + tap * SLAB<D>, tap_sums[tap][0], tap_sums[tap][1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) write_two(own + (K * K + i) * SLAB<D>, bias_sums[i][0], bias_sums[i][1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < LINES * SLAB<D>; i += THREADS) {
      const int line = i / SLAB<D>, at = i % SLAB<D>;
      if (at >= left) continue;
      float sum = shared[i];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) sum += shared[w * LINES * SLAB<D> + i];
      const int64_t row = line < K * K ? line : line + D;
      parts[row * channels + channel + at] = sum;
    }
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
#pragma unroll 8
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

#define MULTISCALE_WEIGHT_SUMS(T, K, D)                                                                               \
  extern "C" __global__ void __launch_bounds__(128, 3) multiscale_weight_sums_##T##_##K##_##D(                        \
      const mvk::T* grad, const mvk::T* x, const mvk::T* wide, const mvk::T* mixing, const mvk::T* first,             \
      float* parts, int64_t gsb, int64_t gsy, int64_t gsx, int64_t xsb, int64_t xsy, int64_t xsx, int channels,       \
      int height, int width, int rows, int columns, int tiles, int steps, int buffers, int first_given, int biased) { \
    mvk::multiscale::WeightSums<mvk::T, K, D>::run(                                                                   \
        global_smem, grad, x, wide, mixing, first, parts, {gsb, gsy, gsx}, {xsb, xsy, xsx}, channels, height, width,  \
        rows, columns, tiles, steps, buffers, first_given, biased);                                                   \
  }

#define MULTISCALE_WEIGHT_GRADIENTS(T)                                                                           \
  extern "C" __global__ void __launch_bounds__(128) multiscale_weight_gradients_##T(                             \
      const float* parts, mvk::T* wide, mvk::T* mixing, mvk::T* first, mvk::T* second, int channels, int slices, \
      int taps, int dim, int first_given, int second_given) {                                                    \
    mvk::multiscale::weight_gradients<mvk::T>(                                                                   \
        parts, wide, mixing, first, second, channels, slices, taps, dim, first_given, second_given, 128);        \
  }

}  // namespace mvk::multiscale
