// The gradient of a scale's map, brought back through both convolutions and added to that of qkv, in one pass.
//
// A block takes `steps` tiles of one slab. The gradient comes into shared memory with the border that the depthwise
// kernel reaches, zeros where there is no map. The warps multiply it, 16 pixels at a time, with the transposed weights
// of the groups, in place, rounded to the map's dtype. Meanwhile what the map of the gradient has comes to rows of each
// warp's own; the warp sums the reversed taps of its square on top of it, and stores the sum, 16 bytes a lane. The
// pixels of the border are multiplied by every block that reads them; between the convolutions nothing goes through
// memory.
#pragma once

#include "tiles.cuh"

namespace mvk::multiscale {

template <typename T, int K, int D, int TX>
struct MapGradient {
  static constexpr int WARPS = TY / SIDE * (TX / SIDE), THREADS = 32 * WARPS;
  using Input = Tiles<T, K, D, TX, WARPS, PITCH<T, D>>;

  static __device__ __forceinline__ void run(
      unsigned char* memory, const T* grad, const T* wide, const T* mixing, T* out, Strides from, Strides to,
      int channels, int height, int width, int rows, int columns, int tiles, int steps, int buffers) {
    const int slabs = (channels + SLAB<D> - 1) / SLAB<D>;
    const int slab = blockIdx.x % slabs, begin = blockIdx.x / slabs * steps;
    const int channel = slab * SLAB<D>, left = channels - channel;
    T* tile = reinterpret_cast<T*>(memory);
    T* squares = tile + buffers * Input::SIZE;
    T* mix = squares + buffers * WARPS * SQUARE * SLAB<D>;
    float* taps = reinterpret_cast<float*>(mix + SLAB<D> * MIX_PITCH<T, D>);

    copy_mixing<T, D, THREADS>(mix, mixing + static_cast<int64_t>(channel) * D, left);
    const auto read_weights = [&] {
      read_taps<T, K, D, THREADS, true>(taps, wide + static_cast<int64_t>(channel) * (K * K), left);
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int square_y = warp / (TX / SIDE) * SIDE, square_x = warp % (TX / SIDE) * SIDE;
    const Input input(left, height, width, rows, columns, begin, tiles, steps, buffers);
    const auto own = [&](int buffer) { return squares + (buffer * WARPS + warp) * SQUARE * SLAB<D>; };
    const auto corner = [&](int batch, int y, int x) {
      return out + batch * to.batch + (y + square_y) * to.y + (x + square_x) * to.x + channel;
    };
    const auto copy_there = [&](int buffer, int batch, int y, int x) {
      copy_square<T, D, SLAB<D>>(
          own(buffer), corner(batch, y, x), to, height - y - square_y, width - x - square_x, left);
    };
    input.each(
        tile, grad + channel, from, copy_there, read_weights, [&](int buffer, T* pixels, int batch, int y, int x) {
          for (int j = warp; j < Input::SQUARES; j += WARPS) {
            T* some = pixels + j * SQUARE * PITCH<T, D>;
            multiply_groups<T, D, true>(some, mix, nullptr, [&](int p, int c, float low, float high) {
              write_two(some + p * PITCH<T, D> + c, low, high);
            });
          }
          __syncthreads();
          if (y + square_y >= height || x + square_x >= width) return;
          T* square = own(buffer);
          if (2 * lane < SLAB<D>) {
            float sums[SQUARE][2];
#pragma unroll
            for (int p = 0; p < SQUARE; ++p) {
              const float2 there = read_two(square + p * SLAB<D> + 2 * lane);
              sums[p][0] = there.x, sums[p][1] = there.y;
            }
            add_taps<T, K, D, Input::COLS, PITCH<T, D>>(
                sums, pixels + (square_y * Input::COLS + square_x) * PITCH<T, D> + 2 * lane, taps + 2 * lane);
#pragma unroll
            for (int p = 0; p < SQUARE; ++p) write_two(square + p * SLAB<D> + 2 * lane, sums[p][0], sums[p][1]);
          }
          __syncwarp();
          store_square<T, D, SLAB<D>>(
              square, corner(batch, y, x), to, height - y - square_y, width - x - square_x, left);
        });
  }
};

#define MULTISCALE_MAP_GRADIENT(T, K, D, TX)                                                                     \
  extern "C" __global__ void __launch_bounds__(mvk::multiscale::MapGradient<mvk::T, K, D, TX>::THREADS, 32 / TX) \
      multiscale_map_gradient_##T##_##K##_##D##_##TX(                                                            \
          const mvk::T* grad, const mvk::T* wide, const mvk::T* mixing, mvk::T* out, int64_t gsb, int64_t gsy,   \
          int64_t gsx, int64_t osb, int64_t osy, int64_t osx, int channels, int height, int width, int rows,     \
          int columns, int tiles, int steps, int buffers) {                                                      \
    mvk::multiscale::MapGradient<mvk::T, K, D, TX>::run(                                                         \
        global_smem, grad, wide, mixing, out, {gsb, gsy, gsx}, {osb, osy, osx}, channels, height, width, rows,   \
        columns, tiles, steps, buffers);                                                                         \
  }

}  // namespace mvk::multiscale
