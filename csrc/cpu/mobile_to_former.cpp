// Mobile to Former on CPUs: few tokens attend to all pixels of a map, key and value at once.
//
// For each block of pixels of a (batch, head): scores, exponentials, sums of p x, with the block in cache: the map is read
// from memory once. With pixels as lanes each lane keeps a running maximum, sum and weighted sums of its own, so nothing
// goes across lanes until the end; maps whose dims are contiguous go by rows, lanes are tokens and then dims. The backward
// makes P again from the log-sum-exp, writes dx in the same pass, and sums dquery as the forward sums the output. Chunks of
// pixels are added up in order: no atomics.
#include "pixel_rows.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// What lanes have in common where pixels are lanes: the token, but nothing while they are summed, unless all at once.
template <class T>
struct OneToken {
  static vec<T> running(vec<T> v, bool once) { return once ? top(v) : v; }
  static vec<T> top(vec<T> v) { return fold<T, 1, W<T>>(v, Most<T>()); }
  static vec<T> sum(vec<T> v) { return fold<T, 1, W<T>>(v, Sum<T>()); }
  static vec<T> first(const T* p) { return splat(p[0]); }
};
// Where lane i is of token i % G.
template <class T, int G>
struct TokensInTurn {
  static vec<T> running(vec<T> v, bool) { return top(v); }
  static vec<T> top(vec<T> v) { return fold<T, G, W<T>>(v, Most<T>()); }
  static vec<T> sum(vec<T> v) { return fold<T, G, W<T>>(v, Sum<T>()); }
  static vec<T> first(const T* p) {
    vec<T> out;
    for (int i = 0; i < W<T>; ++i) out[i] = p[i % G];
    return out;
  }
};

// s = 2^(factor (s - top)) for a row of whole vectors, where top becomes the maximum so far of what is summed together, and
// sum the lane's sum; alpha is what was summed before is to be multiplied with.
template <class T, class Lanes>
MVK_INLINE void exponentials(T* s, int64_t count, T factor, T* top, T* sum, T* alpha, bool once = false) {
  const vec<T> f = splat(factor), before = load<T>(top);
  vec<T> most = before;
  for (int64_t n = 0; n < count; n += W<T>) most = maximum<T>(most, load<T>(s + n));
  most = Lanes::running(most, once);
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

// What is known of a token after all pixels of a unit, as a chunk's part or as the result.
template <class T, class S>
MVK_INLINE void put_output(const Bridge& a, int64_t unit, int64_t m, const T* row, T most, T total) {
  if (a.partial) {
    T* to = static_cast<T*>(a.partial) + unit * a.forward_partial() + m * (a.D + 2);
    memcpy(to, row, a.D * sizeof(T));
    to[a.D] = most, to[a.D + 1] = total;
  } else {
    store_token<T, S>(a, a.out, unit / a.heads, unit % a.heads, m, row);
    if (a.lse) a.lse[unit * a.M + m] = kLn2 * Factor(a.scale, false).scores * most + __builtin_log(total);
  }
}

template <class T, class S>
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
    Pixels<T, const S> x(a, a.x, b, h, table);
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
      put_output<T, S>(a, unit, m, row, most, total);
    }
  }
}

template <class T, class S, int G>
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
    Rows<T, const S> x(a, a.x, b, h, table);
    pack_columns<T, S, G>(a, a.query, b, h, T(factor.queries), q);
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
      put_output<T, S>(a, unit, m, row, top[at], sum[at]);
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
      if (a.lse) a.lse[item * M + m] = kLn2 * factor.scores * most + __builtin_log(total);
    }
}

// P = 2^(factor (S - high - low)) over the rows s, and dS = P (dP - delta) over the rows ds. `whole` if these are all pixels: high
// is then their maximum, P is divided by its own sum, and delta is sum P dP, both less the first dP: as exact as softmax's
// backward on maps of a pixel or two.
template <class T, class Lanes>
MVK_INLINE void probabilities(T* s, T* ds, int64_t count, T factor, vec<T> high, vec<T> low, vec<T> delta, bool whole) {
  const vec<T> f = splat(factor);
  if (whole) {
    vec<T> most = splat(-kInfinity<T>), sum = {}, sum_dp = {};
    const vec<T> base = finite_or_zero<T>(Lanes::first(ds));
    for (int64_t n = 0; n < count; n += W<T>) most = maximum<T>(most, load<T>(s + n));
    const vec<T> hi = Lanes::top(most);
    for (int64_t n = 0; n < count; n += W<T>) {
      vec<T> p[1] = {(load<T>(s + n) - hi) * f};
      exp2_nonpositive<1>(p);
      store<T>(s + n, p[0]);
      sum += p[0], sum_dp += p[0] * (load<T>(ds + n) - base);
    }
    const vec<T> over = splat(T(1)) / Lanes::sum(sum), dl = Lanes::sum(sum_dp) * over;
    for (int64_t n = 0; n < count; n += W<T>) {
      const vec<T> p = load<T>(s + n) * over;
      store<T>(s + n, p);
      store<T>(ds + n, p * (load<T>(ds + n) - base - dl));
    }
    return;
  }
  int64_t n = 0;
  auto some = [&](auto vectors) __attribute__((always_inline)) {
    constexpr int U = decltype(vectors)::value;
    vec<T> p[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) p[u] = (load<T>(s + n + u * W<T>) - high - low) * f;
    exp2_nonpositive<U>(p);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      store<T>(s + n + u * W<T>, p[u]);
      store<T>(ds + n + u * W<T>, p[u] * (load<T>(ds + n + u * W<T>) - delta));
    }
    n += U * W<T>;
  };
  while (n + 4 * W<T> <= count) some(std::integral_constant<int, 4>{});
  while (n < count) some(std::integral_constant<int, 1>{});
}

// What the forward left of a token: the maximum of its scores, so to speak, in two parts, and sum P dP.
template <class T>
struct Known {
  T high, low, delta;
};
template <class T, class S>
MVK_INLINE Known<T> known(const Bridge& a, int64_t item, int64_t m, double factor) {
  const int64_t b = item / a.heads, h = item % a.heads;
  const S* o = static_cast<const S*>(a.out.data) + b * a.out.b + h * a.out.h + m * a.out.m;
  const S* g = static_cast<const S*>(a.grad.data) + b * a.grad.b + h * a.grad.h + m * a.grad.m;
  double sum = 0;  // its error would be every pixel's
  for (int64_t d = 0; d < a.D; ++d) sum += double(to_float(g[d * a.grad.d])) * double(to_float(o[d * a.out.d]));
  const double in_scores = a.lse[item * a.M + m] / (factor * kLn2);
  const T high = T(in_scores);
  return {high, T(in_scores - high), T(sum)};
}

template <class T, class S>
MVK_INLINE void put_dquery(const Bridge& a, int64_t unit, int64_t m, const T* row) {
  if (a.partial)
    memcpy(static_cast<T*>(a.partial) + (unit * a.M + m) * a.D, row, a.D * sizeof(T));
  else
    store_token<T, S>(a, a.dquery, unit / a.heads, unit % a.heads, m, row);
}

template <class T, class S>
static void backward_lanes(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldq = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(2 * M * ldq) + 2 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(2 * M * K) + Arena::bytes<T>(Sums<T>::lanes_size(a)) +
          Arena::bytes<T>(Sums<T>::rows_size(a)) + Arena::bytes<Known<T>>(M),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* q = arena.take<T>(2 * M * ldq);   // queries, then the output's gradient: for S and dP
  T* go = arena.take<T>(2 * M * ldq);  // the output's gradient, then scaled queries: for dx
  T* q_scaled = go + M * ldq;
  T* packed = arena.take<T>(D * K);
  T* dpacked = arena.take<T>(D * K);
  T* s = arena.take<T>(2 * M * K);
  T* ds = s + M * K;
  T* acc = arena.take<T>(Sums<T>::lanes_size(a));
  Sums<T> dq(a, acc, arena.take<T>(Sums<T>::rows_size(a)));
  Known<T>* tokens = arena.take<Known<T>>(M);
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T, const S> x(a, a.x, b, h, table);
    Pixels<T, S> dx(a, a.dx, b, h, dtable);
    pack_tokens<T, S>(a, a.query, b, h, T(factor.queries), q, ldq);
    pack_tokens<T, S>(a, a.grad, b, h, T(1), go, ldq);
    memcpy(q + M * ldq, go, M * ldq * sizeof(T));
    pack_tokens<T, S>(a, a.query, b, h, T(a.scale), q_scaled, ldq);
    for (int64_t m = 0; m < M; ++m) tokens[m] = known<T, S>(a, item, m, factor.scores);
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
        probabilities<T, OneToken<T>>(
            s + m * K, ds + m * K, count, T(factor.scores), splat(tokens[m].high), splat(tokens[m].low),
            splat(tokens[m].delta), count == a.pixels());
      T* out = dx.target(n, count, dpacked, K, ldd);
      spread<T>(M, D, count, q_scaled, ldq, ds, K, nullptr, 0, out, ldd);
      spread<T>(M, D, count, go, ldq, s, K, out, ldd, out, ldd);
      dx.put(n, count, out, ldd, dpacked);
      dq.once = count == to - from;
      dq.add(count, ds, K, rows, ld, nullptr, first);
    }
    for (int64_t m = 0; m < M; ++m) put_dquery<T, S>(a, unit, m, dq.token(m, splat(T(a.scale))));
  }
}

template <class T, class S, int G>
static void backward_rows(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldq = round_up(D, W<T>), groups = (M + G - 1) / G;
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(groups * D * G) + 3 * Arena::bytes<T>(M * ldq) +
          2 * Arena::bytes<T>((K + W<T>)*ldq) + 2 * Arena::bytes<T>(K * G) + 3 * Arena::bytes<T>(groups * W<T>),
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
  T* s = arena.take<T>(K * G);
  T* ds = arena.take<T>(K * G);
  T* high = arena.take<T>(groups * W<T>);
  T* low = arena.take<T>(groups * W<T>);
  T* delta = arena.take<T>(groups * W<T>);
  const Factor factor(a.scale, false);

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T, const S> x(a, a.x, b, h, table);
    Rows<T, S> dx(a, a.dx, b, h, dtable);
    pack_columns<T, S, G>(a, a.query, b, h, T(factor.queries), q);
    pack_columns<T, S, G>(a, a.grad, b, h, T(1), go);
    pack_tokens<T, S>(a, a.query, b, h, T(a.scale), q_scaled, ldq);
    pack_tokens<T, S>(a, a.grad, b, h, T(1), go_rows, ldq);
    for (int64_t m = 0; m < groups * G; ++m) {
      const Known<T> token = m < M ? known<T, S>(a, item, m, factor.scores) : Known<T>{};
      for (int64_t i = m / G * W<T> + m % G; i < (m / G + 1) * W<T>; i += G)
        high[i] = token.high, low[i] = token.low, delta[i] = token.delta;
    }
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    while (blocks.next()) {
      int64_t ld, ldd;
      const int64_t n = blocks.n, count = blocks.count;
      const T* rows = x.read(n, count, packed, ldq, ld);
      T* out = dx.target(n, dpacked, ldq, ldd);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t some = smaller(M - g * G, G), from = g * G * ldq;
        dots<T, G>(D, count, rows, ld, q + g * D * G, s, -kInfinity<T>);
        dots<T, G>(D, count, rows, ld, go + g * D * G, ds, T(0));
        probabilities<T, TokensInTurn<T, G>>(
            s, ds, count * G, T(factor.scores), load<T>(high + g * W<T>), load<T>(low + g * W<T>),
            load<T>(delta + g * W<T>), count == a.pixels());
        const Spread<T> sets[2] = {{ds, q_scaled + from}, {s, go_rows + from}};
        spread_rows<T, G>(some, D, count, sets, 2, ldq, g ? out : nullptr, ldd, out, ldd);
        weigh<T, G>(some, D, count, ds, rows, ld, dq + from, ldq, nullptr, blocks.first());
      }
      dx.put(n, count, dpacked, ldq);
    }
    for (int64_t m = 0; m < M; ++m) {
      T* row = dq + m * ldq;
      for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, splat(T(a.scale)) * load<T>(row + d));
      put_dquery<T, S>(a, unit, m, row);
    }
  }
}

// Maps whose dims are contiguous go by rows.
template <class T, class S>
static void forward(const Bridge& a, int64_t begin, int64_t end) {
  if (a.x.d != 1) return forward_lanes<T, S>(a, begin, end);
  with_group<T>(a.M, [&](auto G) { forward_rows<T, S, G.value>(a, begin, end); });
}
template <class T, class S>
static void backward(const Bridge& a, int64_t begin, int64_t end) {
  if (a.x.d != 1) return backward_lanes<T, S>(a, begin, end);
  with_group<T>(a.M, [&](auto G) { backward_rows<T, S, G.value>(a, begin, end); });
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
