// Former to Mobile on CPUs: every pixel of a map attends to a few tokens.
//
// For each block of pixels of a (batch, head): scores, softmax over the tokens (along rows: nothing goes across lanes),
// out = x + V^T P. The map is read once and written once, the scores never leave L1. The backward makes P again in
// the same way, writes dx, and sums dkey and dvalue over pixels. Pixels are lanes; on maps whose dims are contiguous they are
// rows of the products, and lanes again in softmax. Chunks of pixels are added up in order: no atomics.
#include "common/pixel_rows.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Softmax down the columns of s (M rows of whole vectors). With ds: ds = P (ds - sum P ds), its derivative, which does
// not depend on what all of a column have in common: less that of the highest score, tokens that are alike give 0, and
// nothing is lost where P is nearly 1.
template <class T>
MVK_APART void softmax(int64_t M, int64_t count, T* s, T* ds, int64_t ld, T factor) {
  const vec<T> f = splat(factor);
  for (int64_t n = 0; n < count; n += W<T>) {
    vec<T> top = load<T>(s + n), sum = {}, sum_dp = {}, base = {};
    if (ds) base = load<T>(ds + n);
    for (int64_t m = 1; m < M; ++m) {
      const vec<T> v = load<T>(s + m * ld + n);
      if (ds) base = v > top ? load<T>(ds + m * ld + n) : base;
      top = maximum<T>(top, v);
    }
    base = finite_or_zero<T>(base);
    auto some = [&](auto rows, int64_t m) __attribute__((always_inline)) {
      constexpr int U = decltype(rows)::value;
      vec<T> p[U];
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) p[u] = (load<T>(s + (m + u) * ld + n) - top) * f;
      exp2_nonpositive<U>(p);
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) {
        store<T>(s + (m + u) * ld + n, p[u]);
        sum += p[u];
        if (ds) sum_dp += p[u] * (load<T>(ds + (m + u) * ld + n) - base);
      }
    };
    int64_t m = 0;
    for (; m + 3 <= M; m += 3) some(std::integral_constant<int, 3>{}, m);
    for (; m < M; ++m) some(std::integral_constant<int, 1>{}, m);
    const vec<T> over = splat(T(1)) / sum, delta = sum_dp * over;
    for (m = 0; m < M; ++m) {
      const vec<T> p = load<T>(s + m * ld + n) * over;
      store<T>(s + m * ld + n, p);
      if (ds) store<T>(ds + m * ld + n, p * (load<T>(ds + m * ld + n) - base - delta));
    }
  }
}

template <class T>
static void forward_lanes(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldk = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(M * ldk) + 2 * Arena::bytes<T>(D * K) + Arena::bytes<T>(M * K),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* out_table = arena.take<int64_t>(K);
  T* k = arena.take<T>(M * ldk);
  T* v = arena.take<T>(M * ldk);
  T* packed = arena.take<T>(D * K);
  T* out_packed = arena.take<T>(D * K);
  T* s = arena.take<T>(M * K);
  const Factor factor(a.scale, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T> x(a, a.x, b, h, table);
    Pixels<T> y(a, a.out_map, b, h, out_table);
    pack_tokens<T>(a, a.key, b, h, T(factor.queries), k, ldk);
    pack_tokens<T>(a, a.value, b, h, T(1), v, ldk);
    int64_t from, to;
    part_of<T>(a.pixels(), unit % a.chunks, a.chunks, from, to);
    Span<T> span(from, to, K);
    for (int64_t n = span.next, count; (count = span.take()); n = span.next) {
      int64_t ld, ldo;
      const T* rows = x.rows(n, count, packed, K, ld);
      scores<T>(M, D, k, ldk, rows, ld, count, s, K);
      softmax<T>(M, count, s, static_cast<T*>(nullptr), K, T(factor.scores));
      T* out = y.target(n, count, out_packed, K, ldo);
      spread<T>(M, D, count, v, ldk, s, K, a.residual ? rows : nullptr, ld, out, ldo);
      y.put(n, count, out, ldo, out_packed);
    }
  }
}

template <class T>
static void forward_rows(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldk = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + Arena::bytes<T>(columns_size<T>(a)) + Arena::bytes<T>(M * ldk) +
          2 * Arena::bytes<T>((K + W<T>)*ldk) + Arena::bytes<T>(K * group_of<T>(M)) + Arena::bytes<T>(M * K),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* out_table = arena.take<int64_t>(K);
  T* k = arena.take<T>(columns_size<T>(a));
  T* v = arena.take<T>(M * ldk);
  T* packed = arena.take<T>((K + W<T>)*ldk);
  T* out_packed = arena.take<T>((K + W<T>)*ldk);
  T* turned = arena.take<T>(K * group_of<T>(M));
  T* s = arena.take<T>(M * K);
  const Factor factor(a.scale, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T> x(a, a.x, b, h, table);
    Rows<T> y(a, a.out_map, b, h, out_table);
    pack_columns<T>(a, a.key, b, h, T(factor.queries), k);
    pack_tokens<T>(a, a.value, b, h, T(1), v, ldk);
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    while (blocks.next()) {
      int64_t ld, ldo;
      const int64_t n = blocks.n, count = blocks.count;
      const T* rows = x.read(n, count, packed, ldk, ld);
      T* out = y.target(n, out_packed, ldk, ldo);
      row_scores<T>(M, D, count, rows, ld, k, turned, s, K, T(0));
      softmax<T>(M, count, s, nullptr, K, T(factor.scores));
      const Spread<T> set = {s, K, v};
      spread_rows<T>(M, D, count, &set, 1, ldk, a.residual ? rows : nullptr, ld, out, ldo);
      y.put(n, count, out_packed, ldk);
    }
  }
}

// Writes the gradients of token m: as a chunk's part, or as the result.
template <class T>
MVK_INLINE void put_dtokens(const Bridge& a, int64_t unit, int64_t m, const T* dk, const T* dv) {
  if (a.partial) {
    T* to = static_cast<T*>(a.partial) + unit * a.backward_partial() + m * a.D;
    memcpy(to, dk, a.D * sizeof(T));
    memcpy(to + a.M * a.D, dv, a.D * sizeof(T));
  } else {
    store_token<T>(a, a.dkey, unit / a.heads, unit % a.heads, m, dk);
    store_token<T>(a, a.dvalue, unit / a.heads, unit % a.heads, m, dv);
  }
}

template <class T>
static void backward_lanes(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldk = round_up(D, W<T>);
  arena.reset(
      3 * Arena::bytes<int64_t>(K) + 3 * Arena::bytes<T>(M * ldk) + 3 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(2 * M * K) + 2 * Arena::bytes<T>(Sums<T>::lanes_size(a)) +
          2 * Arena::bytes<T>(Sums<T>::rows_size(a)),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* grad_table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* k = arena.take<T>(M * ldk);
  T* k_scaled = arena.take<T>(M * ldk);
  T* v = arena.take<T>(M * ldk);
  T* packed = arena.take<T>(D * K);
  T* grad_packed = arena.take<T>(D * K);
  T* dpacked = arena.take<T>(D * K);
  T* s = arena.take<T>(2 * M * K);
  T* ds = s + M * K;
  T* dk_lanes = arena.take<T>(Sums<T>::lanes_size(a));
  T* dv_lanes = arena.take<T>(Sums<T>::lanes_size(a));
  Sums<T> dk(a, dk_lanes, arena.take<T>(Sums<T>::rows_size(a)));
  Sums<T> dv(a, dv_lanes, arena.take<T>(Sums<T>::rows_size(a)));
  const Factor factor(a.scale, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T> x(a, a.x, b, h, table), grad(a, a.grad_map, b, h, grad_table);
    Pixels<T> dx(a, a.dx, b, h, dtable);
    pack_tokens<T>(a, a.key, b, h, T(factor.queries), k, ldk);
    pack_tokens<T>(a, a.key, b, h, T(a.scale), k_scaled, ldk);
    pack_tokens<T>(a, a.value, b, h, T(1), v, ldk);
    int64_t from, to;
    part_of<T>(a.pixels(), unit % a.chunks, a.chunks, from, to);
    Span<T> span(from, to, K);
    bool first = true;
    for (int64_t n = span.next, count; (count = span.take()); n = span.next, first = false) {
      int64_t ld, ldg, ldd;
      const T* rows = x.rows(n, count, packed, K, ld);
      const T* grads = grad.rows(n, count, grad_packed, K, ldg);
      scores<T>(M, D, k, ldk, rows, ld, count, s, K);
      scores<T>(M, D, v, ldk, grads, ldg, count, ds, K);
      softmax<T>(M, count, s, ds, K, T(factor.scores));
      fill_tail<T>(2 * M, s, K, count, T(0));
      T* out = dx.target(n, count, dpacked, K, ldd);
      spread<T>(M, D, count, k_scaled, ldk, ds, K, a.residual ? grads : nullptr, ldg, out, ldd);
      dx.put(n, count, out, ldd, dpacked);
      dk.once = dv.once = count == to - from;
      dk.add(count, ds, K, rows, ld, nullptr, first);
      dv.add(count, s, K, grads, ldg, nullptr, first);
    }
    for (int64_t m = 0; m < M; ++m)
      put_dtokens<T>(a, unit, m, dk.token(m, splat(T(a.scale))), dv.token(m, splat(T(1))));
  }
}

template <class T>
static void backward_rows(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_rows<T>(a), ldk = round_up(D, W<T>);
  arena.reset(
      3 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(columns_size<T>(a)) + 3 * Arena::bytes<T>(M * ldk) +
          3 * Arena::bytes<T>((K + W<T>)*ldk) + Arena::bytes<T>(K * group_of<T>(M)) + 2 * Arena::bytes<T>(M * K),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* grad_table = arena.take<int64_t>(K);
  int64_t* dtable = arena.take<int64_t>(K);
  T* k = arena.take<T>(columns_size<T>(a));
  T* v = arena.take<T>(columns_size<T>(a));
  T* k_scaled = arena.take<T>(M * ldk);
  T* dk = arena.take<T>(M * ldk);
  T* dv = arena.take<T>(M * ldk);
  T* packed = arena.take<T>((K + W<T>)*ldk);
  T* grad_packed = arena.take<T>((K + W<T>)*ldk);
  T* dpacked = arena.take<T>((K + W<T>)*ldk);
  T* turned = arena.take<T>(K * group_of<T>(M));
  T* s = arena.take<T>(M * K);
  T* ds = arena.take<T>(M * K);
  const Factor factor(a.scale, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Rows<T> x(a, a.x, b, h, table), grad(a, a.grad_map, b, h, grad_table);
    Rows<T> dx(a, a.dx, b, h, dtable);
    pack_columns<T>(a, a.key, b, h, T(factor.queries), k);
    pack_columns<T>(a, a.value, b, h, T(1), v);
    pack_tokens<T>(a, a.key, b, h, T(a.scale), k_scaled, ldk);
    Blocks blocks = blocks_of_unit<T>(a, unit, K);
    while (blocks.next()) {
      int64_t ld, ldg, ldd;
      const int64_t n = blocks.n, count = blocks.count;
      const T* rows = x.read(n, count, packed, ldk, ld);
      const T* grads = grad.read(n, count, grad_packed, ldk, ldg);
      T* out = dx.target(n, dpacked, ldk, ldd);
      row_scores<T>(M, D, count, rows, ld, k, turned, s, K, T(0));
      row_scores<T>(M, D, count, grads, ldg, v, turned, ds, K, T(0));
      softmax<T>(M, count, s, ds, K, T(factor.scores));
      const Spread<T> set = {ds, K, k_scaled};
      spread_rows<T>(M, D, count, &set, 1, ldk, a.residual ? grads : nullptr, ldg, out, ldd);
      weigh<T>(M, D, count, ds, K, rows, ld, dk, ldk, nullptr, blocks.first());
      weigh<T>(M, D, count, s, K, grads, ldg, dv, ldk, nullptr, blocks.first());
      dx.put(n, count, dpacked, ldk);
    }
    for (int64_t m = 0; m < M; ++m) {
      T* row = dk + m * ldk;
      for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, splat(T(a.scale)) * load<T>(row + d));
      put_dtokens<T>(a, unit, m, row, dv + m * ldk);
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
  if (a.x.d != 1) return backward_lanes<T>(a, begin, end);
  backward_rows<T>(a, begin, end);
}

// Over (batch, head).
template <class T>
static void sum_dtokens(const Bridge& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    T* first = static_cast<T*>(a.partial) + item * a.chunks * a.backward_partial();
    sum_chunks<T>(a, a.dkey, first, a.backward_partial(), item);
    sum_chunks<T>(a, a.dvalue, first + a.M * a.D, a.backward_partial(), item);
  }
}

}  // namespace

extern const FormerToMobileKernels former_to_mobile_kernels;
const FormerToMobileKernels former_to_mobile_kernels = {
    by_dtype<forward<float>, forward<double>>, by_dtype<backward<float>, backward<double>>,
    by_dtype<sum_dtokens<float>, sum_dtokens<double>>};

}  // namespace MVK_ISA
}  // namespace mvk
