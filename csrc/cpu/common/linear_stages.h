// The stages of ReLU linear attention for one head: sums over pixels, outputs, and their gradients.
//
// With p = 1 / (keys . relu(q) + eps) and g' = p dout the backward is, for each pixel, t = kv^T g', r = p (q . t), dq = t - r
// keys; the gradients of the sums are products of [g', -r] with relu(q), of which dk and dv are made. Where few of q are above
// 0, t and r keys nearly cancel: what rounding left in r is found from q . dq, which is r eps, and taken off too.
#pragma once

#include "common/linear.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Scratch of a thread, for heads of D dims on maps of so many pixels.
template <class T>
struct Scratch {
  int64_t D, N, ldn, ldk;  // N: pixels of a block; the leading dimensions of rows of pixels and of dims
  T eps;
  int64_t* tables[4];  // for Head
  T *sums, *dsums, *turned, *factor;
  T* rows[3];    // [D + 1][ldn]
  T* tokens[3];  // [N][ldk]
  Scratch(int64_t D, int64_t pixels, double eps)
      : D(D), N(pixels_of_block<T>(D, pixels)), ldn(leading<T>(N)), ldk(round_up(D, W<T>)), eps(T(eps)) {}
  // The size of the parts when so many pixels are cut into the fewest blocks.
  int64_t step(int64_t pixels) const {
    const int64_t blocks = (pixels + N - 1) / N;
    return blocks ? round_up((pixels + blocks - 1) / blocks, W<T>) : N;
  }
  int64_t wide() const { return ldn < 2 * W<T> ? 2 * W<T> : ldn; }  // as outputs() takes rows
  int64_t sums_size() const { return (D + 1) * ldk; }
  int64_t rows_size() const { return (D + 1) * wide(); }
  int64_t tokens_size() const { return round_up(N, W<T>) * ldk; }
  size_t bytes() const {
    return 4 * Arena::bytes<int64_t>(N) + 2 * Arena::bytes<T>(sums_size()) + Arena::bytes<T>(ldk * ldk) +
           Arena::bytes<T>(wide()) + 3 * Arena::bytes<T>(rows_size()) + 3 * Arena::bytes<T>(tokens_size());
  }
  void take() {
    for (int64_t*& table : tables) table = arena.take<int64_t>(N);
    sums = arena.take<T>(sums_size()), dsums = arena.take<T>(sums_size());
    turned = arena.take<T>(ldk * ldk), factor = arena.take<T>(wide());
    for (T*& one : rows) one = arena.take<T>(rows_size());
    for (T*& one : tokens) one = arena.take<T>(tokens_size());
  }
};

template <class T>
static void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// to[i] += the sum of k[p * ldk + i] over p, in eight chains: where few of a query are above 0, what rounding left in these sums
// shows in its gradient.
template <class T>
static void add_keys(const T* k, int64_t count, int64_t ldk, T* to) {
  constexpr int n = 8;
  for (int64_t i = 0; i < ldk; i += W<T>) {
    vec<T> sum[n] = {};
    int64_t p = 0;
    for (; p + n <= count; p += n)
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) sum[j] += load<T>(k + (p + j) * ldk + i);
    for (; p < count; ++p) sum[0] += load<T>(k + p * ldk + i);
    const vec<T> even = (sum[0] + sum[2]) + (sum[4] + sum[6]), odd = (sum[1] + sum[3]) + (sum[5] + sum[7]);
    store<T>(to + i, load<T>(to + i) + (even + odd));
  }
}

// Adds [v, 1] relu(k)^T over pixels n0 .. n1 to the sums; `then` is read after them.
template <class T, class S>
static void add_sums(
    Head<T, const S> key, Head<T, const S> value, const Head<T, const S>& then, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = s.D, ldk = s.ldk;
  T* sums = s.sums;
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step;
    key.template tokens<true>(n, count, s.tokens[0], ldk);
    add_keys<T>(s.tokens[0], count, ldk, sums + D * ldk);
    Next next;
    if (n + step < n1)
      next.add(key, n + step, n1 - n - step < step ? n1 - n - step : step),
          next.add(value, n + step, n1 - n - step < step ? n1 - n - step : step);
    else
      next.add(then, n0, n1 - n0 < step ? n1 - n0 : step);
    if (value.last) {
      const T* v = value.tokens_in_place(n);
      int64_t ldv = value.map.x;
      if (!v) value.template tokens<false>(n, count, s.tokens[1], ldk), v = s.tokens[1], ldv = ldk;
      for (int part = 0; part < 4; ++part) {
        const int64_t p = count * part / 4, some = count * (part + 1) / 4 - p;
        product_columns<T, Start::from>(D, D, some, v + p * ldv, ldv, s.tokens[0] + p * ldk, ldk, sums, ldk);
        next.between_tiles(4);
      }
    } else {
      value.template panel<false>(n, count, s.rows[0], s.ldn);
      product<T, Start::from>(D, D, count, s.rows[0], s.ldn, s.tokens[0], ldk, sums, ldk, next);
    }
  }
}

// The same of pixels that lie ready: k [count][ldk], rectified, and v as rows.
template <class T>
static void add_ready_sums(const T* k, const T* v, int64_t ldv, int64_t count, Scratch<T>& s) {
  for (int64_t n = 0, step = s.step(count); n < count; n += step) {
    const int64_t some = count - n < step ? count - n : step;
    add_keys<T>(k + n * s.ldk, some, s.ldk, s.sums + s.D * s.ldk);
    product<T, Start::from>(s.D, s.D, some, v + n, ldv, k + n * s.ldk, s.ldk, s.sums, s.ldk);
  }
}

// out of `count` pixels from n on, at most two vectors of them, whose rectified queries are rows.
template <class T, class S, class Between = const Nothing>
static void output_rows(
    const T* q, int64_t ldq, int64_t n, int64_t count, Head<T, S>& out, Scratch<T>& s, Between& between = kNothing) {
  if (count > W<T>)
    reciprocals<T, 2>(s.D, s.sums + s.D * s.ldk, q, ldq, s.eps, s.factor);
  else
    reciprocals<T, 1>(s.D, s.sums + s.D * s.ldk, q, ldq, s.eps, s.factor);
  T* to = out.in_place_panel(n, count);
  const int64_t ldo = to ? out.map.d : 2 * W<T>;
  if (!to) to = s.rows[1];
  ended_product<T, false>(s.D, count, s.D, s.sums, s.ldk, 1, q, ldq, Scaled<T>{s.factor}, to, ldo, between);
  if (to == s.rows[1]) out.put_panel(n, count, to, ldo);
}

// The same of pixels whose rectified queries are q[count][ldk], which are changed.
template <class T, class S, class Between = const Nothing>
static void output_tokens(T* q, int64_t n, int64_t count, Head<T, S>& out, Scratch<T>& s, Between& between = kNothing) {
  const int64_t D = s.D, ldk = s.ldk;
  for (int64_t p = 0; p < count; p += W<T>) {
    const int some = at_most<T>(count - p);
    T over[W<T>];
    store<T>(over, splat(T(1)) / (dots<T>(some, D, q + p * ldk, ldk, s.sums + D * ldk, 0) + splat(s.eps)));
    for (int m = 0; m < some; ++m)
      for (int64_t i = 0; i < D; i += W<T>) {
        T* at = q + (p + m) * ldk + i;
        store<T>(at, splat(over[m]) * load<T>(at));
      }
  }
  T* to = out.in_place_tokens(n);
  const int64_t ldo = to ? out.map.x : ldk;
  if (!to) to = s.tokens[1];
  product<T, Start::zero>(count, D, D, q, ldk, s.turned, ldk, to, ldo, between);
  if (to == s.tokens[1]) out.put_tokens(n, count, to, ldk);
}

// out over pixels n0 .. n1; `keys` and `values`, if any, are read after them.
template <class T, class S>
static void outputs(
    Head<T, const S> query, Head<T, S> out, int64_t n0, int64_t n1, Scratch<T>& s,
    const Head<T, const S>* keys = nullptr, const Head<T, const S>* values = nullptr) {
  const int64_t step = out.last ? s.step(n1 - n0) : 2 * W<T>, first = s.step(n1 - n0);
  if (out.last) turn<T>(s.D, s.D, s.sums, s.ldk, s.turned, s.ldk);
  for (int64_t n = n0; n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step, left = n1 - n - step;
    // The first block of what follows, a share with each of the steps here.
    const int64_t i = n0 + first * (n - n0) / (n1 - n0), j = n0 + first * (n + count - n0) / (n1 - n0);
    Next next, after;
    if (left > 0) next.add(query, n + step, left < step ? left : step);
    if (keys) after.add(*keys, i, j - i), after.add(*values, i, j - i);
    after.between_tiles(1);
    if (out.last) {
      query.template tokens<true>(n, count, s.tokens[0], s.ldk);
      output_tokens<T, S>(s.tokens[0], n, count, out, s, next);
    } else {
      query.template panel<true>(n, count, s.rows[0], step);
      output_rows<T, S>(s.rows[0], step, n, count, out, s, next);
    }
  }
}

// dq over pixels n0 .. n1, and what they add to the gradient of the sums.
template <class T, class Q, class G, class S>
static void query_gradients(
    Head<T, const Q> query, Head<T, const G> grad, Head<T, S> dquery, int64_t n0, int64_t n1, Scratch<T>& s,
    const Next& then = {}) {
  const int64_t D = s.D, ldk = s.ldk, ldn = s.ldn;
  const T* keys = s.sums + D * ldk;
  T* dsums = s.dsums;
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step, left = n1 - n - step < step ? n1 - n - step : step;
    Next next = left > 0 ? Next{} : then;
    next.add(query, n + step, left), next.add(grad, n + step, left), next.add(dquery, n + step, left);
    if (dquery.last) {
      T *q = s.tokens[0], *g = s.tokens[1], *t = s.tokens[2];
      query.template tokens<true>(n, count, q, ldk);
      grad.template tokens<false>(n, count, g, ldk);
      for (int64_t p = 0; p < count; p += W<T>) {
        const int some = at_most<T>(count - p);
        T* over = s.factor + p;
        store<T>(over, splat(T(1)) / (dots<T>(some, D, q + p * ldk, ldk, keys, 0) + splat(s.eps)));
        for (int m = 0; m < some; ++m)
          for (int64_t i = 0; i < D; i += W<T>) {
            T* at = g + (p + m) * ldk + i;
            store<T>(at, splat(over[m]) * load<T>(at));
          }
      }
      product<T, Start::zero>(count, D, D, g, ldk, s.sums, ldk, t, ldk);
      for (int64_t p = 0; p < count; p += W<T>) {
        const int some = at_most<T>(count - p);
        T r[W<T>], rest[W<T>];
        const vec<T> over = load<T>(s.factor + p);
        store<T>(r, dots<T>(some, D, q + p * ldk, ldk, t + p * ldk, ldk) * over);
        for (int m = 0; m < some; ++m)
          for (int64_t i = 0; i < D; i += W<T>) {
            T* at = t + (p + m) * ldk + i;
            store<T>(at, load<T>(at) - splat(r[m]) * load<T>(keys + i));
          }
        store<T>(
            rest, finite_or_zero<T>(
                      (dots<T>(some, D, q + p * ldk, ldk, t + p * ldk, ldk) - load<T>(r) * splat(s.eps)) * over));
        for (int64_t i = 0; i < D; i += W<T>) {
          vec<T> sum = {};
          for (int m = 0; m < some; ++m) {
            const vec<T> qm = load<T>(q + (p + m) * ldk + i);
            T* at = t + (p + m) * ldk + i;
            store<T>(at, where_positive<T>(qm, load<T>(at) - splat(rest[m]) * load<T>(keys + i)));
            sum += splat(r[m] + rest[m]) * qm;
          }
          store<T>(dsums + D * ldk + i, load<T>(dsums + D * ldk + i) - sum);
        }
      }
      dquery.put_tokens(n, count, t, ldk);
      next.between_tiles(1);
      product_columns<T, Start::from>(D, D, count, g, ldk, q, ldk, dsums, ldk);
    } else {
      T *q = s.rows[0], *g = s.rows[1], *t = s.rows[2];
      query.template panel<true>(n, count, q, ldn);
      grad.template panel<false>(n, count, g, ldn);
      for (int64_t p = 0; p < count; p += W<T>) {
        reciprocals<T, 1>(D, keys, q + p, ldn, s.eps, s.factor + p);
        const vec<T> over = load<T>(s.factor + p);
        for (int64_t j = 0; j < D; ++j) store<T>(g + j * ldn + p, over * load<T>(g + j * ldn + p));
      }
      product_columns<T, Start::zero>(D, count, D, s.sums, ldk, g, ldn, t, ldn);
      for (int64_t p = 0; p < count; p += W<T>) {
        const vec<T> over = load<T>(s.factor + p);
        auto dot = [&](const auto& term) __attribute__((always_inline)) {
          vec<T> even = {}, odd = {};
          int64_t i = 0;
          for (; i + 2 <= D; i += 2)
            even += load<T>(q + i * ldn + p) * term(i), odd += load<T>(q + (i + 1) * ldn + p) * term(i + 1);
          if (i < D) even += load<T>(q + i * ldn + p) * term(i);
          return even + odd;
        };
        const vec<T> r = dot([&](int64_t i) { return load<T>(t + i * ldn + p); }) * over;
        auto less = [&](int64_t i) { return load<T>(t + i * ldn + p) - splat(keys[i]) * r; };
        const vec<T> rest = finite_or_zero<T>((dot(less) - r * splat(s.eps)) * over);
        store<T>(g + D * ldn + p, -(r + rest));
        for (int64_t i = 0; i < D; ++i)
          store<T>(t + i * ldn + p, where_positive<T>(load<T>(q + i * ldn + p), less(i) - splat(keys[i]) * rest));
      }
      dquery.put_panel(n, count, t, ldn);
      turn<T>(D, count, q, ldn, s.tokens[0], ldk);
      product<T, Start::from>(D + 1, D, count, g, ldn, s.tokens[0], ldk, dsums, ldk, next);
    }
  }
}

// dk and dv over pixels n0 .. n1.
template <class T, class K, class S>
static void key_gradients(
    Head<T, const K> key, Head<T, const K> value, Head<T, S> dkey, Head<T, S> dvalue, int64_t n0, int64_t n1,
    Scratch<T>& s, const Next& then = {}) {
  const int64_t D = s.D, ldk = s.ldk, ldn = s.ldn;
  const bool last = dkey.last;
  if (last)
    turn<T>(D, D, s.dsums, ldk, s.turned, ldk);
  else
    fill(s.rows[1] + D * ldn, s.N, T(1));
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step, left = n1 - n - step < step ? n1 - n - step : step;
    Next next = left > 0 ? Next{} : then;
    next.add(key, n + step, left), next.add(value, n + step, left);
    next.add(dkey, n + step, left), next.add(dvalue, n + step, left);
    if (last) {
      T *k = s.tokens[0], *v = s.tokens[1], *t = s.tokens[2];
      key.template tokens<true>(n, count, k, ldk);
      value.template tokens<false>(n, count, v, ldk);
      product<T, Start::zero>(count, D, D, v, ldk, s.dsums, ldk, t, ldk);
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < D; i += W<T>) {
          T* at = t + p * ldk + i;
          store<T>(at, where_positive<T>(load<T>(k + p * ldk + i), load<T>(at) + load<T>(s.dsums + D * ldk + i)));
        }
      dkey.put_tokens(n, count, t, ldk);
      product<T, Start::zero>(count, D, D, k, ldk, s.turned, ldk, t, ldk, next);
      dvalue.put_tokens(n, count, t, ldk);
    } else {
      T *k = s.rows[0], *v = s.rows[1], *t = s.rows[2];
      key.template panel<true>(n, count, k, ldn);
      value.template panel<false>(n, count, v, ldn);
      product_columns<T, Start::zero>(D, count, D + 1, s.dsums, ldk, v, ldn, t, ldn);
      for (int64_t i = 0; i < D; ++i)
        for (int64_t p = 0; p < count; p += W<T>) {
          T* at = t + i * ldn + p;
          store<T>(at, where_positive<T>(load<T>(k + i * ldn + p), load<T>(at)));
        }
      dkey.put_panel(n, count, t, ldn);
      product<T, Start::zero>(D, count, D, s.dsums, ldk, k, ldn, t, ldn, next);
      dvalue.put_panel(n, count, t, ldn);
    }
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
