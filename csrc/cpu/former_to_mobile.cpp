// Former to Mobile on CPUs: every pixel of a map attends to a few tokens.
//
// For each block of pixels of a (batch, head): scores, softmax over the tokens (along rows: nothing goes across lanes),
// out = x + V^T P. The map is read once and written once, the scores never leave L1. The backward makes P again in
// the same way, writes dx, and sums dkey and dvalue over pixels by lane. Chunks of pixels are added up in order: no atomics.
#include "pixels.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Softmax down the columns of s (M rows of whole vectors). With ds: ds = P (ds - sum P ds), its derivative, which does
// not depend on what all of a column have in common: less its first row, tokens that are alike give 0.
template <class T>
static void softmax(int64_t M, int64_t count, T* s, T* ds, int64_t ld, T factor) {
  const vec<T> f = splat(factor);
  for (int64_t n = 0; n < count; n += W<T>) {
    vec<T> top = load<T>(s + n), sum = {}, sum_dp = {}, base = {};
    if (ds) base = finite_or_zero<T>(load<T>(ds + n));
    for (int64_t m = 1; m < M; ++m) top = maximum<T>(top, load<T>(s + m * ld + n));
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

// to[n][d] = start's pixel n (or 0) + sum_m r[m * ldr + n] v[m][d], with dims as lanes.
template <class T, class S>
static void spread_by_dim(
    int64_t M, int64_t D, int64_t count, const T* v, int64_t ldv, const T* r, int64_t ldr, Pixels<T, const S>* start,
    int64_t n, T* to, int64_t ld) {
  if (start && start->last) {
    pack_rows<T>(start->lattice(n, count), 0, count, D, to, ld);
    product_columns<T, Start::from>(count, D, M, r, ldr, v, ldv, to, ld);
  } else {
    product_columns<T, Start::zero>(count, D, M, r, ldr, v, ldv, to, ld);
  }
}

template <class T, class S>
static void forward(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldk = round_up(D, W<T>);
  arena.reset(
      2 * Arena::bytes<int64_t>(K) + 2 * Arena::bytes<T>(M * ldk) + 2 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(M * K) + Arena::bytes<T>(K * ldk),
      a.poison);
  int64_t* table = arena.take<int64_t>(K);
  int64_t* out_table = arena.take<int64_t>(K);
  T* k = arena.take<T>(M * ldk);
  T* v = arena.take<T>(M * ldk);
  T* packed = arena.take<T>(D * K);
  T* out_packed = arena.take<T>(D * K);
  T* s = arena.take<T>(M * K);
  T* tokens = arena.take<T>(K * ldk);
  const Factor factor(a.scale, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T, const S> x(a, a.x, b, h, table);
    Pixels<T, S> y(a, a.out_map, b, h, out_table);
    pack_tokens<T, S>(a, a.key, b, h, T(factor.queries), k, ldk);
    pack_tokens<T, S>(a, a.value, b, h, T(1), v, ldk);
    int64_t from, to;
    chunk_of<T>(a, unit % a.chunks, from, to);
    Span<T> span(from, to, K);
    for (int64_t n = span.next, count; (count = span.take()); n = span.next) {
      int64_t ld, ldo;
      const T* rows = x.rows(n, count, packed, K, ld);
      scores<T>(M, D, k, ldk, rows, ld, count, s, K);
      softmax<T>(M, count, s, static_cast<T*>(nullptr), K, T(factor.scores));
      if (y.last) {
        spread_by_dim<T, S>(M, D, count, v, ldk, s, K, a.residual ? &x : nullptr, n, tokens, ldk);
        y.put_tokens(n, count, tokens, ldk);
      } else {
        T* out = y.target(n, count, out_packed, K, ldo);
        spread<T>(M, D, count, v, ldk, s, K, a.residual ? rows : nullptr, ld, out, ldo);
        y.put(n, count, out, ldo, out_packed);
      }
    }
  }
}

template <class T, class S>
static void backward(const Bridge& a, int64_t begin, int64_t end) {
  const int64_t M = a.M, D = a.D, K = block_of_pixels<T>(a), ldk = round_up(D, W<T>);
  arena.reset(
      3 * Arena::bytes<int64_t>(K) + 3 * Arena::bytes<T>(M * ldk) + 3 * Arena::bytes<T>(D * K) +
          Arena::bytes<T>(2 * M * K) + 2 * Arena::bytes<T>(M * D * W<T>) + Arena::bytes<T>(ldk) +
          Arena::bytes<T>(K * ldk) + 2 * Arena::bytes<T>(M * ldk),
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
  T* dk = arena.take<T>(M * D * W<T>);
  T* dv = arena.take<T>(M * D * W<T>);
  T* row = arena.take<T>(ldk);
  T* tokens = arena.take<T>(K * ldk);
  T* dk_rows = arena.take<T>(M * ldk);
  T* dv_rows = arena.take<T>(M * ldk);
  const Factor factor(a.scale, false);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t item = unit / a.chunks, b = item / a.heads, h = item % a.heads;
    Pixels<T, const S> x(a, a.x, b, h, table), grad(a, a.grad_map, b, h, grad_table);
    Pixels<T, S> dx(a, a.dx, b, h, dtable);
    const bool dk_by_dim = dims_as_lanes<T>(a, x.last), dv_by_dim = dims_as_lanes<T>(a, grad.last);
    pack_tokens<T, S>(a, a.key, b, h, T(factor.queries), k, ldk);
    pack_tokens<T, S>(a, a.key, b, h, T(a.scale), k_scaled, ldk);
    pack_tokens<T, S>(a, a.value, b, h, T(1), v, ldk);
    int64_t from, to;
    chunk_of<T>(a, unit % a.chunks, from, to);
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
      if (dx.last && grad.last) {
        spread_by_dim<T, S>(M, D, count, k_scaled, ldk, ds, K, a.residual ? &grad : nullptr, n, tokens, ldk);
        dx.put_tokens(n, count, tokens, ldk);
      } else {
        T* out = dx.target(n, count, dpacked, K, ldd);
        spread<T>(M, D, count, k_scaled, ldk, ds, K, a.residual ? grads : nullptr, ldg, out, ldd);
        dx.put(n, count, out, ldd, dpacked);
      }
      if (dk_by_dim) {
        rows = x.tokens(n, count, tokens, ldk, ld);
        sums_by_dim<T>(M, D, count, ds, K, rows, ld, dk_rows, ldk, nullptr, first);
      } else {
        sums<T>(M, D, count, ds, K, rows, ld, dk, nullptr, first);
      }
      if (dv_by_dim) {
        grads = grad.tokens(n, count, tokens, ldk, ldg);
        sums_by_dim<T>(M, D, count, s, K, grads, ldg, dv_rows, ldk, nullptr, first);
      } else {
        sums<T>(M, D, count, s, K, grads, ldg, dv, nullptr, first);
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      T* partial = a.partial ? static_cast<T*>(a.partial) + unit * a.backward_partial() + m * D : nullptr;
      if (dk_by_dim)
        for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, splat(T(a.scale)) * load<T>(dk_rows + m * ldk + d));
      else
        across_lanes<T>(dk + m * D * W<T>, D, splat(T(a.scale)), row);
      if (partial)
        memcpy(partial, row, D * sizeof(T));
      else
        store_token<T, S>(a, a.dkey, b, h, m, row);
      if (dv_by_dim)
        for (int64_t d = 0; d < D; d += W<T>) store<T>(row + d, splat(T(1)) * load<T>(dv_rows + m * ldk + d));
      else
        across_lanes<T>(dv + m * D * W<T>, D, splat(T(1)), row);
      if (partial)
        memcpy(partial + M * D, row, D * sizeof(T));
      else
        store_token<T, S>(a, a.dvalue, b, h, m, row);
    }
  }
}

// Over (batch, head).
template <class T, class S>
static void sum_dtokens(const Bridge& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    T* first = static_cast<T*>(a.partial) + item * a.chunks * a.backward_partial();
    sum_chunks<T, S>(a, a.dkey, first, a.backward_partial(), item);
    sum_chunks<T, S>(a, a.dvalue, first + a.M * a.D, a.backward_partial(), item);
  }
}

}  // namespace

static MVK_BY_DTYPE(Bridge, forward) static MVK_BY_DTYPE(Bridge, backward) static MVK_BY_DTYPE(Bridge, sum_dtokens)

    extern const FormerToMobileKernels former_to_mobile_kernels;
const FormerToMobileKernels former_to_mobile_kernels = {forward_by_dtype, backward_by_dtype, sum_dtokens_by_dtype};

}  // namespace MVK_ISA
}  // namespace mvk
