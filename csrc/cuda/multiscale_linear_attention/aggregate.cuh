// Both convolutions of a scale, in one pass over the map.
//
// A block takes `steps` tiles of one slab, so that its weights are read once. The pixels of a tile and of its border
// come by asynchronous copies, with zeros where there is no map. Each warp sums the taps of its square, rounds them to
// the map's dtype into rows of its own, as two convolutions one after the other would, multiplies these with the
// groups' weights, and stores the result 16 bytes a lane. What the depthwise convolution gives never leaves the
// processor.
#pragma once

#include "tiles.cuh"

namespace mvk::multiscale {

template <typename T, int K, int D, int TX>
struct Aggregate {
  using Input = Tiles<T, K, D, TX>;
  static constexpr int THREADS = Input::THREADS, WARPS = THREADS / 32;

  static __device__ __forceinline__ void run(
      unsigned char* memory, const T* x, const T* wide, const T* mixing, const T* first, const T* second, T* out,
      Strides from, Strides to, int channels, int height, int width, int rows, int columns, int tiles, int steps,
      int buffers, int first_given, int second_given) {
    const int slabs = (channels + SLAB<D> - 1) / SLAB<D>;
    const int slab = blockIdx.x % slabs, begin = blockIdx.x / slabs * steps;
    const int channel = slab * SLAB<D>, left = channels - channel;
    T* tile = reinterpret_cast<T*>(memory);
    T* squares = tile + buffers * Input::SIZE;
    T* mix = squares + WARPS * SQUARE * PITCH<T, D>;
    float* taps = reinterpret_cast<float*>(mix + SLAB<D> * MIX_PITCH<T, D>);
    float* biases = taps + K * K * TAP_PITCH<D>;

    copy_mixing<T, D, THREADS>(mix, mixing + static_cast<int64_t>(channel) * D, left);
    const auto read_weights = [&] {
      read_bias<T, D, THREADS>(biases, first + (first_given ? channel : 0), first_given, left);
      read_bias<T, D, THREADS>(biases + SLAB<D>, second + (second_given ? channel : 0), second_given, left);
      read_taps<T, K, D, THREADS, false>(taps, wide + static_cast<int64_t>(channel) * (K * K), left);
    };
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int square_y = warp / (TX / SIDE) * SIDE, square_x = warp % (TX / SIDE) * SIDE;
    T* own = squares + warp * SQUARE * PITCH<T, D>;
    const Input input(left, height, width, rows, columns, begin, tiles, steps, buffers);
    const auto no_more = [](int, int, int, int) {};
    input.each(tile, x + channel, from, no_more, read_weights, [&](int, const T* pixels, int batch, int y, int x_) {
      if (y + square_y >= height || x_ + square_x >= width) return;
      if (2 * lane < SLAB<D>) {
        float sums[SQUARE][2];
        const float2 bias = read_two(biases + 2 * lane);
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) sums[p][0] = bias.x, sums[p][1] = bias.y;
        add_taps<T, K, D, Input::COLS, SLAB<D>>(
            sums, pixels + (square_y * Input::COLS + square_x) * SLAB<D> + 2 * lane, taps + 2 * lane);
#pragma unroll
        for (int p = 0; p < SQUARE; ++p) write_two(own + p * PITCH<T, D> + 2 * lane, sums[p][0], sums[p][1]);
      }
      __syncwarp();
      multiply_groups<T, D, false>(own, mix, biases + SLAB<D>, [&](int p, int c, float low, float high) {
        write_two(own + p * PITCH<T, D> + c, low, high);
      });
      __syncwarp();
      store_square<T, D, PITCH<T, D>>(
          own, out + batch * to.batch + (y + square_y) * to.y + (x_ + square_x) * to.x + channel, to,
          height - y - square_y, width - x_ - square_x, left);
    });
  }
};

#define MULTISCALE_AGGREGATE(T, K, D, TX)                                                                            \
  extern "C" __global__ void __launch_bounds__(mvk::multiscale::Aggregate<mvk::T, K, D, TX>::THREADS, 32 / TX)       \
      multiscale_aggregate_##T##_##K##_##D##_##TX(                                                                   \
          const mvk::T* x, const mvk::T* wide, const mvk::T* mixing, const mvk::T* first, const mvk::T* second,      \
          mvk::T* out, int64_t xsb, int64_t xsy, int64_t xsx, int64_t osb, int64_t osy, int64_t osx, int channels,   \
          int height, int width, int rows, int columns, int tiles, int steps, int buffers, int first_given,          \
          int second_given) {                                                                                        \
    mvk::multiscale::Aggregate<mvk::T, K, D, TX>::run(                                                               \
        global_smem, x, wide, mixing, first, second, out, {xsb, xsy, xsx}, {osb, osy, osx}, channels, height, width, \
        rows, columns, tiles, steps, buffers, first_given, second_given);                                            \
  }

}  // namespace mvk::multiscale
