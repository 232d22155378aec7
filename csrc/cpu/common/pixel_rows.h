// Few tokens against many pixels, on maps whose dims are contiguous: a pixel is a row, and nothing is ever transposed.
//
// Tokens go in groups of G, the lanes of a narrow vector. Three products: scores (each element of a pixel is broadcast
// against the tokens' column, one narrow vector of scores a pixel), sums over pixels (dims are lanes, a pixel's weight is
// broadcast) and tokens spread over pixels (the same the other way). Scores lie pixel after pixel, G apart, so that
// exponentials fill whole vectors whatever M is: lane i of each belongs to token i % G.
#pragma once

#include "common/pixels.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T>
constexpr int kMostLanes = W<T> < 8 ? W<T> : 8;
template <class T>
constexpr int kFewLanes = W<T> < 4 ? W<T> : 4;

// f(std::integral_constant<int, G>) for the G that M tokens waste least of.
template <class T, class F>
MVK_INLINE void with_group(int64_t M, const F& f) {
  if (M <= kFewLanes<T>) return f(std::integral_constant<int, kFewLanes<T>>{});
  if constexpr (kMostLanes<T> > kFewLanes<T>) return f(std::integral_constant<int, kMostLanes<T>>{});
  f(std::integral_constant<int, kFewLanes<T>>{});
}

template <class T, int G>
struct Narrow {
  typedef T type __attribute__((vector_size(G * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(G * sizeof(T)), aligned(alignof(T)), may_alias));
};

// v combined with itself so that lanes whose numbers differ in the bits from .. to - 1 (powers of two) agree.
template <class T, int step, size_t... I>
MVK_INLINE vec<T> swap_lanes(vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (int(I) ^ step)...);
}
template <class T, int from, int to, class Op>
MVK_INLINE vec<T> fold(vec<T> v, const Op& op) {
  if constexpr (from < to) {
    v = op(v, swap_lanes<T, from>(v, std::make_index_sequence<W<T>>{}));
    return fold<T, from * 2, to>(v, op);
  }
  return v;
}
template <class T>
struct Most {
  vec<T> operator()(vec<T> a, vec<T> b) const { return maximum<T>(a, b); }
};
template <class T>
struct Sum {
  vec<T> operator()(vec<T> a, vec<T> b) const { return a + b; }
};

MVK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Pixels of a block: its rows are read three times, from L1 or near.
template <class T>
MVK_INLINE int64_t block_of_rows(const Bridge& a) {
  constexpr int64_t bytes = 48 << 10;
  const int64_t fit = bytes / ((a.D + 4 * a.M) * int64_t(sizeof(T))) / 16 * 16;
  return fit < 32 ? 32 : fit > 256 ? 256 : fit;
}

// Tokens by columns, G of them in a group: dst[(m / G * D + d) * G + m % G] = factor * token m, dim d; 0 beyond M.
template <class T, class S, int G>
MVK_INLINE void pack_columns(const Bridge& a, const Tokens& t, int64_t b, int64_t h, T factor, T* dst) {
  const S* p = static_cast<const S*>(t.data) + b * t.b + h * t.h;
  for (int64_t m0 = 0; m0 < a.M; m0 += G, dst += a.D * G)
    for (int64_t d = 0; d < a.D; ++d)
      for (int j = 0; j < G; ++j)
        dst[d * G + j] = m0 + j < a.M ? factor * T(to_float(p[(m0 + j) * t.m + d * t.d])) : T(0);
}

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

// The scores of one group; lanes up to a whole vector become `tail`.
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
  for (int64_t i = count * G; i % W<T>; ++i) s[i] = tail;
}

// c[m][d] = c or 0, times alpha[m], + sum_n s[n * G + m] x[n * ldx + d] for M tokens and V vectors, the last of `rest` lanes.
template <class T, int G, int M, int V>
static void weigh_tile(
    int64_t count, const T* s, const T* x, int64_t ldx, int rest, T* c, int64_t ldc, const T* alpha, bool first) {
  vec<T> sum[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[m][v] = vec<T>{};
  for (int64_t n = 0; n < count; ++n, s += G, x += ldx) {
    vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v + 1 < V; ++v) row[v] = load<T>(x + v * W<T>);
    row[V - 1] = load_partial<T>(x + (V - 1) * W<T>, rest);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const vec<T> weight = splat(s[m]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[m][v] += weight * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = c + m * ldc + v * W<T>;
      if (!first) sum[m][v] += (alpha ? splat(alpha[m]) : splat(T(1))) * load<T>(to);
      store<T>(to, sum[m][v]);
    }
}

// Pixels summed in one chain: as long as the sums of lanes are on maps that have pixels as lanes.
constexpr int64_t kPixelChain = 16;

// The same for one group of M tokens and all dims. c has whole vectors.
template <class T, int G>
static void weigh(
    int64_t M, int64_t D, int64_t count, const T* s, const T* x, int64_t ldx, T* c, int64_t ldc, const T* alpha,
    bool first) {
  for_tokens<G>(M, [&](auto J) {
    constexpr int tokens = J.value, registers = (kVectorBytes == 64 ? 24 : 12) / tokens;
    constexpr int most = registers > 4 ? 4 : registers < 1 ? 1 : registers;
    const Tiles tiles((D + W<T> - 1) / W<T>, most);
    int64_t d = 0;
    auto panel = [&](auto width) __attribute__((always_inline)) {
      const int rest = at_most<T>(D - d - (width.value - 1) * W<T>);
      for (int64_t n = 0; n < count; n += kPixelChain)
        weigh_tile<T, G, tokens, width.value>(
            smaller(count - n, kPixelChain), s + n * G, x + n * ldx + d, ldx, rest, c + d, ldc, n ? nullptr : alpha,
            first && n == 0);
      d += width.value * W<T>;
    };
    for (int i = 0; i < tiles.count; ++i) for_tokens<most>(tiles.height + (i < tiles.taller), panel);
  });
}

// [begin, end) by nearly equal blocks of at most `most`, a multiple of 16 as they are: their scores begin whole vectors.
struct Blocks {
  int64_t begin, end, step, n, count = 0;
  Blocks(int64_t from, int64_t to, int64_t most) : begin(from), end(to), n(from) {
    const int64_t blocks = (end - begin + most - 1) / most;
    step = blocks ? round_up((end - begin + blocks - 1) / blocks, 16) : 1;
  }
  bool first() const { return n == begin; }
  bool next() {
    n += count;
    count = smaller(end - n, step);
    return count > 0;
  }
};
template <class T>
MVK_INLINE Blocks blocks_of_unit(const Bridge& a, int64_t unit, int64_t most) {
  int64_t from, to;
  chunk_of<T>(a, unit % a.chunks, from, to);
  return Blocks(from, to, most);
}

// One or two sets of tokens, each with its weights: v[m] is a row of dims, weight m of pixel n stands at s[n * G + m].
template <class T>
struct Spread {
  const T* s;
  const T* v;
};

// out[n] = start's pixel n (or what is there, or 0) + sum over sets and m of s[n][m] v[m], for R pixels, V vectors.
template <class T, int G, int R, int V>
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
    for (int64_t m = 0; m < M; ++m, ++s, token += ldv) {
      vec<T> row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) row[v] = load<T>(token + v * W<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vec<T> weight = splat(s[r * G]);
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

// The same for all pixels of a block, all dims, and one group of M tokens.
template <class T, int G>
static void spread_rows(
    int64_t M, int64_t D, int64_t count, const Spread<T>* sets, int some, int64_t ldv, const T* start, int64_t lds,
    T* out, int64_t ldo) {
  auto panel = [&](auto width, int64_t d) __attribute__((always_inline)) {
    constexpr int V = decltype(width)::value, most = (kVectorBytes == 64 ? 24 : 12) / V, R = most > 8 ? 8 : most;
    const int rest = at_most<T>(D - d - (V - 1) * W<T>);
    auto rows = [&](auto height, int64_t n) __attribute__((always_inline)) {
      Spread<T> at[2];
      for (int i = 0; i < some; ++i) at[i] = {sets[i].s + n * G, sets[i].v + d};
      spread_tile<T, G, height.value, V>(
          M, at, some, ldv, start ? start + n * lds + d : nullptr, lds, rest, out + n * ldo + d, ldo);
    };
    int64_t n = 0;
    for (; n + R <= count; n += R) rows(std::integral_constant<int, R>{}, n);
    if (n < count && count >= R && start != out) n = count, rows(std::integral_constant<int, R>{}, n - R);
    for (; n < count; ++n) rows(std::integral_constant<int, 1>{}, n);
  };
  const Tiles tiles((D + W<T> - 1) / W<T>, 3);
  int64_t d = 0;
  for (int i = 0; i < tiles.count; ++i) {
    const int wide = tiles.height + (i < tiles.taller);
    for_tokens<3>(wide, [&](auto width) { panel(width, d); });
    d += wide * W<T>;
  }
}

// Adds D dims of every pixel to what is in out. With more than one group of tokens a map's own pixels are added after all
// of them: they may be large, and each addition to them would round as much.
template <class T>
static void add_rows(int64_t D, int64_t count, const T* rows, int64_t ld, T* out, int64_t ldo) {
  for (int64_t n = 0; n < count; ++n)
    for (int64_t d = 0; d < D; d += W<T>) {
      const int lanes = at_most<T>(D - d);
      T* to = out + n * ldo + d;
      store_partial<T>(to, load_partial<T>(to, lanes) + load_partial<T>(rows + n * ld + d, lanes), lanes);
    }
}

// One (batch, head) of a map as rows: in place where memory has them so, else in scratch.
template <class T, class S>
struct Rows {
  Pixels<T, S> map;
  Rows(const Bridge& a, const Map& m, int64_t b, int64_t h, int64_t* table) : map(a, m, b, h, table) {}
  bool in_place() const { return std::is_same_v<T, std::remove_const_t<S>> && map.uniform && map.last; }
  const T* read(int64_t n, int64_t count, T* scratch, int64_t scratch_ld, int64_t& ld) {
    if (in_place()) {
      ld = map.map.x;
      return reinterpret_cast<const T*>(map.base + map.at(n));
    }
    ld = scratch_ld;
    pack_rows<T>(map.lattice(n, count), 0, count, map.dims, scratch, ld);
    return scratch;
  }
  T* target(int64_t n, T* scratch, int64_t scratch_ld, int64_t& ld) {
    ld = in_place() ? map.map.x : scratch_ld;
    return in_place() ? reinterpret_cast<T*>(const_cast<std::remove_const_t<S>*>(map.base + map.at(n))) : scratch;
  }
  // Brings what was written to target() into the map.
  void put(int64_t n, int64_t count, const T* scratch, int64_t ld) {
    const T one = 1;
    if (!in_place()) unpack_rows<T>(map.lattice(n, count), 0, count, map.dims, scratch, ld, &one, 0);
  }
};

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
