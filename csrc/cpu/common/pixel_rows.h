// Few tokens against many pixels, on maps whose dims are contiguous: a pixel is a row, and no map is ever transposed.
//
// Three products: scores (each element of a pixel is broadcast against the tokens' column, a narrow vector of G lanes), sums over
// pixels (dims are lanes, a pixel's weight is broadcast) and tokens spread over pixels (the same the other way). Scores are few, and
// are transposed at once: a row of them is a token's, as where pixels are lanes, and exponentials are the same there and here.
#pragma once

#include "common/pixels.h"

namespace mvk {
namespace MVK_ISA {

// One or two sets of tokens, each with its weights: v[m] is a row of dims, weight m of pixel n stands at s[m * lds + n].
template <class T>
struct Spread {
  const T* s;
  int64_t lds;
  const T* v;
};

// The scores of all tokens: s[m * lds + n] = sum_d x[n][d] q[m][d], q by columns; lanes up to a whole vector become `tail`. `turned`
// has room for the scores of a group.
template <class T>
void row_scores(
    int64_t M, int64_t D, int64_t count, const T* x, int64_t ldx, const T* q, T* turned, T* s, int64_t lds, T tail);

// c[m][d] = c or 0, times alpha[m * W] or 1, + sum_n s[m * lds + n] x[n * ldx + d] for all tokens and dims. c has whole vectors.
template <class T>
void weigh(
    int64_t M, int64_t D, int64_t count, const T* s, int64_t lds, const T* x, int64_t ldx, T* c, int64_t ldc,
    const T* alpha, bool first);

// out[n] = start's pixel n (or 0) + sum over sets and m of s[m][n] v[m], for all tokens, dims and pixels of a block; start is not out.
template <class T>
void spread_rows(
    int64_t M, int64_t D, int64_t count, const Spread<T>* sets, int some, int64_t ldv, const T* start, int64_t lds,
    T* out, int64_t ldo);

namespace {

template <class T>
constexpr int kMostLanes = W<T> < 8 ? W<T> : 8;
template <class T>
constexpr int kFewLanes = W<T> < 4 ? W<T> : 4;

// Tokens of a group: as many as M tokens waste least of.
template <class T>
MVK_INLINE int64_t group_of(int64_t M) {
  return M <= kFewLanes<T> ? kFewLanes<T> : kMostLanes<T>;
}
template <class T>
MVK_INLINE int64_t columns_size(const Bridge& a) {
  return round_up(a.M, group_of<T>(a.M)) * a.D;
}

// All lanes of v combined, in each lane.
template <class T, int step, size_t... I>
MVK_INLINE vec<T> swap_lanes(vec<T> v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (int(I) ^ step)...);
}
template <class T, class Op, int step = 1>
MVK_INLINE vec<T> fold(vec<T> v, const Op& op) {
  if constexpr (step < W<T>)
    return fold<T, Op, step * 2>(op(v, swap_lanes<T, step>(v, std::make_index_sequence<W<T>>{})), op);
  else
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
template <class T>
MVK_INLINE void pack_columns(const Bridge& a, const Tokens& t, int64_t b, int64_t h, T factor, T* dst) {
  const int64_t G = group_of<T>(a.M);
  with_type<T>(a.dtype, [&](auto type) {
    const auto* p = static_cast<const decltype(type)*>(t.data) + b * t.b + h * t.h;
    for (int64_t m0 = 0; m0 < a.M; m0 += G, dst += a.D * G)
      for (int64_t d = 0; d < a.D; ++d)
        for (int64_t j = 0; j < G; ++j)
          dst[d * G + j] = m0 + j < a.M ? factor * T(to_float(p[(m0 + j) * t.m + d * t.d])) : T(0);
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
  part_of<T>(a.pixels(), unit % a.chunks, a.chunks, from, to);
  return Blocks(from, to, most);
}

// One (batch, head) of a map as rows: in place where memory has them so, else in scratch.
template <class T>
struct Rows {
  Pixels<T> map;
  Rows(const Bridge& a, const Map& m, int64_t b, int64_t h, int64_t* table) : map(a, m, b, h, table) {}
  T* in_place(int64_t n) const { return map.uniform && map.last ? (map.base + map.at(n)).template own<T>() : nullptr; }
  const T* read(int64_t n, int64_t count, T* scratch, int64_t scratch_ld, int64_t& ld) {
    ld = map.map.x;
    if (const T* there = in_place(n)) return there;
    ld = scratch_ld;
    pack_rows<T>(map.lattice(n, count), 0, count, map.dims, scratch, ld);
    return scratch;
  }
  T* target(int64_t n, T* scratch, int64_t scratch_ld, int64_t& ld) {
    T* there = in_place(n);
    ld = there ? map.map.x : scratch_ld;
    return there ? there : scratch;
  }
  // Brings what was written to target() into the map.
  void put(int64_t n, int64_t count, const T* scratch, int64_t ld) {
    const T one = 1;
    if (!in_place(n)) unpack_rows<T>(map.lattice(n, count), 0, count, map.dims, scratch, ld, &one, 0);
  }
};

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
