// The products of few tokens with many pixels that are lanes.
#include "common/pixels.h"

#include "common/transpose.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// acc[(j * D + d)] (a vector) = acc * alpha[j] + sum over vectors of r[j][.] x[d][.], for J tokens and R dims.
template <class T, int J, int R>
MVK_INLINE void sums_tile(
    int64_t count, const T* r, int64_t ldr, const T* x, int64_t ldx, T* acc, int64_t D, const T* alpha, bool first) {
  vec<T> sum[J][R];
  for (int j = 0; j < J; ++j)
    for (int i = 0; i < R; ++i) sum[j][i] = vec<T>{};
  for (int64_t n = 0; n < count; n += W<T>) {
    vec<T> rows[R];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) rows[i] = load<T>(x + i * ldx + n);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const vec<T> p = load<T>(r + j * ldr + n);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[j][i] += p * rows[i];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
    const vec<T> f = alpha ? load<T>(alpha + j * W<T>) : splat(T(1));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      T* to = acc + (j * D + i) * W<T>;
      store<T>(to, first ? sum[j][i] : sum[j][i] + f * load<T>(to));
    }
  }
}

template <class T, int J>
MVK_INLINE void sums_of(
    int64_t count, int64_t D, const T* r, int64_t ldr, const T* x, int64_t ldx, T* acc, const T* alpha, bool first) {
  constexpr int most = (kVectorBytes == 64 ? 20 : 10) / J, R = most > 6 ? 6 : most < 1 ? 1 : most;
  int64_t d = 0;
  for (; d + R <= D; d += R) sums_tile<T, J, R>(count, r, ldr, x + d * ldx, ldx, acc + d * W<T>, D, alpha, first);
  for (; d < D; ++d) sums_tile<T, J, 1>(count, r, ldr, x + d * ldx, ldx, acc + d * W<T>, D, alpha, first);
}

// out[d * ldo + n] = (start[d * lds + n] or 0) + sum_j a[j * lda + d] r[j * ldr + n], for J tokens and V vectors.
template <class T, int J, int V>
MVK_INLINE void spread_tile(
    int64_t D, const T* a, int64_t lda, const T* r, int64_t ldr, const T* start, int64_t lds, T* out, int64_t ldo) {
  vec<T> p[J][V];
  for (int j = 0; j < J; ++j)
    for (int v = 0; v < V; ++v) p[j][v] = load<T>(r + j * ldr + v * W<T>);
  for (int64_t d = 0; d < D; ++d) {
    vec<T> sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] = splat(a[d]) * p[0][v];
#pragma GCC unroll 8
    for (int j = 1; j < J; ++j) {
      const vec<T> f = splat(a[j * lda + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] += f * p[j][v];
    }
    // The largest term last.
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      store<T>(out + d * ldo + v * W<T>, start ? sum[v] + load<T>(start + d * lds + v * W<T>) : sum[v]);
  }
}

template <class T, int J>
MVK_INLINE void spread_of(
    int64_t count, int64_t D, const T* a, int64_t lda, const T* r, int64_t ldr, const T* start, int64_t lds, T* out,
    int64_t ldo) {
  constexpr int most = (kVectorBytes == 64 ? 24 : 12) / J, V = most > 4 ? 4 : most < 1 ? 1 : most;
  int64_t n = 0;
  for (; n + V * W<T> <= count; n += V * W<T>)
    spread_tile<T, J, V>(D, a, lda, r + n, ldr, start ? start + n : nullptr, lds, out + n, ldo);
  for (; n < count; n += W<T>)
    spread_tile<T, J, 1>(D, a, lda, r + n, ldr, start ? start + n : nullptr, lds, out + n, ldo);
}

// out[j * ldo + d] = sum_n r[j][n] x[d][n] for J tokens and all dims, W / J dims at a time, added up across lanes in registers.
template <class T, int J>
static void sums_of_few(
    int64_t count, int64_t D, const T* r, int64_t ldr, const T* x, int64_t ldx, T* out, int64_t ldo) {
  constexpr int R = W<T> / J;
  for (int64_t d = 0; d < D; d += R) {
    const T* dims[R];
    for (int i = 0; i < R; ++i) dims[i] = x + (d + i < D ? d + i : D - 1) * ldx;
    vec<T> sum[W<T>];
#pragma GCC unroll 16
    for (int i = 0; i < W<T>; ++i) sum[i] = vec<T>{};
    for (int64_t n = 0; n < count; n += W<T>) {
      vec<T> p[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) p[j] = load<T>(r + j * ldr + n);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const vec<T> v = load<T>(dims[i] + n);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[j * R + i] += p[j] * v;
      }
    }
    add_across<T>(sum);
    T lanes[W<T>];
    store<T>(lanes, sum[0]);
    for (int j = 0; j < J; ++j) memcpy(out + j * ldo + d, lanes + j * R, R * sizeof(T));
  }
}

}  // namespace

template <class T>
void sums(
    int64_t M, int64_t D, int64_t count, const T* r, int64_t ldr, const T* x, int64_t ldx, T* acc, const T* alpha,
    bool first) {
  for (int64_t m = 0; m < M; m += kTokens)
    for_tokens(M - m < kTokens ? M - m : kTokens, [&](auto J) {
      sums_of<T, J.value>(
          count, D, r + m * ldr, ldr, x, ldx, acc + m * D * W<T>, alpha ? alpha + m * W<T> : nullptr, first);
    });
}
template <class T>
void sums_at_once(
    int64_t M, int64_t D, int64_t count, const T* r, int64_t ldr, const T* x, int64_t ldx, T* out, int64_t ldo) {
  int64_t m = 0;
  for (; m + 2 <= M; m += 2) sums_of_few<T, 2>(count, D, r + m * ldr, ldr, x, ldx, out + m * ldo, ldo);
  for (; m < M; ++m) sums_of_few<T, 1>(count, D, r + m * ldr, ldr, x, ldx, out + m * ldo, ldo);
}
template <class T>
void across_lanes(const T* acc, int64_t D, vec<T> factor, T* out) {
  for (int64_t d = 0; d < D; d += W<T>) {
    vec<T> rows[W<T>];
    for (int i = 0; i < W<T>; ++i) rows[i] = d + i < D ? factor * load<T>(acc + (d + i) * W<T>) : vec<T>{};
    add_across<T>(rows);
    store<T>(out + d, rows[0]);
  }
}
template <class T>
void spread(
    int64_t M, int64_t D, int64_t count, const T* a, int64_t lda, const T* r, int64_t ldr, const T* start, int64_t lds,
    T* out, int64_t ldo) {
  // Another start is added when all is summed: it may be large, and each addition to it would round as much.
  const bool apart = start && start != out && M > kTokens;
  for (int64_t m = 0; m < M; m += kTokens)
    for_tokens(M - m < kTokens ? M - m : kTokens, [&](auto J) {
      const T* from = m ? out : apart ? nullptr : start;
      spread_of<T, J.value>(count, D, a + m * lda, lda, r + m * ldr, ldr, from, m ? ldo : lds, out, ldo);
    });
  for (int64_t d = 0; apart && d < D; ++d)
    for (int64_t n = 0; n < count; n += W<T>)
      store<T>(out + d * ldo + n, load<T>(out + d * ldo + n) + load<T>(start + d * lds + n));
}

#define MVK_PIXELS(T)                                                                                       \
  template void sums(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, const T*, bool);  \
  template void sums_at_once(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t); \
  template void across_lanes(const T*, int64_t, vec<T>, T*);                                                \
  template void spread(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t);
MVK_PIXELS(float)
MVK_PIXELS(double)

}  // namespace MVK_ISA
}  // namespace mvk
