// Mobile to Former on CPUs: few tokens attend to all pixels of a map, key and value at once.
//
// For each block of pixels of a (batch, head): scores, exponentials, sums of p x, with the block in cache: the map is read
// from memory once. With pixels as lanes each lane keeps a running maximum, sum and weighted sums of its own, so nothing
// goes across lanes until the end; where the dims of a map are contiguous, a token has one maximum for all lanes. The backward
// makes the scores of all pixels again, and once their sums are known writes dx, and sums dquery as the forward sums the
// output. Chunks of pixels are added up in order: no atomics.
#include "common/pixel_rows.h"
#include "mobile_to_former/rows.h"

namespace mvk {
namespace MVK_ISA {
namespace {

template <class T>
MVK_INLINE void scale_row(T* row, int64_t ld, T factor) {
  for (int64_t d = 0; d < ld; d += W<T>) store<T>(row + d, splat(factor) * load<T>(row + d));
}

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
        exponentials<T>(
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

template <class T>
static void forward_rows(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      Arena::bytes<int64_t>(K) + Arena::bytes<T>(columns_size<T>(a)) + Arena::bytes<T>(K * ldq) +
          Arena::bytes<T>(K * group_of<T>(M)) + Arena::bytes<T>(M * K) + 3 * Arena::bytes<T>(M * W<T>) +
          Arena::bytes<T>(M * ldq),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  T* q = arena.take<T>(columns_size<T>(a));
  T* packed = arena.take<T>(K * ldq);
  T* turned = arena.take<T>(K * group_of<T>(M));
  T* s = arena.take<T>(M * K);
  T* top = arena.take<T>(M * W<T>);
  T* sum = arena.take<T>(M * W<T>);
  T* alpha = arena.take<T>(M * W<T>);
  T* out = arena.take<T>(M * ldq);
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T> x(a, a.x, b, h, table);
    pack_columns<T>(a, a.query, b, h, T(factor.queries), q);
    for (int64_t i = 0; i < M * W<T>; ++i) top[i] = -kInfinity<T>, sum[i] = 0;
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    while (blocks.next()) {
      int64_t ld;
      const T* rows = x.read(blocks.n, blocks.count, packed, ldq, ld);
      row_scores<T>(M, D, blocks.count, rows, ld, q, turned, s, K, -kInfinity<T>);
      for (int64_t m = 0; m < M; ++m)
        exponentials<T>(
            s + m * K, blocks.count, T(factor.scores), top + m * W<T>, sum + m * W<T>, alpha + m * W<T>, true);
      weigh<T>(M, D, blocks.count, s, K, rows, ld, out, ldq, alpha, blocks.first());
    }
    for (int64_t m = 0; m < M; ++m) {
      T* row = out + m * ldq;
      const T total = lane_sum<T>(load<T>(sum + m * W<T>));
      if (!a.partial) scale_row(row, ldq, T(1) / total);
      put_output<T>(a, unit, m, row, top[m * W<T>], total);
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
MVK_INLINE void put_dquery(const Bridge& a, int64_t unit, int64_t m, const T* row) {
  if (a.partial)
    memcpy(static_cast<T*>(a.partial) + (unit * a.M + m) * a.D, row, a.D * sizeof(T));
  else
    store_token<T>(a, a.dquery, unit / a.heads, unit % a.heads, m, row);
}

// The weights of a chunk of so many pixels, whose scores and dP are there.
template <class T>
static void weights_of_scores(const Bridge& a, int64_t count, const Weights<T>& w) {
  const T factor(Factor(a.scale, false).scores);
  for (int64_t m = 0; m < a.M; ++m) w.rows[m] = exponentials_of_row<T>(w.e + m * w.ld, w.dp + m * w.ld, count, factor);
}

// The queries and the output's gradient as what goes into dx is made of them.
template <class T>
static void shifted_tokens(
    const Bridge& a, const Weights<T>& w, int64_t unit, T* query, T* grad, int64_t ld, Shift<T>* shift) {
  const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
  pack_tokens<T>(a, a.query, b, h, T(a.scale), query, ld);
  pack_tokens<T>(a, a.grad, b, h, T(1), grad, ld);
  for (int64_t m = 0; m < a.M; ++m) {
    shift[m] = shift_of(a, w, unit, m);
    scale_row(query + m * ld, ld, shift[m].factor);
    scale_row(grad + m * ld, ld, shift[m].factor);
  }
}

// The weights of a chunk. q has the queries and then the output's gradient, for S and dP.
template <class T>
static void weights_lanes(
    const Bridge& a, Pixels<T>& x, int64_t from, int64_t to, const T* q, int64_t ldq, T* packed, int64_t K,
    const Weights<T>& w) {
  Span<T> span(from, to, K);
  for (int64_t n = span.next, count; (count = span.take()); n = span.next) {
    int64_t ld;
    const T* rows = x.rows(n, count, packed, K, ld);
    scores<T>(2 * a.M, a.D, q, ldq, rows, ld, count, w.e + (n - from), w.ld);
  }
  fill_tail<T>(a.M, w.e, w.ld, to - from, -kInfinity<T>);
  fill_tail<T>(a.M, w.dp, w.ld, to - from, T(0));
  weights_of_scores(a, to - from, w);
}

template <class T>
static void backward_lanes(const Bridge& a, int64_t begin, int64_t end, Stage stage) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(2 * M * ldq) + 2 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(Weights<T>::size(a)) + Arena::bytes<T>(Sums<T>::lanes_size(a)) +
          Arena::bytes<T>(Sums<T>::rows_size(a)) + Arena::bytes<Shift<T>>(M),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* q = arena.take<T>(2 * M * ldq);
  T* q_scaled = arena.take<T>(2 * M * ldq);
  T* go = q_scaled + M * ldq;
  T* packed = arena.take<T>(D * K);
  T* dpacked = arena.take<T>(D * K);
  T* scratch = arena.take<T>(Weights<T>::size(a));
  T* acc = arena.take<T>(Sums<T>::lanes_size(a));
  Sums<T> dq(a, acc, arena.take<T>(Sums<T>::rows_size(a)));
  Shift<T>* shift = arena.take<Shift<T>>(M);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T> x(a, a.x, b, h, table);
    Pixels<T> dx(a, a.dx, b, h, dtable);
    const Weights<T> w(a, scratch, unit);
    int64_t from, to;
    part_of<T>(a.pixels(), unit % a.chunks, a.chunks, from, to);
    if (stage != Stage::products) {
      pack_tokens<T>(a, a.query, b, h, T(Factor(a.scale, false).queries), q, ldq);
      pack_tokens<T>(a, a.grad, b, h, T(1), q + M * ldq, ldq);
      weights_lanes<T>(a, x, from, to, q, ldq, packed, K, w);
    }
    if (stage == Stage::weights) continue;
    shifted_tokens(a, w, unit, q_scaled, go, ldq, shift);
    Span<T> span(from, to, K);
    bool first = true;
    for (int64_t n = span.next, count; (count = span.take()); n = span.next, first = false) {
      int64_t ld, ldd;
      const T* rows = x.rows(n, count, packed, K, ld);
      T *e = w.e + (n - from), *ds = w.dp + (n - from);
      derivatives(M, count, e, ds, w.ld, shift);
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
template <class T>
static void weights_rows(
    const Bridge& a, Rows<T>& x, Blocks blocks, const T* q, const T* go, T* packed, int64_t ldq, T* turned,
    const Weights<T>& w) {
  while (blocks.next()) {
    int64_t ld;
    const T* rows = x.read(blocks.n, blocks.count, packed, ldq, ld);
    T *e = w.e + (blocks.n - blocks.begin), *dp = w.dp + (blocks.n - blocks.begin);
    row_scores<T>(a.M, a.D, blocks.count, rows, ld, q, turned, e, w.ld, -kInfinity<T>);
    row_scores<T>(a.M, a.D, blocks.count, rows, ld, go, turned, dp, w.ld, T(0));
  }
  weights_of_scores(a, blocks.end - blocks.begin, w);
}

template <class T>
static void backward_rows(const Bridge& a, int64_t begin, int64_t end, Stage stage) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(columns_size<T>(a)) + 3 * Arena::bytes<T>(M * ldq) +
          2 * Arena::bytes<T>((K + W<T>)*ldq) + Arena::bytes<T>(K * group_of<T>(M)) +
          Arena::bytes<T>(Weights<T>::size(a)) + Arena::bytes<Shift<T>>(M),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* q = arena.take<T>(columns_size<T>(a));
  T* go = arena.take<T>(columns_size<T>(a));
  T* q_scaled = arena.take<T>(M * ldq);
  T* go_rows = arena.take<T>(M * ldq);
  T* dq = arena.take<T>(M * ldq);
  T* packed = arena.take<T>((K + W<T>)*ldq);
  T* dpacked = arena.take<T>((K + W<T>)*ldq);
  T* turned = arena.take<T>(K * group_of<T>(M));
  T* scratch = arena.take<T>(Weights<T>::size(a));
  Shift<T>* shift = arena.take<Shift<T>>(M);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T> x(a, a.x, b, h, table);
    Rows<T> dx(a, a.dx, b, h, dtable);
    const Weights<T> w(a, scratch, unit);
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    if (stage != Stage::products) {
      pack_columns<T>(a, a.query, b, h, T(Factor(a.scale, false).queries), q);
      pack_columns<T>(a, a.grad, b, h, T(1), go);
      weights_rows<T>(a, x, blocks, q, go, packed, ldq, turned, w);
    }
    if (stage == Stage::weights) continue;
    shifted_tokens(a, w, unit, q_scaled, go_rows, ldq, shift);
    while (blocks.next()) {
      int64_t ld, ldd;
      const int64_t n = blocks.n, count = blocks.count;
      const T* rows = x.read(n, count, packed, ldq, ld);
      T* out = dx.target(n, dpacked, ldq, ldd);
      T *e = w.e + (n - blocks.begin), *ds = w.dp + (n - blocks.begin);
      derivatives(M, count, e, ds, w.ld, shift);
      const Spread<T> sets[2] = {{ds, w.ld, q_scaled}, {e, w.ld, go_rows}};
      spread_rows<T>(M, D, count, sets, 2, ldq, nullptr, 0, out, ldd);
      weigh<T>(M, D, count, ds, w.ld, rows, ld, dq, ldq, nullptr, blocks.first());
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
  forward_rows<T>(a, begin, end);
}
template <class T>
static void backward(const Bridge& a, int64_t begin, int64_t end) {
  const Stage stage = a.partial ? Stage::products : Stage::all;
  if (a.x.d != 1) return backward_lanes<T>(a, begin, end, stage);
  backward_rows<T>(a, begin, end, stage);
}
// The first stage of a backward in chunks.
template <class T>
static void weights(const Bridge& a, int64_t begin, int64_t end) {
  if (a.x.d != 1) return backward_lanes<T>(a, begin, end, Stage::weights);
  backward_rows<T>(a, begin, end, Stage::weights);
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
