// ReLU linear attention on CPUs, forward and backward.
//
// Forward: the sums of k and v over blocks of pixels in cache, then out = kv relu(q) / (keys . relu(q) + eps). With p =
// 1 / (keys . relu(q) + eps) and g' = p dout the backward is, for each pixel, t = kv^T g', r = p (q . t), dq = t - r keys; the
// gradients of the sums are products of [g', -r] with relu(q), of which dk and dv are made. Chunks of pixels are added up in
// order: no atomics.
#include "linear.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Scratch of a thread.
template <class T>
struct Scratch {
  int64_t N, ldn, ldk;  // pixels of a block, and the leading dimensions of rows of pixels and of dims
  int64_t *first, *second, *third, *fourth;
  T *sums, *dsums, *turned, *factor;
  T* rows[3];    // [D + 1][ldn]
  T* tokens[3];  // [N][ldk]
  explicit Scratch(const LinearAttention& a)
      : N(pixels_of_block<T>(a.D, a.pixels())), ldn(leading<T>(N)), ldk(round_up(a.D, W<T>)) {
    const int64_t wide = ldn < 2 * W<T> ? 2 * W<T> : ldn;  // as outputs() takes them
    const int64_t rows_size = (a.D + 1) * wide, tokens_size = round_up(N, W<T>) * ldk, sums_size = (a.D + 1) * ldk;
    arena.reset(
        4 * Arena::bytes<int64_t>(N) + 2 * Arena::bytes<T>(sums_size) + Arena::bytes<T>(ldk * ldk) + Arena::bytes<T>(wide) +
            3 * Arena::bytes<T>(rows_size) + 3 * Arena::bytes<T>(tokens_size),
        a.poison);
    first = arena.take<int64_t>(N), second = arena.take<int64_t>(N), third = arena.take<int64_t>(N);
    fourth = arena.take<int64_t>(N);
    sums = arena.take<T>(sums_size), dsums = arena.take<T>(sums_size), turned = arena.take<T>(ldk * ldk);
    factor = arena.take<T>(wide);
    for (T*& one : rows) one = arena.take<T>(rows_size);
    for (T*& one : tokens) one = arena.take<T>(tokens_size);
  }
};

template <class T>
static void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Adds [v, 1] relu(k)^T over pixels n0 .. n1 to the sums.
template <class T, class S>
static void add_sums(const LinearAttention& a, int64_t b, int64_t h, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = a.D, ldk = s.ldk;
  T* sums = s.sums;
  Head<T, const S> key(a.key, b, h, D, a.H, a.W, s.first), value(a.value, b, h, D, a.H, a.W, s.second);
  fill(s.rows[0] + D * s.ldn, s.N, T(1));
  for (int64_t n = n0; n < n1; n += s.N) {
    const int64_t count = n1 - n < s.N ? n1 - n : s.N;
    key.template tokens<true>(n, count, s.tokens[0], ldk);
    if (value.last) {
      for (int64_t i = 0; i < ldk; i += W<T>) {
        vec<T> sum = {};
        for (int64_t p = 0; p < count; ++p) sum += load<T>(s.tokens[0] + p * ldk + i);
        store<T>(sums + D * ldk + i, load<T>(sums + D * ldk + i) + sum);
      }
      const T* v = value.tokens_in_place(n);
      int64_t ldv = a.value.x;
      if (!v) value.template tokens<false>(n, count, s.tokens[1], ldk), v = s.tokens[1], ldv = ldk;
      product_columns<T, Start::from>(D, D, count, v, ldv, s.tokens[0], ldk, sums, ldk);
    } else {
      value.template panel<false>(n, count, s.rows[0], s.ldn);
      product<T, Start::from>(D + 1, D, count, s.rows[0], s.ldn, s.tokens[0], ldk, sums, ldk);
    }
  }
}

// out over pixels n0 .. n1.
template <class T, class S>
static void outputs(const LinearAttention& a, int64_t b, int64_t h, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = a.D, ldk = s.ldk;
  const T* keys = s.sums + D * ldk;
  Head<T, const S> query(a.query, b, h, D, a.H, a.W, s.first);
  Head<T, S> out(a.out, b, h, D, a.H, a.W, s.second);
  if (out.last) {
    turn<T>(D, D, s.sums, ldk, s.turned, ldk);
    for (int64_t n = n0; n < n1; n += s.N) {
      const int64_t count = n1 - n < s.N ? n1 - n : s.N;
      T* q = s.tokens[0];
      query.template tokens<true>(n, count, q, ldk);
      for (int64_t p = 0; p < count; p += W<T>) {
        const int some = at_most<T>(count - p);
        T over[W<T>];
        store<T>(over, splat(T(1)) / (dots<T>(some, D, q + p * ldk, ldk, keys, 0) + splat(T(a.eps))));
        for (int m = 0; m < some; ++m)
          for (int64_t i = 0; i < D; i += W<T>) {
            T* at = q + (p + m) * ldk + i;
            store<T>(at, splat(over[m]) * load<T>(at));
          }
      }
      T* to = out.in_place_tokens(n);
      int64_t ldo = a.out.x;
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
      reciprocals<T, V>(D, keys, q, wide, T(a.eps), s.factor);
      T* to = out.in_place_panel(n, count);
      const int64_t ldo = to ? a.out.d : wide;
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
template <class T, class S>
static void query_gradients(const LinearAttention& a, int64_t b, int64_t h, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = a.D, ldk = s.ldk, ldn = s.ldn;
  const T* keys = s.sums + D * ldk;
  T* dsums = s.dsums;
  Head<T, const S> query(a.query, b, h, D, a.H, a.W, s.first), grad(a.grad, b, h, D, a.H, a.W, s.second);
  Head<T, S> dquery(a.dquery, b, h, D, a.H, a.W, s.third);
  for (int64_t n = n0; n < n1; n += s.N) {
    const int64_t count = n1 - n < s.N ? n1 - n : s.N;
    if (dquery.last) {
      T *q = s.tokens[0], *g = s.tokens[1], *t = s.tokens[2];
      query.template tokens<true>(n, count, q, ldk);
      grad.template tokens<false>(n, count, g, ldk);
      for (int64_t p = 0; p < count; p += W<T>) {
        const int some = at_most<T>(count - p);
        T* over = s.factor + p;
        store<T>(over, splat(T(1)) / (dots<T>(some, D, q + p * ldk, ldk, keys, 0) + splat(T(a.eps))));
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
        reciprocals<T, 1>(D, keys, q + p, ldn, T(a.eps), s.factor + p);
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
template <class T, class S>
static void key_gradients(const LinearAttention& a, int64_t b, int64_t h, int64_t n0, int64_t n1, Scratch<T>& s) {
  const int64_t D = a.D, ldk = s.ldk, ldn = s.ldn;
  Head<T, const S> key(a.key, b, h, D, a.H, a.W, s.first), value(a.value, b, h, D, a.H, a.W, s.second);
  Head<T, S> dkey(a.dkey, b, h, D, a.H, a.W, s.third), dvalue(a.dvalue, b, h, D, a.H, a.W, s.fourth);
  const bool last = dkey.last;
  if (last)
    turn<T>(D, D, s.dsums, ldk, s.turned, ldk);
  else
    fill(s.rows[1] + D * ldn, s.N, T(1));
  for (int64_t n = n0; n < n1; n += s.N) {
    const int64_t count = n1 - n < s.N ? n1 - n : s.N;
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

// ---- units ----

struct Unit {
  int64_t item, b, h, chunk;
  Unit(const LinearAttention& a, int64_t unit)
      : item(unit / a.chunks), b(item / a.heads), h(item % a.heads), chunk(unit % a.chunks) {}
};

template <class T>
static T* kv_of(const LinearAttention& a, const Unit& u) {
  return static_cast<T*>(a.kv) + u.item * a.D * a.D;
}
template <class T>
static T* keys_of(const LinearAttention& a, const Unit& u) {
  return static_cast<T*>(a.keys) + u.item * a.D;
}
template <class T>
static T* partial_of(const LinearAttention& a, const Unit& u) {
  return static_cast<T*>(a.partial) + u.item * a.chunks * a.partial_size();
}

template <class T, class S>
static void forward(const LinearAttention& a, int64_t begin, int64_t end) {
  Scratch<T> s(a);
  const int64_t D = a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u(a, unit);
    int64_t n0, n1;
    part_of<T>(a.pixels(), u.chunk, a.chunks, n0, n1);
    if (a.stage == Stage::rest) {
      merge_sums(D, a.chunks, partial_of<T>(a, u), a.partial_size(), s.sums, s.ldk);
    } else {
      fill(s.sums, (D + 1) * s.ldk, T(0));
      add_sums<T, S>(a, u.b, u.h, n0, n1, s);
    }
    if (a.stage == Stage::sums) {
      T* to = partial_of<T>(a, u) + u.chunk * a.partial_size();
      give_sums(D, s.sums, s.ldk, to, to + D * D);
    } else {
      if (u.chunk == 0) give_sums(D, s.sums, s.ldk, kv_of<T>(a, u), keys_of<T>(a, u));
      outputs<T, S>(a, u.b, u.h, n0, n1, s);
    }
  }
}

template <class T, class S>
static void backward(const LinearAttention& a, int64_t begin, int64_t end) {
  Scratch<T> s(a);
  const int64_t D = a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u(a, unit);
    int64_t n0, n1;
    part_of<T>(a.pixels(), u.chunk, a.chunks, n0, n1);
    if (a.stage == Stage::rest) {
      merge_sums(D, a.chunks, partial_of<T>(a, u), a.partial_size(), s.dsums, s.ldk);
    } else {
      take_sums(D, kv_of<T>(a, u), keys_of<T>(a, u), s.sums, s.ldk);
      fill(s.dsums, (D + 1) * s.ldk, T(0));
      query_gradients<T, S>(a, u.b, u.h, n0, n1, s);
    }
    if (a.stage == Stage::sums) {
      T* to = partial_of<T>(a, u) + u.chunk * a.partial_size();
      give_sums(D, s.dsums, s.ldk, to, to + D * D);
    } else {
      key_gradients<T, S>(a, u.b, u.h, n0, n1, s);
    }
  }
}

}  // namespace

static MVK_BY_DTYPE(LinearAttention, forward) static MVK_BY_DTYPE(LinearAttention, backward)

    extern const LinearAttentionKernels relu_linear_attention_kernels;
const LinearAttentionKernels relu_linear_attention_kernels = {forward_by_dtype, backward_by_dtype};

}  // namespace MVK_ISA
}  // namespace mvk
