// The stages of ReLU linear attention for one head, pixels or dims as lanes as its maps have them side by side.
#include "common/linear_stages.h"

namespace mvk {
namespace MVK_ISA {
namespace {

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

}  // namespace

template <class T>
void add_sums(Head<T> key, Head<T> value, const Head<T>& then, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = s.D, ldk = s.ldk;
  T* sums = s.sums;
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step;
    key.tokens(true, n, count, s.tokens[0], ldk);
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
      if (!v) value.tokens(false, n, count, s.tokens[1], ldk), v = s.tokens[1], ldv = ldk;
      for (int part = 0; part < 4; ++part) {
        const int64_t p = count * part / 4, some = count * (part + 1) / 4 - p;
        product_columns<T>(D, D, some, v + p * ldv, ldv, s.tokens[0] + p * ldk, ldk, sums, ldk, {Start::from});
        next.between_tiles(4);
      }
    } else {
      const T* v = value.panel_in_place(n);
      int64_t ldv = value.map.d;
      if (!v) value.panel(false, n, count, s.rows[0], s.ldn), v = s.rows[0], ldv = s.ldn;
      product<T>(D, D, count, v, ldv, s.tokens[0], ldk, sums, ldk, {Start::from}, next);
    }
  }
}

template <class T>
void add_ready_sums(const T* k, const T* v, int64_t ldv, int64_t count, Scratch<T>& s) {
  for (int64_t n = 0, step = s.step(count); n < count; n += step) {
    const int64_t some = count - n < step ? count - n : step;
    add_keys<T>(k + n * s.ldk, some, s.ldk, s.sums + s.D * s.ldk);
    product<T>(s.D, s.D, some, v + n, ldv, k + n * s.ldk, s.ldk, s.sums, s.ldk, {Start::from});
  }
}

template <class T>
void output_rows(const T* q, int64_t ldq, int64_t n, int64_t count, Head<T>& out, Scratch<T>& s, Next& next) {
  const T* keys = s.sums + s.D * s.ldk;
  int64_t p = 0;
  for (; p + W<T> < count; p += 2 * W<T>) reciprocals<T, 2>(s.D, keys, q + p, ldq, s.eps, s.factor + p);
  if (p < count) reciprocals<T, 1>(s.D, keys, q + p, ldq, s.eps, s.factor + p);
  T* to = out.in_place_panel(n, count);
  const int64_t ldo = to ? out.map.d : s.ldn;
  if (!to) to = s.rows[1];
  product<T>(s.D, count, s.D, s.sums, s.ldk, q, ldq, to, ldo, {Start::zero, s.factor}, next);
  if (to == s.rows[1]) out.put_panel(n, count, to, ldo);
}

template <class T>
void output_tokens(T* q, int64_t n, int64_t count, Head<T>& out, Scratch<T>& s, Next& next) {
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
  product<T>(count, D, D, q, ldk, s.turned, ldk, to, ldo, {Start::zero}, next);
  if (to == s.tokens[1]) out.put_tokens(n, count, to, ldk);
}

template <class T>
void outputs(
    Head<T> query, Head<T> out, int64_t n0, int64_t n1, Scratch<T>& s, const Head<T>* keys, const Head<T>* values) {
  const int64_t step = s.step(n1 - n0);
  if (out.last) turn<T>(s.D, s.D, s.sums, s.ldk, s.turned, s.ldk);
  for (int64_t n = n0; n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step, left = n1 - n - step;
    // The first block of what follows, a share with each of the steps here.
    const int64_t i = n0 + step * (n - n0) / (n1 - n0), j = n0 + step * (n + count - n0) / (n1 - n0);
    Next next, after;
    if (left > 0) next.add(query, n + step, left < step ? left : step);
    if (keys) after.add(*keys, i, j - i), after.add(*values, i, j - i);
    after.between_tiles(1);
    if (out.last) {
      query.tokens(true, n, count, s.tokens[0], s.ldk);
      output_tokens<T>(s.tokens[0], n, count, out, s, next);
    } else {
      query.panel(true, n, count, s.rows[0], s.ldn);
      output_rows<T>(s.rows[0], s.ldn, n, count, out, s, next);
    }
  }
}

template <class T>
void query_gradients(
    Head<T> query, Head<T> grad, Head<T> dquery, int64_t n0, int64_t n1, Scratch<T>& s, const Next& then) {
  const int64_t D = s.D, ldk = s.ldk, ldn = s.ldn;
  const T* keys = s.sums + D * ldk;
  T* dsums = s.dsums;
  for (int64_t n = n0, step = s.step(n1 - n0); n < n1; n += step) {
    const int64_t count = n1 - n < step ? n1 - n : step, left = n1 - n - step < step ? n1 - n - step : step;
    Next next = left > 0 ? Next{} : then;
    next.add(query, n + step, left), next.add(grad, n + step, left), next.add(dquery, n + step, left);
    if (dquery.last) {
      T *q = s.tokens[0], *g = s.tokens[1], *t = s.tokens[2];
      query.tokens(true, n, count, q, ldk);
      grad.tokens(false, n, count, g, ldk);
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
      product<T>(count, D, D, g, ldk, s.sums, ldk, t, ldk, {Start::zero});
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
      product_columns<T>(D, D, count, g, ldk, q, ldk, dsums, ldk, {Start::from});
    } else {
      T *q = s.rows[0], *g = s.rows[1], *t = s.rows[2];
      query.panel(true, n, count, q, ldn);
      grad.panel(false, n, count, g, ldn);
      for (int64_t p = 0; p < count; p += W<T>) {
        reciprocals<T, 1>(D, keys, q + p, ldn, s.eps, s.factor + p);
        const vec<T> over = load<T>(s.factor + p);
        for (int64_t j = 0; j < D; ++j) store<T>(g + j * ldn + p, over * load<T>(g + j * ldn + p));
      }
      product_columns<T>(D, count, D, s.sums, ldk, g, ldn, t, ldn, {Start::zero});
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
      product<T>(D + 1, D, count, g, ldn, s.tokens[0], ldk, dsums, ldk, {Start::from}, next);
    }
  }
}

template <class T>
void key_gradients(
    Head<T> key, Head<T> value, Head<T> dkey, Head<T> dvalue, int64_t n0, int64_t n1, Scratch<T>& s, const Next& then) {
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
      key.tokens(true, n, count, k, ldk);
      value.tokens(false, n, count, v, ldk);
      product<T>(count, D, D, v, ldk, s.dsums, ldk, t, ldk, {Start::zero});
      for (int64_t p = 0; p < count; ++p)
        for (int64_t i = 0; i < D; i += W<T>) {
          T* at = t + p * ldk + i;
          store<T>(at, where_positive<T>(load<T>(k + p * ldk + i), load<T>(at) + load<T>(s.dsums + D * ldk + i)));
        }
      dkey.put_tokens(n, count, t, ldk);
      product<T>(count, D, D, k, ldk, s.turned, ldk, t, ldk, {Start::zero}, next);
      dvalue.put_tokens(n, count, t, ldk);
    } else {
      T *k = s.rows[0], *v = s.rows[1], *t = s.rows[2];
      key.panel(true, n, count, k, ldn);
      value.panel(false, n, count, v, ldn);
      product_columns<T>(D, count, D + 1, s.dsums, ldk, v, ldn, t, ldn, {Start::zero});
      for (int64_t i = 0; i < D; ++i)
        for (int64_t p = 0; p < count; p += W<T>) {
          T* at = t + i * ldn + p;
          store<T>(at, where_positive<T>(load<T>(k + i * ldn + p), load<T>(at)));
        }
      dkey.put_panel(n, count, t, ldn);
      product<T>(D, count, D, s.dsums, ldk, k, ldn, t, ldn, {Start::zero}, next);
      dvalue.put_panel(n, count, t, ldn);
    }
  }
}

#define MVK_STAGES(T)                                                                                     \
  template void add_sums(Head<T>, Head<T>, const Head<T>&, int64_t, int64_t, Scratch<T>&);                \
  template void add_ready_sums(const T*, const T*, int64_t, int64_t, Scratch<T>&);                        \
  template void output_rows(const T*, int64_t, int64_t, int64_t, Head<T>&, Scratch<T>&, Next&);           \
  template void output_tokens(T*, int64_t, int64_t, Head<T>&, Scratch<T>&, Next&);                        \
  template void outputs(Head<T>, Head<T>, int64_t, int64_t, Scratch<T>&, const Head<T>*, const Head<T>*); \
  template void query_gradients(Head<T>, Head<T>, Head<T>, int64_t, int64_t, Scratch<T>&, const Next&);   \
  template void key_gradients(Head<T>, Head<T>, Head<T>, Head<T>, int64_t, int64_t, Scratch<T>&, const Next&);
MVK_STAGES(float)
MVK_STAGES(double)

}  // namespace MVK_ISA
}  // namespace mvk
