// Mobile to Former on CPUs: few tokens attend to all pixels of a map, key and value at once.
//
// For each block of pixels of a (batch, head): scores, exponentials, sums of p x, with the block in cache: the map is read
// from memory once. With pixels as lanes each lane keeps a running maximum, sum and weighted sums of its own, so nothing
// goes across lanes until the end; maps whose dims are contiguous go by rows, lanes are tokens and then dims. The backward
// makes the scores of all pixels again, and once their sums are known writes dx, and sums dquery as the forward sums the
// output. Chunks of pixels are added up in order: no atomics.
#include "common/pixel_rows.h"
#include "mobile_to_former/rows.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// What is known of a token after all pixels of a unit, as a chunk's part or as the result.
template <class T>
MVK_INLINE void put_output(const Bridge& a, int64_t unit, int64_t m, const T* row, T most, T total) {
  if (a.partial) {
    T* to = static_cast<T*>(a.partial) + unit * a.forward_partial() + m * (a.D + 2);
    memcpy(to, row, a.D * sizeof(T));
    to[a.D] = most, to[a.D + 1] = total;
  } else {
    store_token<T>(a, a.out, unit / a.heads, unit % a.heads, m, row);
  }
}

template <class T>
static void forward_lanes(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      Arena::bytes<int64_t>(K) + Arena::bytes<T>(M * ldq) + Arena::bytes<T>(D * K) + Arena::bytes<T>(M * K) +
          Arena::bytes<T>(Sums<T>::lanes_size(a)) + 3 * Arena::bytes<T>(M * W<T>) +
          Arena::bytes<T>(Sums<T>::rows_size(a)),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  T* q = arena.take<T>(M * ldq);
  T* packed = arena.take<T>(D * K);
  T* s = arena.take<T>(M * K);
  T* acc = arena.take<T>(Sums<T>::lanes_size(a));
  T* top = arena.take<T>(M * W<T>);
  T* sum = arena.take<T>(M * W<T>);
  T* alpha = arena.take<T>(M * W<T>);
  Sums<T> out(a, acc, arena.take<T>(Sums<T>::rows_size(a)));
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T> x(a, a.x, b, h, table);
    pack_tokens<T>(a, a.query, b, h, T(factor.queries), q, ldq);
    for (int64_t i = 0; i < M * W<T>; ++i) top[i] = -kInfinity<T>, sum[i] = 0;
    int64_t from, to;
    part_of<T>(a.pixels(), unit % a.chunks, a.chunks, from, to);
    Span<T> span(from, to, K);
    bool first = true;
    for (int64_t n = span.next, count; (count = span.take()); n = span.next, first = false) {
      int64_t ld;
      const T* rows = x.rows(n, count, packed, K, ld);
      scores<T>(M, D, q, ldq, rows, ld, count, s, K);
      fill_tail<T>(M, s, K, count, -kInfinity<T>);
      for (int64_t m = 0; m < M; ++m)
        exponentials<T, OneToken<T>>(
            s + m * K, count, T(factor.scores), top + m * W<T>, sum + m * W<T>, alpha + m * W<T>, count == to - from);
      out.once = count == to - from;
      out.add(count, s, K, rows, ld, alpha, first);
    }
    for (int64_t m = 0; m < M; ++m) {
      const T most = lane_max<T>(load<T>(top + m * W<T>));
      vec<T> part[1] = {
          (load<T>(top + m * W<T>) - splat(most == -kInfinity<T> ? T(0) : most)) * splat(T(factor.scores))};
      exp2_nonpositive<1>(part);
      const T total = lane_sum<T>(part[0] * load<T>(sum + m * W<T>));
      const T* row = out.token(m, a.partial ? part[0] : part[0] * splat(T(1) / total));
      put_output<T>(a, unit, m, row, most, total);
    }
  }
}

template <class T, int G>
static void forward_rows(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldq = round_up(D, W<T>), groups = (M + G - 1) / G;
  arena.reset(
      Arena::bytes<int64_t>(K) + Arena::bytes<T>(groups * D * G) + Arena::bytes<T>(K * ldq) + Arena::bytes<T>(K * G) +
          2 * Arena::bytes<T>(groups * W<T>) + Arena::bytes<T>(W<T>) + Arena::bytes<T>(M * ldq),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  T* q = arena.take<T>(groups * D * G);
  T* packed = arena.take<T>(K * ldq);
  T* s = arena.take<T>(K * G);
  T* top = arena.take<T>(groups * W<T>);
  T* sum = arena.take<T>(groups * W<T>);
  T* alpha = arena.take<T>(W<T>);
  T* out = arena.take<T>(M * ldq);
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T> x(a, a.x, b, h, table);
    pack_columns<T, G>(a, a.query, b, h, T(factor.queries), q);
    for (int64_t i = 0; i < groups * W<T>; ++i) top[i] = -kInfinity<T>, sum[i] = 0;
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    while (blocks.next()) {
      int64_t ld;
      const T* rows = x.read(blocks.n, blocks.count, packed, ldq, ld);
      for (int64_t g = 0; g < groups; ++g) {
        dots<T, G>(D, blocks.count, rows, ld, q + g * D * G, s, -kInfinity<T>);
        exponentials<T, TokensInTurn<T, G>>(
            s, blocks.count * G, T(factor.scores), top + g * W<T>, sum + g * W<T>, alpha);
        weigh<T, G>(smaller(M - g * G, G), D, blocks.count, s, rows, ld, out + g * G * ldq, ldq, alpha, blocks.first());
      }
    }
    for (int64_t g = 0; g < groups; ++g) store<T>(sum + g * W<T>, TokensInTurn<T, G>::sum(load<T>(sum + g * W<T>)));
    for (int64_t m = 0; m < M; ++m) {
      const int64_t at = m / G * W<T> + m % G;
      T* row = out + m * ldq;
      if (!a.partial)
        for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, splat(T(1) / sum[at]) * load<T>(row + d));
      put_output<T>(a, unit, m, row, top[at], sum[at]);
    }
  }
}

// Over (batch, head): the chunks' sums, each less than its own maximum, put together in order.
template <class T>
static void merge(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D;
  arena.reset(Arena::bytes<T>(D), a.poison);
  T* row = arena.take<T>(D);
  const Factor factor(a.scale, false);
  for (int64_t item = begin; item < end; ++item)
    for (int64_t m = 0; m < M; ++m) {
      const T* parts = static_cast<const T*>(a.partial) + item * a.chunks * a.forward_partial() + m * (D + 2);
      T most = -kInfinity<T>, total = 0;
      for (int64_t c = 0; c < a.chunks; ++c) {
        const T top = parts[c * a.forward_partial() + D];
        most = top > most ? top : most;
      }
      for (int64_t d = 0; d < D; ++d) row[d] = 0;
      for (int64_t c = 0; c < a.chunks; ++c) {
        const T* part = parts + c * a.forward_partial();
        const T shift = most == -kInfinity<T> ? T(0) : most;
        const T f = T(__builtin_exp2(double((part[D] - shift) * T(factor.scores))));
        total += f * part[D + 1];
        for (int64_t d = 0; d < D; ++d) row[d] += f * part[d];
      }
      for (int64_t d = 0; d < D; ++d) row[d] /= total;
      store_token<T>(a, a.out, item / a.heads, item % a.heads, m, row);
    }
}

// Pixels that are split over threads go in two stages, with a barrier between.
enum class Stage { all, weights, products };

template <class T>
MVK_INLINE void scale_row(T* row, int64_t ld, T factor) {
  for (int64_t d = 0; d < ld; d += W<T>) store<T>(row + d, splat(factor) * load<T>(row + d));
}

template <class T>
MVK_INLINE void put_dquery(const Bridge& a, int64_t unit, int64_t m, const T* row) {
  if (a.partial)
    memcpy(static_cast<T*>(a.partial) + (unit * a.M + m) * a.D, row, a.D * sizeof(T));
  else
    store_token<T>(a, a.dquery, unit / a.heads, unit % a.heads, m, row);
}

// The weights of a chunk. q has the queries and then the output's gradient, for S and dP.
template <class T>
static void weights_lanes(
    const Bridge& a, Pixels<T>& x, int64_t from, int64_t to, const T* q, int64_t ldq, T* packed, int64_t K,
    const Weights<T>& w) {
  const T factor(Factor(a.scale, false).scores);
  Span<T> span(from, to, K);
  for (int64_t n = span.next, count; (count = span.take()); n = span.next) {
    int64_t ld;
    const T* rows = x.rows(n, count, packed, K, ld);
    scores<T>(2 * a.M, a.D, q, ldq, rows, ld, count, w.e + (n - from), w.ld);
  }
  fill_tail<T>(a.M, w.e, w.ld, to - from, -kInfinity<T>);
  fill_tail<T>(a.M, w.dp, w.ld, to - from, T(0));
  for (int64_t m = 0; m < a.M; ++m) {
    const auto row = exponentials_of_row<T, OneToken<T>>(w.e + m * w.ld, w.dp + m * w.ld, to - from, factor);
    w.rows[m] = {row.top[0], row.sum[0], row.base[0], row.sum_dp[0]};
  }
}

template <class T>
static void backward_lanes(const Bridge& a, int64_t begin, int64_t end, Stage stage) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(2 * M * ldq) + 2 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(Weights<T>::size(a, M, 1)) + Arena::bytes<T>(Sums<T>::lanes_size(a)) +
          Arena::bytes<T>(Sums<T>::rows_size(a)) + Arena::bytes<Shift<T>>(M),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* q = arena.take<T>(2 * M * ldq);
  T* q_scaled = arena.take<T>(2 * M * ldq);
  T* go = q_scaled + M * ldq;
  T* packed = arena.take<T>(D * K);
  T* dpacked = arena.take<T>(D * K);
  T* scratch = arena.take<T>(Weights<T>::size(a, M, 1));
  T* acc = arena.take<T>(Sums<T>::lanes_size(a));
  Sums<T> dq(a, acc, arena.take<T>(Sums<T>::rows_size(a)));
  Shift<T>* shift = arena.take<Shift<T>>(M);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T> x(a, a.x, b, h, table);
    Pixels<T> dx(a, a.dx, b, h, dtable);
    const Weights<T> w(a, M, 1, scratch, unit);
    int64_t from, to;
    part_of<T>(a.pixels(), unit % a.chunks, a.chunks, from, to);
    if (stage != Stage::products) {
      pack_tokens<T>(a, a.query, b, h, T(Factor(a.scale, false).queries), q, ldq);
      pack_tokens<T>(a, a.grad, b, h, T(1), q + M * ldq, ldq);
      weights_lanes<T>(a, x, from, to, q, ldq, packed, K, w);
    }
    if (stage == Stage::weights) continue;
    pack_tokens<T>(a, a.query, b, h, T(a.scale), q_scaled, ldq);
    pack_tokens<T>(a, a.grad, b, h, T(1), go, ldq);
    for (int64_t m = 0; m < M; ++m) {
      shift[m] = shift_of(a, w, unit, m);
      scale_row(q_scaled + m * ldq, ldq, shift[m].factor);
      scale_row(go + m * ldq, ldq, shift[m].factor);
    }
    Span<T> span(from, to, K);
    bool first = true;
    for (int64_t n = span.next, count; (count = span.take()); n = span.next, first = false) {
      int64_t ld, ldd;
      const T* rows = x.rows(n, count, packed, K, ld);
      T *e = w.e + (n - from), *ds = w.dp + (n - from);
      for (int64_t m = 0; m < M; ++m)
        derivative(
            e + m * w.ld, ds + m * w.ld, ds + m * w.ld, round_up(count, W<T>), splat(shift[m].base),
            splat(shift[m].shift));
      T* out = dx.target(n, count, dpacked, K, ldd);
      spread<T>(M, D, count, q_scaled, ldq, ds, w.ld, nullptr, 0, out, ldd);
      spread<T>(M, D, count, go, ldq, e, w.ld, out, ldd, out, ldd);
      dx.put(n, count, out, ldd, dpacked);
      dq.once = count == to - from;
      dq.add(count, ds, w.ld, rows, ld, nullptr, first);
    }
    for (int64_t m = 0; m < M; ++m) put_dquery<T>(a, unit, m, dq.token(m, splat(T(a.scale) * shift[m].factor)));
  }
}

// The same by rows, where q and go have the tokens by columns.
template <class T, int G>
static void weights_rows(
    const Bridge& a, Rows<T>& x, Blocks blocks, const T* q, const T* go, T* packed, int64_t ldq, const Weights<T>& w) {
  const int64_t groups = (a.M + G - 1) / G, lanes = (blocks.end - blocks.begin) * G;
  const T factor(Factor(a.scale, false).scores);
  while (blocks.next()) {
    int64_t ld;
    const T* rows = x.read(blocks.n, blocks.count, packed, ldq, ld);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = g * w.ld + (blocks.n - blocks.begin) * G;
      dots<T, G>(a.D, blocks.count, rows, ld, q + g * a.D * G, w.e + at, -kInfinity<T>);
      dots<T, G>(a.D, blocks.count, rows, ld, go + g * a.D * G, w.dp + at, T(0));
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const auto row = exponentials_of_row<T, TokensInTurn<T, G>>(w.e + g * w.ld, w.dp + g * w.ld, lanes, factor);
    for (int j = 0; j < G && g * G + j < a.M; ++j)
      w.rows[g * G + j] = {row.top[j], row.sum[j], row.base[j], row.sum_dp[j]};
  }
}

template <class T, int G>
static void backward_rows(const Bridge& a, int64_t begin, int64_t end, Stage stage) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldq = round_up(D, W<T>), groups = (M + G - 1) / G;
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(groups * D * G) + 3 * Arena::bytes<T>(M * ldq) +
          2 * Arena::bytes<T>((K + W<T>)*ldq) + Arena::bytes<T>(K * G) +
          Arena::bytes<T>(Weights<T>::size(a, groups, G)) + 2 * Arena::bytes<T>(groups * W<T>) +
          Arena::bytes<Shift<T>>(M),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* q = arena.take<T>(groups * D * G);
  T* go = arena.take<T>(groups * D * G);
  T* q_scaled = arena.take<T>(M * ldq);
  T* go_rows = arena.take<T>(M * ldq);
  T* dq = arena.take<T>(M * ldq);
  T* packed = arena.take<T>((K + W<T>)*ldq);
  T* dpacked = arena.take<T>((K + W<T>)*ldq);
  T* ds = arena.take<T>(K * G);
  T* scratch = arena.take<T>(Weights<T>::size(a, groups, G));
  T* base = arena.take<T>(groups * W<T>);
  T* below = arena.take<T>(groups * W<T>);
  Shift<T>* shift = arena.take<Shift<T>>(M);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T> x(a, a.x, b, h, table);
    Rows<T> dx(a, a.dx, b, h, dtable);
    const Weights<T> w(a, groups, G, scratch, unit);
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    if (stage != Stage::products) {
      pack_columns<T, G>(a, a.query, b, h, T(Factor(a.scale, false).queries), q);
      pack_columns<T, G>(a, a.grad, b, h, T(1), go);
      weights_rows<T, G>(a, x, blocks, q, go, packed, ldq, w);
    }
    if (stage == Stage::weights) continue;
    pack_tokens<T>(a, a.query, b, h, T(a.scale), q_scaled, ldq);
    pack_tokens<T>(a, a.grad, b, h, T(1), go_rows, ldq);
    for (int64_t i = 0; i < groups * W<T>; ++i) base[i] = below[i] = 0;
    for (int64_t m = 0; m < M; ++m) {
      shift[m] = shift_of(a, w, unit, m);
      scale_row(q_scaled + m * ldq, ldq, shift[m].factor);
      scale_row(go_rows + m * ldq, ldq, shift[m].factor);
      for (int64_t i = m / G * W<T> + m % G; i < (m / G + 1) * W<T>; i += G)
        base[i] = shift[m].base, below[i] = shift[m].shift;
    }
    while (blocks.next()) {
      int64_t ld, ldd;
      const int64_t n = blocks.n, count = blocks.count;
      const T* rows = x.read(n, count, packed, ldq, ld);
      T* out = dx.target(n, dpacked, ldq, ldd);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t some = smaller(M - g * G, G), from = g * G * ldq, at = g * w.ld + (n - blocks.begin) * G;
        derivative(w.e + at, w.dp + at, ds, count * G, load<T>(base + g * W<T>), load<T>(below + g * W<T>));
        const Spread<T> sets[2] = {{ds, q_scaled + from}, {w.e + at, go_rows + from}};
        spread_rows<T, G>(some, D, count, sets, 2, ldq, g ? out : nullptr, ldd, out, ldd);
        weigh<T, G>(some, D, count, ds, rows, ld, dq + from, ldq, nullptr, blocks.first());
      }
      dx.put(n, count, dpacked, ldq);
    }
    for (int64_t m = 0; m < M; ++m) {
      scale_row(dq + m * ldq, ldq, T(a.scale) * shift[m].factor);
      put_dquery<T>(a, unit, m, dq + m * ldq);
    }
  }
}

// Maps whose dims are contiguous go by rows.
template <class T>
static void forward(const Bridge& a, int64_t begin, int64_t end) {
  if (a.x.d != 1) return forward_lanes<T>(a, begin, end);
  with_group<T>(a.M, [&](auto G) { forward_rows<T, G.value>(a, begin, end); });
}
template <class T>
static void backward(const Bridge& a, int64_t begin, int64_t end) {
  const Stage stage = a.partial ? Stage::products : Stage::all;
  if (a.x.d != 1) return backward_lanes<T>(a, begin, end, stage);
  with_group<T>(a.M, [&](auto G) { backward_rows<T, G.value>(a, begin, end, stage); });
}
// The first stage of a backward in chunks.
template <class T>
static void weights(const Bridge& a, int64_t begin, int64_t end) {
  if (a.x.d != 1) return backward_lanes<T>(a, begin, end, Stage::weights);
  with_group<T>(a.M, [&](auto G) { backward_rows<T, G.value>(a, begin, end, Stage::weights); });
}

// Over (batch, head).
template <class T>
static void sum_dquery(const Bridge& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item)
    sum_chunks<T>(a, a.dquery, static_cast<T*>(a.partial) + item * a.chunks * a.M * a.D, a.M * a.D, item);
}

}  // namespace

extern const MobileToFormerKernels mobile_to_former_kernels;
const MobileToFormerKernels mobile_to_former_kernels = {
    by_dtype<forward<float>, forward<double>>, by_dtype<merge<float>, merge<double>>,
    by_dtype<weights<float>, weights<double>>, by_dtype<backward<float>, backward<double>>,
    by_dtype<sum_dquery<float>, sum_dquery<double>>};

}  // namespace MVK_ISA
}  // namespace mvk
