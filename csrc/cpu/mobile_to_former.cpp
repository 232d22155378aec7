// Mobile to Former on CPUs: few tokens attend to all pixels of a map, key and value at once.
//
// For each block of pixels of a (batch, head): scores, exponentials, sums of p x, with the block in cache: the map is read
// from memory once. Each lane keeps a running maximum, sum and weighted sums of its own, so nothing goes across lanes
// until the end. The backward makes P again from the log-sum-exp, writes dx in the same pass, and sums dquery as the
// forward sums the output. Chunks of pixels are added up in order: no atomics.
#include "pixels.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// s = 2^(factor (s - top)) for a row of whole vectors, where top becomes the maximum of each lane so far (of all, if not
// by_lane) and sum the lane's sum; alpha is what was summed before is to be multiplied with.
template <class T>
MVK_INLINE void exponentials(bool by_lane, T* s, int64_t count, T factor, T* top, T* sum, T* alpha) {
  const vec<T> f = splat(factor), before = load<T>(top);
  vec<T> most = before;
  for (int64_t n = 0; n < count; n += W<T>) most = maximum<T>(most, load<T>(s + n));
  if (!by_lane) most = splat(lane_max<T>(most));
  store<T>(top, most);
  // A lane with nothing but -inf so far is shifted by 0: its terms are 0 then, not NaN.
  const vec<T> none = splat(-kInfinity<T>);
  const vec<T> shift = most == none ? vec<T>{} : most;
  vec<T> a[1] = {(before - shift) * f};
  exp2_nonpositive<1>(a);
  store<T>(alpha, a[0]);
  vec<T> total = {};
  int64_t n = 0;
  auto some = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int U = decltype(vectors)::value;
    vec<T> p[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) p[u] = (load<T>(s + n + u * W<T>) - shift) * f;
    exp2_nonpositive<U>(p);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      store<T>(s + n + u * W<T>, p[u]);
      total += p[u];
    }
    n += U * W<T>;
  };
  while (n + 4 * W<T> <= count) some(std::integral_constant<int, 4>{});
  while (n < count) some(std::integral_constant<int, 1>{});
  store<T>(sum, total + a[0] * load<T>(sum));
}

template <class T, class S>
static void forward(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      Arena::bytes<int64_t>(K) + Arena::bytes<T>(M * ldq) + Arena::bytes<T>(D * K) + Arena::bytes<T>(M * K) +
          Arena::bytes<T>(M * D * W<T>) + 3 * Arena::bytes<T>(M * W<T>) + Arena::bytes<T>(ldq) +
          Arena::bytes<T>(K * ldq) + Arena::bytes<T>(M * ldq),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  T* q = arena.take<T>(M * ldq);
  T* packed = arena.take<T>(D * K);
  T* s = arena.take<T>(M * K);
  T* acc = arena.take<T>(M * D * W<T>);
  T* top = arena.take<T>(M * W<T>);
  T* sum = arena.take<T>(M * W<T>);
  T* alpha = arena.take<T>(M * W<T>);
  T* row = arena.take<T>(ldq);
  T* tokens = arena.take<T>(K * ldq);
  T* out = arena.take<T>(M * ldq);
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T, const S> x(a, a.x, b, h, table);
    const bool by_dim = dims_as_lanes<T>(a, x.last);
    pack_tokens<T, S>(a, a.query, b, h, T(factor.queries), q, ldq);
    for (int64_t i = 0; i < M * W<T>; ++i) top[i] = -kInfinity<T>, sum[i] = 0;
    int64_t from, to;
    chunk_of<T>(a, unit % a.chunks, from, to);
    Span<T> span(from, to, K);
    bool first = true;
    for (int64_t n = span.next, count; (count = span.take()); n = span.next, first = false) {
      int64_t ld;
      const T* rows = x.rows(n, count, packed, K, ld);
      scores<T>(M, D, q, ldq, rows, ld, count, s, K);
      fill_tail<T>(M, s, K, count, -kInfinity<T>);
      for (int64_t m = 0; m < M; ++m)
        exponentials<T>(!by_dim, s + m * K, count, T(factor.scores), top + m * W<T>, sum + m * W<T>, alpha + m * W<T>);
      if (by_dim) {
        rows = x.tokens(n, count, tokens, ldq, ld);
        sums_by_dim<T>(M, D, count, s, K, rows, ld, out, ldq, alpha, first);
      } else {
        sums<T>(M, D, count, s, K, rows, ld, acc, alpha, first);
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      const T most = lane_max<T>(load<T>(top + m * W<T>));
      vec<T> part[1] = {
          (load<T>(top + m * W<T>) - splat(most == -kInfinity<T> ? T(0) : most)) * splat(T(factor.scores))};
      exp2_nonpositive<1>(part);
      const T total = lane_sum<T>(part[0] * load<T>(sum + m * W<T>));
      const vec<T> f = a.partial ? part[0] : part[0] * splat(T(1) / total);
      if (by_dim)
        for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, f * load<T>(out + m * ldq + d));
      else
        across_lanes<T>(acc + m * D * W<T>, D, f, row);
      if (a.partial) {
        T* to_partial = static_cast<T*>(a.partial) + unit * a.forward_partial() + m * (D + 2);
        memcpy(to_partial, row, D * sizeof(T));
        to_partial[D] = most, to_partial[D + 1] = total;
      } else {
        store_token<T, S>(a, a.out, b, h, m, row);
        a.lse[item * M + m] = kLn2 * factor.scores * most + __builtin_log(total);
      }
    }
  }
}

// Over (batch, head): the chunks' sums, each less than its own maximum, put together in order.
template <class T, class S>
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
      store_token<T, S>(a, a.out, item / a.heads, item % a.heads, m, row);
      a.lse[item * M + m] = kLn2 * factor.scores * most + __builtin_log(total);
    }
}

// P = 2^(factor (S - high - low)) over the rows s, and dS = P (dP - delta) over the rows ds. `whole` if these are all pixels: high
// is then their maximum, P is divided by its own sum, and delta is sum P dP, both less the first dP: as exact as softmax's
// backward on maps of a pixel or two.
template <class T>
MVK_INLINE void probabilities(T* s, T* ds, int64_t count, T factor, T high, T low, T delta, bool whole) {
  const vec<T> f = splat(factor);
  if (whole) {
    vec<T> most = splat(-kInfinity<T>), sum = {}, sum_dp = {};
    const vec<T> base = finite_or_zero<T>(splat(ds[0]));
    for (int64_t n = 0; n < count; n += W<T>) most = maximum<T>(most, load<T>(s + n));
    const vec<T> hi = splat(lane_max<T>(most));
    for (int64_t n = 0; n < count; n += W<T>) {
      vec<T> p[1] = {(load<T>(s + n) - hi) * f};
      exp2_nonpositive<1>(p);
      store<T>(s + n, p[0]);
      sum += p[0], sum_dp += p[0] * (load<T>(ds + n) - base);
    }
    const T over = T(1) / lane_sum<T>(sum);
    const vec<T> to_one = splat(over), dl = splat(lane_sum<T>(sum_dp) * over);
    for (int64_t n = 0; n < count; n += W<T>) {
      const vec<T> p = load<T>(s + n) * to_one;
      store<T>(s + n, p);
      store<T>(ds + n, p * (load<T>(ds + n) - base - dl));
    }
    return;
  }
  const vec<T> hi = splat(high), lo = splat(low), dl = splat(delta);
  int64_t n = 0;
  auto some = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int U = decltype(vectors)::value;
    vec<T> p[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) p[u] = (load<T>(s + n + u * W<T>) - hi - lo) * f;
    exp2_nonpositive<U>(p);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      store<T>(s + n + u * W<T>, p[u]);
      store<T>(ds + n + u * W<T>, p[u] * (load<T>(ds + n + u * W<T>) - dl));
    }
    n += U * W<T>;
  };
  while (n + 4 * W<T> <= count) some(std::integral_constant<int, 4>{});
  while (n < count) some(std::integral_constant<int, 1>{});
}

template <class T, class S>
static void backward(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + Arena::bytes<T>(5 * M * ldq) + 2 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(2 * M * K) + Arena::bytes<T>(M * D * W<T>) + Arena::bytes<T>(ldq) + 3 * Arena::bytes<T>(M) +
          2 * Arena::bytes<T>(K * ldq) + Arena::bytes<T>(M * ldq),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* q = arena.take<T>(2 * M * ldq);   // queries, then the output's gradient: for S and dP
  T* go = arena.take<T>(2 * M * ldq);  // the output's gradient, then scaled queries: for dx
  T* q_scaled = go + M * ldq;
  T* tokens = arena.take<T>(K * ldq);
  T* dtokens = arena.take<T>(K * ldq);
  T* dq = arena.take<T>(M * ldq);
  T* packed = arena.take<T>(D * K);
  T* dpacked = arena.take<T>(D * K);
  T* s = arena.take<T>(2 * M * K);
  T* ds = s + M * K;
  T* acc = arena.take<T>(M * D * W<T>);
  T* row = arena.take<T>(ldq);
  T* high = arena.take<T>(M);
  T* low = arena.take<T>(M);
  T* delta = arena.take<T>(M);
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T, const S> x(a, a.x, b, h, table);
    Pixels<T, S> dx(a, a.dx, b, h, dtable);
    pack_tokens<T, S>(a, a.query, b, h, T(factor.queries), q, ldq);
    pack_tokens<T, S>(a, a.grad, b, h, T(1), go, ldq);
    memcpy(q + M * ldq, go, M * ldq * sizeof(T));
    const bool by_dim = dims_as_lanes<T>(a, x.last);
    pack_tokens<T, S>(a, a.query, b, h, T(a.scale), q_scaled, ldq);
    for (int64_t m = 0; m < M; ++m) {
      const S* o = static_cast<const S*>(a.out.data) + b * a.out.b + h * a.out.h + m * a.out.m;
      T sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += go[m * ldq + d] * T(to_float(o[d * a.out.d]));
      const double in_scores = a.lse[item * M + m] / (factor.scores * kLn2);
      delta[m] = sum, high[m] = T(in_scores), low[m] = T(in_scores - high[m]);
    }
    int64_t from, to;
    chunk_of<T>(a, unit % a.chunks, from, to);
    Span<T> span(from, to, K);
    bool first = true;
    for (int64_t n = span.next, count; (count = span.take()); n = span.next, first = false) {
      int64_t ld, ldd;
      const T* rows = x.rows(n, count, packed, K, ld);
      scores<T>(2 * M, D, q, ldq, rows, ld, count, s, K);
      fill_tail<T>(M, s, K, count, -kInfinity<T>);
      fill_tail<T>(M, ds, K, count, T(0));
      for (int64_t m = 0; m < M; ++m)
        probabilities<T>(
            s + m * K, ds + m * K, count, T(factor.scores), high[m], low[m], delta[m], count == a.pixels());
      if (dx.last) {
        product_columns<T, Start::zero>(count, D, 2 * M, s, K, go, ldq, dtokens, ldq);
        dx.put_tokens(n, count, dtokens, ldq);
      } else {
        T* out = dx.target(n, count, dpacked, K, ldd);
        spread<T>(M, D, count, q_scaled, ldq, ds, K, nullptr, 0, out, ldd);
        spread<T>(M, D, count, go, ldq, s, K, out, ldd, out, ldd);
        dx.put(n, count, out, ldd, dpacked);
      }
      if (by_dim) {
        rows = x.tokens(n, count, tokens, ldq, ld);
        sums_by_dim<T>(M, D, count, ds, K, rows, ld, dq, ldq, nullptr, first);
      } else {
        sums<T>(M, D, count, ds, K, rows, ld, acc, nullptr, first);
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      if (by_dim)
        for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, splat(T(a.scale)) * load<T>(dq + m * ldq + d));
      else
        across_lanes<T>(acc + m * D * W<T>, D, splat(T(a.scale)), row);
      if (a.partial)
        memcpy(static_cast<T*>(a.partial) + (unit * M + m) * D, row, D * sizeof(T));
      else
        store_token<T, S>(a, a.dquery, b, h, m, row);
    }
  }
}

// Over (batch, head).
template <class T, class S>
static void sum_dquery(const Bridge& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item)
    sum_chunks<T, S>(a, a.dquery, static_cast<T*>(a.partial) + item * a.chunks * a.M * a.D, a.M * a.D, item);
}

}  // namespace

static MVK_BY_DTYPE(Bridge, forward) static MVK_BY_DTYPE(Bridge, merge) static MVK_BY_DTYPE(
    Bridge, backward) static MVK_BY_DTYPE(Bridge, sum_dquery)

    extern const MobileToFormerKernels mobile_to_former_kernels;
const MobileToFormerKernels mobile_to_former_kernels = {
    forward_by_dtype, merge_by_dtype, backward_by_dtype, sum_dquery_by_dtype};

}  // namespace MVK_ISA
}  // namespace mvk
