// The gradient of a scale's map, brought back through both convolutions and added to that of qkv, in one pass.
//
// A block takes `steps` tiles of one slab. The gradient comes into shared memory with the border that the depthwise
// kernel reaches, zeros where there is no map. The warps multiply it, 16 pixels at a time, with the transposed weights of
// the groups, in place, rounded to the map's dtype. Then each warp sums the reversed taps of its square on top of what
// the map of the gradient has, and stores that. The pixels of the border are multiplied by every block that reads them;
// between the convolutions nothing goes through memory.
#pragma once

#include "tiles.cuh"

namespace mvk::multiscale {

template <typename T, int K, int D, int TX>
struct MapGradient {
  using Input = Tiles<T, K, D, TX>;
  static constexpr int WARPS = Input::WARPS, THREADS = Input::THREADS;

  static __device__ __forceinline__ void run(
      unsigned char* memory, const T* grad, const T* wide, const T* mixing, T* out, Strides from, Strides to,
      int channels, int height, int width, int rows, int columns, int tiles, int steps, int buffers) {
    const int slabs = (channels + SLAB<D> - 1) / SLAB<D>;
    const int slab = blockIdx.x % slabs, begin = blockIdx.x / slabs * steps;
    const int channel = slab * SLAB<D>, left = channels - channel;
    T* tile = reinterpret_cast<T*>(memory);
    T* mix = tile + buffers * Input::SIZE;
    float* taps = reinterpret_cast<float*>(mix + SLAB<D> * MIX_PITCH<T, D>);

    copy_mixing<T, D, THREADS>(mix, mixing + static_cast<int64_t>(channel) * D, left);
    read_taps<T, K, D, THREADS, true>(taps, wide + static_cast<int64_t>(channel) * (K * K), left);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int square_y = warp / (TX / SIDE) * SIDE, square_x = warp % (TX / SIDE) * SIDE;
    const Input input(channels, channel, height, width, rows, columns, begin, tiles, steps, buffers);
    input.each(tile, grad + channel, from, [&](T* pixels, int batch, int y, int x) {
      for (int j = warp; j < Input::SQUARES; j += WARPS) {
        T* some = pixels + j * SQUARE * PITCH<T, D>;
        multiply_groups<T, D, true>(some, mix, nullptr, [&](int p, int c, float low, float high) {
          write_two(some + p * PITCH<T, D> + c, low, high);
        });
      }
      __syncthreads();
      const int above = y + square_y, before = x + square_x;
      if (above >= height || before >= width || 2 * lane >= min(SLAB<D>, left)) return;
      T* plane = out + batch * to.batch + above * to.y + before * to.x + channel + 2 * lane;
      float sums[SQUARE][2];
#pragma unroll
      for (int p = 0; p < SQUARE; ++p) {
        float2 there = make_float2(0.0f, 0.0f);
        if (above + p / SIDE < height && before + p % SIDE < width) {
          there = read_two(plane + (p / SIDE) * to.y + (p % SIDE) * to.x);
        }
        sums[p][0] = there.x, sums[p][1] = there.y;
      }
      add_taps<T, K, D, Input::COLS>(
          sums, pixels + (square_y * Input::COLS + square_x) * PITCH<T, D> + 2 * lane, taps + 2 * lane);
      // Addresses and bounds are computed again, so that no register holds them while the taps are summed.
      int last_y = height - above, last_x = width - before;
      int64_t next_y = to.y, next_x = to.x;
      asm volatile("" : "+l"(next_y), "+l"(next_x), "+r"(last_y), "+r"(last_x));
#pragma unroll
      for (int p = 0; p < SQUARE; ++p) {
        if (p / SIDE < last_y && p % SIDE < last_x) {
          write_two(plane + (p / SIDE) * next_y + (p % SIDE) * next_x, sums[p][0], sums[p][1]);
        }
      }
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
