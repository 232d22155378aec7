// The loops of depthwise convolutions: of a fixed size with what is owed in registers, of any size a tap at a time.
#include "common/depthwise.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// step(from, K - 1) and step(0, to) for numbers that are known only now.
template <int last, class F>
MVK_INLINE void step_from(int64_t from, const F& step) {
  [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    ((from == int64_t(I) + 1 ? step(std::integral_constant<int, int(I) + 1>{}, std::integral_constant<int, last>{})
                             : void()),
     ...);
  }(std::make_index_sequence<last>{});
}
template <int K, class F>
MVK_INLINE void step_to(int64_t to, const F& step) {
  [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    ((to == int64_t(I) ? step(std::integral_constant<int, 0>{}, std::integral_constant<int, int(I)>{}) : void()), ...);
  }(std::make_index_sequence<K>{});
}

// Rows y0 .. y1 of the convolution, U vectors of pixels wide, at out[(y - y0) * ldo]. `in` is the first pixel (of the pad) of row
// `low`; rows low .. high are there.
template <class T, int K, int U>
static void depthwise_columns(
    const T* in, int64_t pitch, int64_t low, int64_t high, int64_t y0, int64_t y1, const T* w, T bias, T* out,
    int64_t ldo) {
  constexpr int R = K / 2;
  vec<T> owed[K][U];  // owed[j]: of output row r - R + j, where r is the input row
  for (auto& row : owed)
    for (auto& one : row) one = splat(bias);
  auto step = [&](auto from, auto to) __attribute__((always_inline)) {
    constexpr int first = decltype(from)::value, last = decltype(to)::value;
#pragma GCC unroll 8
    for (int x = 0; x < K; ++x)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        const vec<T> v = load<T>(in + x + u * W<T>);
#pragma GCC unroll 8
        for (int j = first; j <= last; ++j) owed[j][u] += splat(w[(K - 1 - j) * K + x]) * v;
      }
    in += pitch;
  };
  auto next = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j + 1 < K; ++j)
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) owed[j][u] = owed[j + 1][u];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) owed[K - 1][u] = splat(bias);
  };
  auto put = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) store<T>(out + u * W<T>, owed[0][u]);
    out += ldo;
  };
  const int64_t begin = y0 - R > low ? y0 - R : low, end = y1 + R < high ? y1 + R : high;
  in += (begin - low) * pitch;
  // The first rows owe nothing above y0, the last ones nothing below y1.
  for (int64_t r = begin; r < end; ++r) {
    const int64_t from = y0 - r + R, to = y1 - 1 - r + R;
    if (from > 0)
      step_from<K - 1>(from, step);
    else
      step_to<K>(to < K - 1 ? to : K - 1, step);
    if (r - R >= y0) put();
    next();
  }
  for (int64_t y = end - R; y < y1; ++y) {
    if (y >= y0) put();
    next();
  }
}

// All columns of rows y0 .. y1, at out[(y - y0) * width]: from right to left and downwards, so that what a vector writes beyond its
// row is overwritten; two vectors of room at the end are not.
template <class T, int K>
static void depthwise_rows(
    const T* in, int64_t width, int64_t low, int64_t high, int64_t y0, int64_t y1, const T* w, T bias, T* out) {
  const int64_t pitch = pitch_of(width, K), vectors = (width + W<T> - 1) / W<T>;
  int64_t x = vectors / 2 * 2 * W<T>;
  if (vectors % 2) depthwise_columns<T, K, 1>(in + x, pitch, low, high, y0, y1, w, bias, out + x, width);
  while ((x -= 2 * W<T>) >= 0) depthwise_columns<T, K, 2>(in + x, pitch, low, high, y0, y1, w, bias, out + x, width);
}

// lanes[dy * K + dx] (a vector each) += the plane g, which gradients have come to, times the rows x, dense, that the convolution read.
template <class T, int K>
static void depthwise_weights(const T* g, const T* x, int64_t height, int64_t width, T* lanes) {
  constexpr int R = K / 2, most = kVectorBytes == 64 ? 25 : 10, G = K * K <= most ? K : most / K;
  const int64_t pitch = pitch_of(width, K);
  auto taps = [&](auto first, auto count) __attribute__((always_inline)) {
    constexpr int d0 = decltype(first)::value, n = decltype(count)::value;
    for (int64_t i = 0; i < width; i += W<T>) {
      vec<T> sum[n][K], rows[n];
      const int some = at_most<T>(width - i);
      auto row = [&](int64_t y) __attribute__((always_inline)) {
        if (y < 0 || y >= height) return vec<T>{};
        const T* p = x + y * width + i;
        return some == W<T> ? load<T>(p) : load_partial<T>(p, some);
      };
#pragma GCC unroll 8
      for (int d = 0; d < n; ++d)
#pragma GCC unroll 8
        for (int c = 0; c < K; ++c) sum[d][c] = load<T>(lanes + ((d0 + d) * K + c) * W<T>);
#pragma GCC unroll 8
      for (int d = 0; d < n; ++d) rows[d] = row(d0 + d - R - 1);  // moved up by one before the first step
      const T* from = g + i;
      for (int64_t y = 0; y < height; ++y, from += pitch) {
#pragma GCC unroll 8
        for (int d = 0; d + 1 < n; ++d) rows[d] = rows[d + 1];
        rows[n - 1] = row(y + d0 + n - 1 - R);
#pragma GCC unroll 8
        for (int c = 0; c < K; ++c) {
          const vec<T> v = load<T>(from + K - 1 - c);
#pragma GCC unroll 8
          for (int d = 0; d < n; ++d) sum[d][c] += v * rows[d];
        }
      }
#pragma GCC unroll 8
      for (int d = 0; d < n; ++d)
#pragma GCC unroll 8
        for (int c = 0; c < K; ++c) store<T>(lanes + ((d0 + d) * K + c) * W<T>, sum[d][c]);
    }
  };
  [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    (taps(
         std::integral_constant<int, int(I) * G>{},
         std::integral_constant<int, (int(I) + 1) * G <= K ? G : K - int(I) * G>{}),
     ...);
  }(std::make_index_sequence<(K + G - 1) / G>{});
}

// The same for any K, a tap at a time.
template <class T>
static void depthwise_rows_any(
    int64_t K, const T* in, int64_t width, int64_t low, int64_t high, int64_t y0, int64_t y1, const T* w, T bias,
    T* out) {
  const int64_t R = K / 2, pitch = pitch_of(width, K);
  for (int64_t y = y0; y < y1; ++y, out += width)
    for (int64_t i = 0; i < width; i += W<T>) {
      vec<T> sum = splat(bias);
      for (int64_t d = 0; d < K; ++d) {
        if (y + d - R < low || y + d - R >= high) continue;
        for (int64_t c = 0; c < K; ++c) sum += splat(w[d * K + c]) * load<T>(in + (y + d - R - low) * pitch + i + c);
      }
      store_partial<T>(out + i, sum, at_most<T>(width - i));
    }
}
template <class T>
static void depthwise_weights_any(int64_t K, const T* g, const T* x, int64_t height, int64_t width, T* lanes) {
  const int64_t R = K / 2, pitch = pitch_of(width, K);
  for (int64_t d = 0; d < K; ++d)
    for (int64_t c = 0; c < K; ++c) {
      vec<T> sum = load<T>(lanes + (d * K + c) * W<T>);
      for (int64_t y = 0; y < height; ++y) {
        if (y + d - R < 0 || y + d - R >= height) continue;
        for (int64_t i = 0; i < width; i += W<T>) {
          const T* p = x + (y + d - R) * width + i;
          const int some = at_most<T>(width - i);
          sum += load<T>(g + y * pitch + i + K - 1 - c) * (some == W<T> ? load<T>(p) : load_partial<T>(p, some));
        }
      }
      store<T>(lanes + (d * K + c) * W<T>, sum);
    }
}

}  // namespace

template <class T>
void convolve(
    int64_t K, const T* in, int64_t width, int64_t low, int64_t high, int64_t y0, int64_t y1, const T* w, T bias,
    T* out) {
  if (K == 3) return depthwise_rows<T, 3>(in, width, low, high, y0, y1, w, bias, out);
  if (K == 5) return depthwise_rows<T, 5>(in, width, low, high, y0, y1, w, bias, out);
  if (K == 7) return depthwise_rows<T, 7>(in, width, low, high, y0, y1, w, bias, out);
  depthwise_rows_any<T>(K, in, width, low, high, y0, y1, w, bias, out);
}
template <class T>
void convolve_weights(int64_t K, const T* g, const T* x, int64_t height, int64_t width, T* lanes) {
  if (K == 3) return depthwise_weights<T, 3>(g, x, height, width, lanes);
  if (K == 5) return depthwise_weights<T, 5>(g, x, height, width, lanes);
  if (K == 7) return depthwise_weights<T, 7>(g, x, height, width, lanes);
  depthwise_weights_any<T>(K, g, x, height, width, lanes);
}

#define MVK_CONVOLVE(T)                                                                                    \
  template void convolve(int64_t, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, const T*, T, T*); \
  template void convolve_weights(int64_t, const T*, const T*, int64_t, int64_t, T*);
MVK_CONVOLVE(float)
MVK_CONVOLVE(double)

}  // namespace MVK_ISA
}  // namespace mvk
