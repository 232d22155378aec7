// What the two bridges of Mobile-Former share: few tokens against many pixels.
//
// Pixels are vector lanes, taken in blocks that stay in cache; a block is rows of dims, read in place where memory has it
// so, else packed (and transposed). Three products run on it: scores (tokens x dims, broadcast), sums over pixels (each
// lane keeps its own, added up across lanes once at the end) and tokens spread over the pixels. Maps whose dims are
// contiguous take another way: pixel_rows.h.
#pragma once

#include "common/lattice.h"
#include "common/mobile_former.h"
#include "common/softmax.h"

namespace mvk {
namespace MVK_ISA {

// acc[m * D + d] (a vector) = acc * alpha[m] (a vector, or 1) + sum over vectors of r[m][.] x[d][.], for any number of tokens.
template <class T>
void sums(
    int64_t M, int64_t D, int64_t count, const T* r, int64_t ldr, const T* x, int64_t ldx, T* acc, const T* alpha,
    bool first);

// The sum at once, across lanes: out[m * ldo + d] = sum_n r[m][n] x[d][n].
template <class T>
void sums_at_once(
    int64_t M, int64_t D, int64_t count, const T* r, int64_t ldr, const T* x, int64_t ldx, T* out, int64_t ldo);

// out[d] = sum of the lanes of acc[d] * factor, for D vectors; out has whole vectors.
template <class T>
void across_lanes(const T* acc, int64_t D, vec<T> factor, T* out);

// out[d * ldo + n] = (start[d * lds + n] or 0) + sum_m a[m * lda + d] r[m * ldr + n].
template <class T>
void spread(
    int64_t M, int64_t D, int64_t count, const T* a, int64_t lda, const T* r, int64_t ldr, const T* start, int64_t lds,
    T* out, int64_t ldo);

namespace {

constexpr int64_t kTokens = 8;  // tokens taken together, at most

// Pixels of a block: x is read twice and more from L2 at the worst, and the sums are touched once a block.
template <class T>
MVK_INLINE int64_t block_of_pixels(const Bridge& a) {
  constexpr int64_t unit = 4 * W<T>, bytes = 96 << 10;
  const int64_t fit = bytes / ((a.D + 2 * a.M) * int64_t(sizeof(T))) / unit * unit;
  const int64_t most = fit < unit ? unit : fit > 512 ? 512 : fit, all = round_up(a.pixels(), W<T>);
  return most < all ? most : all;
}

// Splits [begin, end) into nearly equal blocks of whole vectors. What is left over is a block of its own, which must be
// packed, unless so little is left in all that one packed block costs less than two.
template <class T>
struct Span {
  int64_t next, end, step, most_;
  Span(int64_t from, int64_t to, int64_t most) : next(from), end(to), most_(most) {
    const int64_t vectors = (to - from) / W<T>, blocks = vectors ? (vectors * W<T> + most - 1) / most : 1;
    step = vectors ? (vectors + blocks - 1) / blocks * W<T> : W<T>;
  }
  // The next block's size, 0 at the end; `next` is already past it.
  int64_t take() {
    const int64_t left = end - next, whole = left / W<T> * W<T>;
    int64_t count = whole ? (step < whole ? step : whole) : left;
    if (left < 8 * W<T> && left <= most_) count = left;  // packing so few is cheaper than a block more
    next += count;
    return count;
  }
};

// One (batch, head) of a map, by blocks of pixels.
template <class T>
struct Pixels : HeadPixels {
  int64_t dims;
  bool in_place;

  Pixels(const Bridge& a, const Map& m, int64_t b, int64_t h, int64_t* table)
      : HeadPixels(a.dtype, m, b, h, a.H, a.W, table), dims(a.D), in_place(base.own<T>() && m.x == 1 && uniform) {}
  // Rows of dims: pixel n + i of dim d at [d * ld + i]; lanes up to a whole vector are zero.
  const T* rows(int64_t n, int64_t count, T* scratch, int64_t scratch_ld, int64_t& ld) {
    if (in_place && count % W<T> == 0) {
      ld = map.d;
      return (base + n).template own<T>();
    }
    ld = scratch_ld;
    if (in_place) {
      const T* from = (base + n).template own<T>();
      for (int64_t d = 0; d < dims; ++d) take_row<T>(from + d * map.d, count, scratch + d * ld);
    } else {
      pack_panel<T>(lattice(n, count), 0, count, dims, T(1), scratch, ld);
    }
    return scratch;
  }
  // Where rows of dims are to be written; put() brings them into the map.
  T* target(int64_t n, int64_t count, T* scratch, int64_t scratch_ld, int64_t& ld) {
    if (in_place && count % W<T> == 0) {
      ld = map.d;
      return (base + n).template own<T>();
    }
    ld = scratch_ld;
    return scratch;
  }
  void put(int64_t n, int64_t count, const T* from, int64_t ld, const T* scratch) {
    if (from == scratch) unpack_panel<T>(lattice(n, count), 0, count, dims, from, ld);
  }
};

// dst[m * ld + d] = factor * tokens; ld whole vectors apart, zero beyond D.
template <class T>
MVK_INLINE void pack_tokens(const Bridge& a, const Tokens& t, int64_t b, int64_t h, T factor, T* dst, int64_t ld) {
  with_type<T>(a.dtype, [&](auto type) {
    const auto* p = static_cast<const decltype(type)*>(t.data) + b * t.b + h * t.h;
    for (int64_t m = 0; m < a.M; ++m, p += t.m, dst += ld) {
      int64_t d = 0;
      if (t.d == 1)
        for (; d + W<T> <= a.D; d += W<T>) store<T>(dst + d, splat(factor) * load<T>(p + d));
      for (; d < ld; ++d) dst[d] = d < a.D ? factor * T(to_float(p[d * t.d])) : T(0);
    }
  });
}

// s[j * lds + n] = sum_d a[j * lda + d] x[d * ldx + n], for J rows and `count` pixels, rounded up to whole vectors.
template <class T>
static void scores(
    int64_t J, int64_t D, const T* a, int64_t lda, const T* x, int64_t ldx, int64_t count, T* s, int64_t lds) {
  int64_t n = 0;
  count = round_up(count, W<T>);
  auto panels = [&](int vectors) {
    for (; n + vectors * W<T> <= count; n += vectors * W<T>)
      product_in_parts<T>(vectors, J, D, a, lda, x + n, ldx, s + n, lds, {});
  };
  if (J <= kTileRows / 2) panels(4);
  panels(2);
  panels(1);
}

// f(std::integral_constant<int, J>) for J of 1 .. kTokens.
template <int J = kTokens, class F>
MVK_INLINE void for_tokens(int64_t count, const F& f) {
  if (count == J) return f(std::integral_constant<int, J>{});
  if constexpr (J > 1) for_tokens<J - 1>(count, f);
}

// Sums over the pixels of a unit for all tokens. If they are one block they are added up across lanes at once, else each
// lane keeps its own in memory until the end.
template <class T>
struct Sums {
  int64_t M, D, ld;
  bool once;
  T *lanes, *rows;
  Sums(const Bridge& a, T* lanes_memory, T* rows_memory)
      : M(a.M), D(a.D), ld(round_up(a.D, W<T>)), once(false), lanes(lanes_memory), rows(rows_memory) {}
  static size_t lanes_size(const Bridge& a) { return a.M * a.D * W<T>; }
  static size_t rows_size(const Bridge& a) { return a.M * round_up(a.D, W<T>); }

  void add(int64_t count, const T* r, int64_t ldr, const T* x, int64_t ldx, const T* alpha, bool first) {
    if (!once) return sums<T>(M, D, count, r, ldr, x, ldx, lanes, alpha, first);
    sums_at_once<T>(M, D, count, r, ldr, x, ldx, rows, ld);
  }
  // Token m's sums, each lane's share times factor, whose lanes are equal if all was added at once.
  T* token(int64_t m, vec<T> factor) {
    T* row = rows + m * ld;
    if (once)
      for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, factor * load<T>(row + d));
    else
      across_lanes<T>(lanes + m * D * W<T>, D, factor, row);
    return row;
  }
};

// Lanes from `count` to the end of its vector, in J rows.
template <class T>
MVK_INLINE void fill_tail(int64_t J, T* s, int64_t lds, int64_t count, T value) {
  for (int64_t n = count; n % W<T>; ++n)
    for (int64_t j = 0; j < J; ++j) s[j * lds + n] = value;
}

// Writes D sums as tokens (batch b, head h, token m).
template <class T>
MVK_INLINE void store_token(const Bridge& a, const Tokens& t, int64_t b, int64_t h, int64_t m, const T* from) {
  const Elements to = Elements(t.data, a.dtype) + (b * t.b + h * t.h + m * t.m);
  if (to.own<T>() && t.d == 1) {
    memcpy(to.data, from, a.D * sizeof(T));
    return;
  }
  with_type<T>(a.dtype, [&](auto type) {
    for (int64_t d = 0; d < a.D; ++d) from_float(from[d], to.as<decltype(type)>() + d * t.d);
  });
}

// Adds up the chunks' token sums, `stride` apart, into the first, in order, and writes them.
template <class T>
MVK_INLINE void sum_chunks(const Bridge& a, const Tokens& t, T* first, int64_t stride, int64_t item) {
  for (int64_t chunk = 1; chunk < a.chunks; ++chunk)
    for (int64_t i = 0; i < a.M * a.D; ++i) first[i] += first[chunk * stride + i];
  for (int64_t m = 0; m < a.M; ++m) store_token<T>(a, t, item / a.heads, item % a.heads, m, first + m * a.D);
}

// Pixels of a chunk at most, rounded up to whole vectors.
template <class T>
MVK_INLINE int64_t chunk_most(const Bridge& a) {
  const int64_t vectors = (a.pixels() + W<T> - 1) / W<T>;
  return (vectors + a.chunks - 1) / a.chunks * W<T>;
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
