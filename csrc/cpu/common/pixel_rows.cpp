// The products of few tokens with many pixels that are rows.
#include "common/pixel_rows.h"

#include "common/transpose.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T, int G>
struct Narrow {
  typedef T type __attribute__((vector_size(G * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(G * sizeof(T)), aligned(alignof(T)), may_alias));
};

// s[r][.] (from what is there if `from`) = sum_d x[r][d] q[d][.] for R pixels and one group. Even and odd dims have sums of
// their own: half as long, and half as inexact.
template <class T, int G, int R>
static void dots_tile(bool from, int64_t D, const T* x, int64_t ldx, const T* q, T* s) {
  using Tokens = typename Narrow<T, G>::type;
  using Memory = typename Narrow<T, G>::unaligned;
  Tokens even[R], odd[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) even[r] = odd[r] = Tokens{};
  int64_t d = 0;
  for (; d + 2 <= D; d += 2) {
    const Tokens column = *reinterpret_cast<const Memory*>(q + d * G);
    const Tokens next = *reinterpret_cast<const Memory*>(q + (d + 1) * G);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) even[r] += column * x[r * ldx + d];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) odd[r] += next * x[r * ldx + d + 1];
  }
  if (d < D) {
    const Tokens column = *reinterpret_cast<const Memory*>(q + d * G);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) even[r] += column * x[r * ldx + d];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Memory* to = reinterpret_cast<Memory*>(s + r * G);
    even[r] += odd[r];
    *to = from ? even[r] + *to : even[r];
  }
}

constexpr int64_t kDimChain = 32;  // dims summed before what is there is added

// c[m][d] = c or 0, times alpha[m * W], + sum_n s[m * lds + n] x[n * ldx + d] for M tokens and V vectors, the last of `rest` lanes.
template <class T, int M, int V>
static void weigh_tile(
    int64_t count, const T* s, int64_t lds, const T* x, int64_t ldx, int rest, T* c, int64_t ldc, const T* alpha,
    bool first) {
  vec<T> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = vec<T>{};
  for (int64_t n = 0; n < count; ++n, ++s, x += ldx) {
    vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v + 1 < V; ++v) row[v] = load<T>(x + v * W<T>);
    row[V - 1] = load_partial<T>(x + (V - 1) * W<T>, rest);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vec<T> weight = splat(s[m * lds]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += weight * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = c + m * ldc + v * W<T>;
      if (!first) sum[m][v] += (alpha ? splat(alpha[m * W<T>]) : splat(T(1))) * load<T>(to);
      store<T>(to, sum[m][v]);
    }
}

// Pixels summed in one chain: as long as the sums of lanes are on maps that have pixels as lanes.
constexpr int64_t kPixelChain = 16;

// out[n] = start's pixel n (or 0) + sum over sets and m of s[m][n] v[m], for R pixels, V vectors.
template <class T, int R, int V>
static void spread_tile(
    int64_t M, const Spread<T>* sets, int count, int64_t ldv, const T* start, int64_t lds, int rest, T* out,
    int64_t ldo) {
  vec<T> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = vec<T>{};
  for (int i = 0; i < count; ++i) {
    const T *s = sets[i].s, *token = sets[i].v;
    for (int64_t m = 0; m < M; ++m, s += sets[i].lds, token += ldv) {
      vec<T> row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) row[v] = load<T>(token + v * W<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec<T> weight = splat(s[r]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += weight * row[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int lanes = v + 1 < V ? W<T> : rest;
      // The largest term last.
      if (start) sum[r][v] += load_partial<T>(start + r * lds + v * W<T>, lanes);
      store_partial<T>(out + r * ldo + v * W<T>, sum[r][v], lanes);
    }
}

// The even, or the odd, lanes of a, then of b.
template <class T, bool odd, size_t... I>
MVK_INLINE vec<T> alternate(vec<T> a, vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(2 * I + odd)...);
}

// to[j * ld + n] = from[n * G + j] for `some` j, and n up to whole vectors.
template <class T, int G>
static void by_tokens(int64_t some, int64_t count, const T* from, T* to, int64_t ld) {
  constexpr auto all = std::make_index_sequence<W<T>>{};
  for (int64_t n = 0; n < count; n += W<T>) {
    vec<T> v[G];
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) v[i] = load<T>(from + n * G + i * W<T>);
    if constexpr (G == W<T>) {
      transpose<T>(v);
    } else {
      // Numbers 2 i and 2 i + 1 part, again and again: in the end each vector has those of one token.
#pragma GCC unroll 3
      for (int half = G / 2; half; half /= 2) {
        vec<T> u[G];
#pragma GCC unroll 8
        for (int i = 0; i < G / 2; ++i) {
          u[i] = alternate<T, false>(v[2 * i], v[2 * i + 1], all);
          u[i + G / 2] = alternate<T, true>(v[2 * i], v[2 * i + 1], all);
        }
#pragma GCC unroll 8
        for (int i = 0; i < G; ++i) v[i] = u[i];
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < G; ++j)
      if (j < some) store<T>(to + j * ld + n, v[j]);
  }
}

// s[n * G + j] = sum_d x[n][d] q[d * G + j]; lanes up to a whole vector of pixels become `tail`.
template <class T, int G>
static void dots(int64_t D, int64_t count, const T* x, int64_t ldx, const T* q, T* s, T tail) {
  constexpr int R = kVectorBytes == 64 ? 12 : 6;
  auto tile = [&](auto height, int64_t n) __attribute__((always_inline)) {
    for (int64_t d = 0; d < D; d += kDimChain)
      dots_tile<T, G, height.value>(d > 0, smaller(D - d, kDimChain), x + n * ldx + d, ldx, q + d * G, s + n * G);
  };
  int64_t n = 0;
  for (; n + R <= count; n += R) tile(std::integral_constant<int, R>{}, n);
  // What is left, with some of the tile before once more: few pixels alone wait for each product.
  if (n < count && count >= R) n = count, tile(std::integral_constant<int, R>{}, n - R);
  for (; n + 4 <= count; n += 4) tile(std::integral_constant<int, 4>{}, n);
  for (; n < count; ++n) tile(std::integral_constant<int, 1>{}, n);
  for (int64_t i = count * G; i < round_up(count, W<T>) * G; ++i) s[i] = tail;
}

}  // namespace

template <class T>
void row_scores(
    int64_t M, int64_t D, int64_t count, const T* x, int64_t ldx, const T* q, T* turned, T* s, int64_t lds, T tail) {
  auto groups = [&](auto size) {
    constexpr int G = size.value;
    for (int64_t m = 0; m < M; m += G) {
      dots<T, G>(D, count, x, ldx, q + m * D, turned, tail);
      by_tokens<T, G>(smaller(M - m, G), count, turned, s + m * lds, lds);
    }
  };
  if (group_of<T>(M) == kFewLanes<T>)
    groups(std::integral_constant<int, kFewLanes<T>>{});
  else
    groups(std::integral_constant<int, kMostLanes<T>>{});
}

template <class T>
void weigh(
    int64_t M, int64_t D, int64_t count, const T* s, int64_t lds, const T* x, int64_t ldx, T* c, int64_t ldc,
    const T* alpha, bool first) {
  auto group = [&](auto J, int64_t m) __attribute__((always_inline)) {
    constexpr int tokens = J.value, registers = (kVectorBytes == 64 ? 24 : 12) / tokens;
    constexpr int most = registers > 4 ? 4 : registers < 1 ? 1 : registers;
    const Tiles tiles((D + W<T> - 1) / W<T>, most);
    auto panel = [&](auto width, int64_t d) __attribute__((always_inline)) {
      const int rest = at_most<T>(D - d - (width.value - 1) * W<T>);
      for (int64_t n = 0; n < count; n += kPixelChain)
        weigh_tile<T, tokens, width.value>(
            smaller(count - n, kPixelChain), s + m * lds + n, lds, x + n * ldx + d, ldx, rest, c + m * ldc + d, ldc,
            n || !alpha ? nullptr : alpha + m * W<T>, first && n == 0);
    };
    tiles.each([&](int vectors, int64_t before) {
      for_tokens<most>(vectors, [&](auto width) { panel(width, before * W<T>); });
    });
  };
  for (int64_t m = 0; m < M; m += kTokens) for_tokens(smaller(M - m, kTokens), [&](auto J) { group(J, m); });
}

template <class T>
void spread_rows(
    int64_t M, int64_t D, int64_t count, const Spread<T>* sets, int some, int64_t ldv, const T* start, int64_t lds,
    T* out, int64_t ldo) {
  auto panel = [&](auto width, int64_t d) __attribute__((always_inline)) {
    constexpr int V = decltype(width)::value, most = (kVectorBytes == 64 ? 24 : 12) / V, R = most > 8 ? 8 : most;
    const int rest = at_most<T>(D - d - (V - 1) * W<T>);
    auto rows = [&](auto height, int64_t n) __attribute__((always_inline)) {
      Spread<T> at[2];
      for (int i = 0; i < some; ++i) at[i] = {sets[i].s + n, sets[i].lds, sets[i].v + d};
      spread_tile<T, height.value, V>(
          M, at, some, ldv, start ? start + n * lds + d : nullptr, lds, rest, out + n * ldo + d, ldo);
    };
    int64_t n = 0;
    for (; n + R <= count; n += R) rows(std::integral_constant<int, R>{}, n);
    if (n < count && count >= R) n = count, rows(std::integral_constant<int, R>{}, n - R);
    for (; n < count; ++n) rows(std::integral_constant<int, 1>{}, n);
  };
  const Tiles tiles((D + W<T> - 1) / W<T>, 3);
  tiles.each(
      [&](int vectors, int64_t before) { for_tokens<3>(vectors, [&](auto width) { panel(width, before * W<T>); }); });
}

#define MVK_ROWS(T)                                                                                                  \
  template void row_scores(int64_t, int64_t, int64_t, const T*, int64_t, const T*, T*, T*, int64_t, T);              \
  template void weigh(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T*, int64_t, const T*, bool); \
  template void spread_rows(int64_t, int64_t, int64_t, const Spread<T>*, int, int64_t, const T*, int64_t, T*, int64_t);
MVK_ROWS(float)
MVK_ROWS(double)

}  // namespace MVK_ISA
}  // namespace mvk
