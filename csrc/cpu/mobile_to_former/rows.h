// The rows of scores, one of a token, over chunks of pixels: exponentials under a running maximum, and softmax's backward.
#pragma once

#include "common/pixel_rows.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// The highest and the sum of the lanes, in each of them.
template <class T>
MVK_INLINE vec<T> top_of_lanes(vec<T> v) {
  return fold<T>(v, Most<T>());
}
template <class T>
MVK_INLINE vec<T> sum_of_lanes(vec<T> v) {
  return fold<T>(v, Sum<T>());
}

// s = 2^(factor (s - top)) for a row of whole vectors, where top becomes the maximum so far of what is summed together, and
// sum the lane's sum; alpha is what was summed before is to be multiplied with. Each lane has a maximum of its own, or if `alike`
// all the same.
template <class T>
MVK_APART void exponentials(T* s, int64_t count, T factor, T* top, T* sum, T* alpha, bool alike) {
  const vec<T> f = splat(factor), before = load<T>(top);
  vec<T> most = before;
  for (int64_t n = 0; n < count; n += W<T>) most = maximum<T>(most, load<T>(s + n));
  if (alike) most = top_of_lanes<T>(most);
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

// What a chunk of pixels leaves of a token for softmax's backward: its highest score, the sum of e = 2^(factor (S - top)), the
// dP of that score, and sum e (dP - base). dS does not depend on the base; with this one nothing is lost where P is nearly 1.
template <class T>
struct Row {
  T top, sum, base, sum_dp;
};

// e and dP of a chunk's pixels, a row for each token: dS needs sums over all pixels before
// it can be made. Of one chunk it is scratch, of several it lies in memory until all are there.
template <class T>
struct Weights {
  int64_t ld;
  T *e, *dp;
  Row<T>* rows;
  Weights(const Bridge& a, T* scratch, int64_t unit) : ld(leading<T>(chunk_most<T>(a))) {
    if (a.partial) scratch = static_cast<T*>(a.partial) + a.units() * a.M * a.D + unit * a.weights();
    e = scratch, dp = e + a.M * ld, rows = reinterpret_cast<Row<T>*>(dp + a.M * ld);
  }
  static size_t size(const Bridge& a) { return a.partial ? 0 : 2 * a.M * leading<T>(chunk_most<T>(a)) + 4 * a.M; }
};

// What dS = factor e (dP - base - shift) takes. All of it is made of these very e and dP: what is left where P is 1 is then 0,
// and not a rounding error times the size of the queries.
template <class T>
struct Shift {
  T factor, base, shift;
};
template <class T>
MVK_INLINE Shift<T> shift_of(const Bridge& a, const Weights<T>& w, int64_t unit, int64_t m) {
  const T factor(Factor(a.scale, false).scores);
  const int64_t step = a.weights() / 4;  // rows from a chunk to the next
  const Row<T> own = w.rows[m], *rows = w.rows + m - unit % a.chunks * step;
  T top = own.top, sum = 0, shift = 0;
  for (int64_t c = 0; c < a.chunks; ++c) top = rows[c * step].top > top ? rows[c * step].top : top;
  auto weight = [&](const Row<T>& row) {
    return row.top == top ? T(1) : T(__builtin_exp2(double((row.top - top) * factor)));
  };
  for (int64_t c = 0; c < a.chunks; ++c) {
    const Row<T>& row = rows[c * step];
    const T share = weight(row);
    sum += share * row.sum, shift += share * (row.sum_dp + (row.base - own.base) * row.sum);
  }
  return {weight(own) / sum, own.base, shift / sum};
}

// s becomes e, in a row of whole vectors. A sum is of chains of at most 32.
template <class T>
MVK_APART Row<T> exponentials_of_row(T* s, const T* dp, int64_t count, T factor) {
  const vec<T> f = splat(factor), none = splat(-kInfinity<T>);
  vec<T> most = none, dp_of_most = {}, sum = {}, sum_dp = {};
  for (int64_t n = 0; n < count; n += W<T>) {
    const vec<T> v = load<T>(s + n);
    dp_of_most = v > most ? load<T>(dp + n) : dp_of_most;
    most = maximum<T>(most, v);
  }
  const vec<T> top = top_of_lanes<T>(most), shift = top == none ? vec<T>{} : top;
  const vec<T> base = finite_or_zero<T>(top_of_lanes<T>(most == top ? dp_of_most : none));
  int64_t n = 0;
  auto some = [&](auto vectors, int64_t end) __attribute__((always_inline)) {
    constexpr int U = decltype(vectors)::value;
    vec<T> of_e[U] = {}, of_dp[U] = {};
    for (; n + (U - 1) * W<T> < end; n += U * W<T>) {
      vec<T> e[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) e[u] = (load<T>(s + n + u * W<T>) - shift) * f;
      exp2_nonpositive<U>(e);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        store<T>(s + n + u * W<T>, e[u]);
        of_e[u] += e[u], of_dp[u] += e[u] * (load<T>(dp + n + u * W<T>) - base);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum += of_e[u], sum_dp += of_dp[u];
  };
  while (n + 3 * W<T> < count) some(std::integral_constant<int, 4>{}, smaller(count, n + 128 * W<T>));
  some(std::integral_constant<int, 1>{}, count);
  return {top[0], sum_of_lanes<T>(sum)[0], base[0], sum_of_lanes<T>(sum_dp)[0]};
}

// dP becomes dS = e (dP - base - shift) over `count` pixels, rounded up to whole vectors.
template <class T>
MVK_APART void derivatives(int64_t M, int64_t count, const T* e, T* dp, int64_t ld, const Shift<T>* shift) {
  for (int64_t m = 0; m < M; ++m, e += ld, dp += ld) {
    const vec<T> base = splat(shift[m].base), less = splat(shift[m].shift);
    for (int64_t n = 0; n < count; n += W<T>) store<T>(dp + n, load<T>(e + n) * (load<T>(dp + n) - base - less));
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
