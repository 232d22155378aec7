// The stages of ReLU linear attention for one head: sums over pixels, outputs, and their gradients.
//
// With p = 1 / (keys . relu(q) + eps) and g' = p dout the backward is, for each pixel, t = kv^T g', r = p (q . t), dq = t - r
// keys; the gradients of the sums are products of [g', -r] with relu(q), of which dk and dv are made.
#pragma once

#include "linear.h"

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

// Adds [v, 1] relu(k)^T over pixels n0 .. n1 to the sums.
template <class T, class S>
static void add_sums(Head<T, const S> key, Head<T, const S> value, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = s.D, ldk = s.ldk;
  T* sums = s.sums;
  fill(s.rows[0] + D * s.ldn, s.N, T(1));
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step;
    key.template tokens<true>(n, count, s.tokens[0], ldk);
    if (value.last) {
      for (int64_t i = 0; i < ldk; i += W<T>) {
        vec<T> sum = {};
        for (int64_t p = 0; p < count; ++p) sum += load<T>(s.tokens[0] + p * ldk + i);
        store<T>(sums + D * ldk + i, load<T>(sums + D * ldk + i) + sum);
      }
      const T* v = value.tokens_in_place(n);
      int64_t ldv = value.map.x;
      if (!v) value.template tokens<false>(n, count, s.tokens[1], ldk), v = s.tokens[1], ldv = ldk;
      product_columns<T, Start::from>(D, D, count, v, ldv, s.tokens[0], ldk, sums, ldk);
    } else {
      value.template panel<false>(n, count, s.rows[0], s.ldn);
      product<T, Start::from>(D + 1, D, count, s.rows[0], s.ldn, s.tokens[0], ldk, sums, ldk);
    }
  }
}

// out over pixels n0 .. n1.
template <class T, class Q, class S>
static void outputs(Head<T, const Q> query, Head<T, S> out, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = s.D, ldk = s.ldk;
  const T* keys = s.sums + D * ldk;
  if (out.last) {
    turn<T>(D, D, s.sums, ldk, s.turned, ldk);
    for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
      const int64_t count = n1 - n < step ? n1 - n : step;
      T* q = s.tokens[0];
      query.template tokens<true>(n, count, q, ldk);
      for (int64_t p = 0; p < count; p += W<T>) {
        const int some = at_most<T>(count - p);
        T over[W<T>];
        store<T>(over, splat(T(1)) / (dots<T>(some, D, q + p * ldk, ldk, keys, 0) + splat(s.eps)));
        for (int m = 0; m < some; ++m)
          for (int64_t i = 0; i < D; i += W<T>) {
            T* at = q + (p + m) * ldk + i;
            store<T>(at, splat(over[m]) * load<T>(at));
          }
      }
      T* to = out.in_place_tokens(n);
      int64_t ldo = out.map.x;
      if (!to) to = s.tokens[1], ldo = ldk;
      product<T, Start::zero>(count, D, D, q, ldk, s.turned, ldk, to, ldo);
      if (to == s.tokens[1]) out.put_tokens(n, count, to, ldk);
    }
    return;
  }
  constexpr int64_t wide = 2 * W<T>;
  for (int64_t n = n0, count; n < n1; n += count) {
    count = n1 - n < wide ? n1 - n : wide;
    T* q = s.rows[0];
    query.template panel<true>(n, count, q, wide);
    auto vectors = [&](auto width) {
      constexpr int V = decltype(width)::value;
      reciprocals<T, V>(D, keys, q, wide, s.eps, s.factor);
      T* to = out.in_place_panel(n, count);
      const int64_t ldo = to ? out.map.d : wide;
      if (!to) to = s.rows[1];
      scaled_product<T, V>(D, D, s.sums, ldk, q, wide, s.factor, to, ldo);
      if (to == s.rows[1]) out.put_panel(n, count, to, wide);
    };
    if (count > W<T>)
      vectors(std::integral_constant<int, 2>{});
    else
      vectors(std::integral_constant<int, 1>{});
  }
}

// dq over pixels n0 .. n1, and what they add to the gradient of the sums.
template <class T, class Q, class G, class S>
static void query_gradients(
    Head<T, const Q> query, Head<T, const G> grad, Head<T, S> dquery, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = s.D, ldk = s.ldk, ldn = s.ldn;
  const T* keys = s.sums + D * ldk;
  T* dsums = s.dsums;
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step;
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
        T r[W<T>];
        store<T>(r, dots<T>(some, D, q + p * ldk, ldk, t + p * ldk, ldk) * load<T>(s.factor + p));
        for (int64_t i = 0; i < D; i += W<T>) {
          vec<T> sum = {};
          for (int m = 0; m < some; ++m) {
            const vec<T> qm = load<T>(q + (p + m) * ldk + i);
            T* at = t + (p + m) * ldk + i;
            store<T>(at, where_positive<T>(qm, load<T>(at) - splat(r[m]) * load<T>(keys + i)));
            sum += splat(r[m]) * qm;
          }
          store<T>(dsums + D * ldk + i, load<T>(dsums + D * ldk + i) - sum);
        }
      }
      dquery.put_tokens(n, count, t, ldk);
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
        vec<T> even = {}, odd = {};
        for (int64_t i = 0; i < D; ++i) {
          const vec<T> term = load<T>(q + i * ldn + p) * load<T>(t + i * ldn + p);
          i % 2 ? odd += term : even += term;
        }
        const vec<T> r = (even + odd) * load<T>(s.factor + p);
        store<T>(g + D * ldn + p, -r);
        for (int64_t i = 0; i < D; ++i) {
          T* at = t + i * ldn + p;
          store<T>(at, where_positive<T>(load<T>(q + i * ldn + p), load<T>(at) - splat(keys[i]) * r));
        }
      }
      dquery.put_panel(n, count, t, ldn);
      turn<T>(D, count, q, ldn, s.tokens[0], ldk);
      product<T, Start::from>(D + 1, D, count, g, ldn, s.tokens[0], ldk, dsums, ldk);
    }
  }
}

// dk and dv over pixels n0 .. n1.
template <class T, class K, class S>
static void key_gradients(
    Head<T, const K> key, Head<T, const K> value, Head<T, S> dkey, Head<T, S> dvalue, int64_t n0, int64_t n1,
    Scratch<T>& s) {
  const int64_t D = s.D, ldk = s.ldk, ldn = s.ldn;
  const bool last = dkey.last;
  if (last)
    turn<T>(D, D, s.dsums, ldk, s.turned, ldk);
  else
    fill(s.rows[1] + D * ldn, s.N, T(1));
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step;
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
      product<T, Start::zero>(count, D, D, k, ldk, s.turned, ldk, t, ldk);
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
      product<T, Start::zero>(D, count, D, s.dsums, ldk, k, ldn, t, ldn);
      dvalue.put_panel(n, count, t, ldn);
    }
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
