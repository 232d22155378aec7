// Patch attention on CPUs, backward, for one (batch, group, head) at a time.
//
// For each block of queries and of keys the probabilities are made again from the saved log-sum-exp; dQ^T is summed over
// keys in L1, dK and dV over queries in L2, and each is stored once: q, k, v, dout are read once, and so is out for
// groups of more than kBackKeys tokens (in half types, P and dP of all keys are made once more instead). No atomics: a
// bias gradient is summed per slice by one thread, then over slices in order, and so is dQ where the keys of a group are
// split over threads.
#include "patch_attention_shared.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t kBackKeys = 256;  // the backward holds P and dS of a block, 256 x 32 floats each, in L2
constexpr int64_t kSummed = 32;     // rows added in one chain, a longer one would be the largest error of all

// P = 2^(factor (S - high - low)), where high + low is the log-sum-exp in units of S, and dS = P (dP - delta), over `rows`
// rows of V vectors, `ld` apart. If these are all keys, high is just their maximum: P is then divided by its own sum and
// delta is sum_k P dP, as exact as softmax's backward, also for groups of a token or two.
template <class T, int V>
MVK_INLINE void probabilities(
    T* p, T* ds, int64_t rows, int64_t ld, T factor, const T* high, const T* low, const T* delta, bool whole) {
  const vec<T> f = splat<T>(factor);
  vec<T> hi[V], lo[V], dl[V], sum[V] = {}, sum_dp[V] = {}, part_sum[V] = {}, part_dp[V] = {};
  for (int v = 0; v < V; ++v) {
    hi[v] = load<T>(high + v * W<T>), lo[v] = load<T>(low + v * W<T>);
    dl[v] = load<T>(delta + v * W<T>);
  }
  auto some = [&](auto count, int64_t r) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value;
    vec<T> e[R * V];
#pragma GCC unroll 4
    for (int u = 0; u < R * V; ++u) e[u] = (load<T>(p + (r + u / V) * ld + u % V * W<T>) - hi[u % V] - lo[u % V]) * f;
    exp2_nonpositive<R * V>(e);
#pragma GCC unroll 4
    for (int u = 0; u < R * V; ++u) {
      const int64_t at = (r + u / V) * ld + u % V * W<T>;
      const vec<T> dp = load<T>(ds + at);
      store<T>(p + at, e[u]);
      if (whole)
        part_sum[u % V] += e[u], part_dp[u % V] += e[u] * dp;
      else
        store<T>(ds + at, e[u] * (dp - dl[u % V]));
    }
  };
  constexpr int R = 4 / V;
  int64_t r = 0;
  while (r < rows) {
    const int64_t to = r + kSummed < rows ? r + kSummed : rows;
    for (; r + R <= to; r += R) some(std::integral_constant<int, R>{}, r);
    for (; r < to; ++r) some(std::integral_constant<int, 1>{}, r);
    if (!whole) continue;
    for (int v = 0; v < V; ++v) {
      sum[v] += part_sum[v], sum_dp[v] += part_dp[v];
      part_sum[v] = part_dp[v] = vec<T>{};
    }
  }
  if (!whole) return;
  for (int v = 0; v < V; ++v) sum[v] = splat<T>(T(1)) / sum[v], dl[v] = sum_dp[v] * sum[v];
  // The softmax of one score does not depend on it.
  for (int v = 0; rows == 1 && v < V; ++v) dl[v] = load<T>(ds + v * W<T>);
  for (r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const int64_t at = r * ld + v * W<T>;
      const vec<T> pn = load<T>(p + at) * sum[v];
      store<T>(p + at, pn);
      store<T>(ds + at, pn * (load<T>(ds + at) - dl[v]));
    }
  }
}

// S^T (added to the bias, which is in p), dP^T, then P^T and dS^T of a block of keys for one panel of V vectors of queries;
// the blocks have kBlock columns. If whole, high (-inf before) becomes the maximum of S.
template <class T, int V>
static void block_of_scores(
    const PatchAttention& a, int64_t keys, const T* q, const T* go, const T* k, int64_t ldk, const T* v, int64_t ldv,
    T factor, T* p, T* ds, T* high, const T* low, const T* delta, bool whole, Ahead& ahead) {
  constexpr int64_t P = kPanel<T>;
  T unused[P] = {};
  T* top = whole ? high : unused;
  product_in_parts<T, V, true>(a.bias, keys, a.D, k, ldk, q, P, p, kBlock, top, ahead);
  product_in_parts<T, V, false>(false, keys, a.Dv, v, ldv, go, P, ds, kBlock, nullptr);
  probabilities<T, V>(p, ds, keys, kBlock, factor, high, low, delta, whole);
}

// delta of one panel of V vectors of queries, for half types: sum_k P dP over all keys, since the sum of dO O would be made of
// an output that was rounded. The sum of P is there as well, so that an error of the log-sum-exp cancels.
template <class T, int V, class S>
static void deltas(
    const PatchAttention& a, int64_t N, const Bias<S>& bias, int64_t row, int64_t stop, const T* q, const T* go,
    const T* k, int64_t ldk, const T* v, int64_t ldv, T factor, T* p, T* dp, const T* high, const T* low, T* delta) {
  constexpr int64_t P = kPanel<T>;
  constexpr int64_t L = V * W<T>;
  T sum[L] = {}, sum_dp[L] = {}, none[L] = {}, unused[P] = {};
  const int64_t step = part(N, kBackKeys);
  for (int64_t key = 0; key < N; key += step) {
    const int64_t keys = key + step < N ? step : N - key;
    if (a.bias) bias.template transposed<T>(row, stop, key, keys, p, kBlock);
    product_in_parts<T, V, true>(a.bias, keys, a.D, k + key * ldk, ldk, q, P, p, kBlock, unused);
    product_in_parts<T, V, false>(false, keys, a.Dv, v + key * ldv, ldv, go, P, dp, kBlock, nullptr);
    probabilities<T, V>(p, dp, keys, kBlock, factor, high, low, none, false);  // dp becomes P dP
    for (int64_t from = 0; from < keys; from += kSummed) {
      const int64_t to = from + kSummed < keys ? from + kSummed : keys;
      for (int64_t l = 0; l < L; l += W<T>) {
        vec<T> of_p = {}, of_dp = {};
        for (int64_t r = from; r < to; ++r) of_p += load<T>(p + r * kBlock + l), of_dp += load<T>(dp + r * kBlock + l);
        store<T>(sum + l, load<T>(sum + l) + of_p);
        store<T>(sum_dp + l, load<T>(sum_dp + l) + of_dp);
      }
    }
  }
  for (int64_t l = 0; l < L; l += W<T>) store<T>(delta + l, load<T>(sum_dp + l) / load<T>(sum + l));
}

// c[key][d] (+)= sum over queries of a[key][query] * b[query][d].
template <class T, Start from>
static void sum_over_queries(int64_t keys, int64_t dims, int64_t queries, const T* a, const T* b, T* c, int64_t ld) {
  int64_t d = 0;
  for (; d + W<T> < dims; d += kPanel<T>)
    product_rows<T, 2, from, false>(keys, queries, a, kBlock, b + d, ld, c + d, ld, nullptr);
  if (d < dims) product_rows<T, 1, from, false>(keys, queries, a, kBlock, b + d, ld, c + d, ld, nullptr);
}

template <class T, class S>
static void backward(const PatchAttention& a, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  const int64_t most = a.tokens(), tall = round_up(most, W<T>), ldk = leading<T>(a.D), ldv = leading<T>(a.Dv);
  const int64_t ldb = a.padded();
  arena.reset(
      11 * Arena::bytes<int64_t>(most) + 2 * Arena::bytes<T>(tall * ldk) + 2 * Arena::bytes<T>(tall * ldv) +
          Arena::bytes<T>(tall_size<T>(most, a.D)) + Arena::bytes<T>(kBlock * (a.D + 2 * a.Dv)) +
          2 * Arena::bytes<T>(kBlock * ldk) + Arena::bytes<T>(kBlock * ldv) + 2 * Arena::bytes<T>(kBackKeys * kBlock) +
          4096,
      a.poison);
  auto offsets = [&] { return Offsets{arena.take<int64_t>(most)}; };
  Offsets oq = offsets(), ok = offsets(), ov = offsets(), oo = offsets(), ol = offsets();
  Offsets og = offsets(), odq = offsets(), odk = offsets(), odv = offsets();
  T* k = arena.take<T>(tall * ldk);
  T* v = arena.take<T>(tall * ldv);
  T* dk = arena.take<T>(tall * ldk);
  T* dv = arena.take<T>(tall * ldv);
  T* k_tall = arena.take<T>(tall_size<T>(most, a.D));
  T* q_panel = arena.take<T>(kBlock * a.D);
  T* go_panel = arena.take<T>(kBlock * a.Dv);
  T* o_panel = arena.take<T>(kBlock * a.Dv);
  T* dq_here = arena.take<T>(kBlock * ldk);
  T* q = arena.take<T>(kBlock * ldk);
  T* go = arena.take<T>(kBlock * ldv);
  T* p = arena.take<T>(kBackKeys * kBlock);
  T* ds = arena.take<T>(kBackKeys * kBlock);
  T high[kBlock], low[kBlock], delta[kBlock], scales[kBlock], ones[kBlock];
  for (T& x : scales) x = T(a.scale);
  for (T& x : ones) x = T(1);
  const Tiles k_tiles(a.D, kTileRows);
  const Factor factor(a.scale, a.bias);
  const Map lse_map = {a.lse, a.heads * a.H * a.W, a.H * a.W, 1, a.W, 1};

  int64_t* bias_rows = row_offsets(most, a.bias_stride[1]);
  int64_t* dbias_rows = row_offsets(most, most);
  const int64_t all = a.B * a.groups();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit % a.chunks, h = unit / a.chunks % a.heads, slice = unit / a.chunks / a.heads;
    T* dbias = nullptr;
    if (a.dbias_partial) dbias = static_cast<T*>(a.dbias_partial) + (slice * a.heads + h) * most * ldb;
    const int64_t first = all * slice / a.slices, last = all * (slice + 1) / a.slices;
    for (int64_t item = first; item < last; ++item) {
      const Group g(a, item, h);
      const int64_t N = g.tokens, key_begin = N * chunk / a.chunks, key_end = N * (chunk + 1) / a.chunks;
      const int64_t key_step = part(key_end - key_begin, kBackKeys);
      const bool whole = key_end - key_begin == N && key_step >= N;
      const auto mq = lattice<S>(a, a.query, oq, g), mk = lattice<S>(a, a.key, ok, g),
                 mv = lattice<S>(a, a.value, ov, g);
      const auto mo = lattice<S>(a, a.out, oo, g), mg = lattice<S>(a, a.grad, og, g),
                 mdq = lattice<S>(a, a.dquery, odq, g);
      const auto lse = lattice<const double>(a, lse_map, ol, g);
      const Bias<S> bias(a, h, bias_rows);
      Ahead ahead;
      const bool within = item + 1 < last;
      if (a.chunks == 1 && (within || unit + 1 < end)) {
        const Group after(
            a, within ? item + 1 : all * ((unit + 1) / a.heads) / a.slices, within ? h : (unit + 1) % a.heads);
        ahead.count = N < after.tokens ? N : after.tokens, ahead.panel = P;
        ahead.add<S>(a.query, after, mq.offset, a.D);
        ahead.add<S>(a.key, after, mk.offset, a.D);
        ahead.add<S>(a.value, after, mv.offset, a.Dv);
        ahead.add<S>(a.grad, after, mg.offset, a.Dv);
      }
      pack_rows<T>(mk, 0, N, a.D, k, ldk);
      pack_rows<T>(mv, 0, N, a.Dv, v, ldv);
      const bool by_rows = !a.dquery_partial && rows_are_cheaper<T>(N, a.D, mdq.d == 1);
      if (!by_rows) pack_tall<T>(k, ldk, N, k_tiles, k_tall);

      for (int64_t row = 0; row < N; row += kBlock) {
        const int64_t rows = row + kBlock < N ? kBlock : N - row;
        pack_rows<T>(mq, row, row + rows, a.D, q, ldk);
        pack_rows<T>(mg, row, row + rows, a.Dv, go, ldv);
        for (int64_t i = 0; i < kBlock; ++i) {
          high[i] = whole ? -kInfinity<T> : T(0);
          low[i] = delta[i] = 0;
          if (whole || i >= rows) continue;
          const double in_scores = lse.data[lse.offset[row + i]] / (factor.scores * kLn2);
          high[i] = T(in_scores);
          low[i] = T(in_scores - high[i]);
        }
        for (int64_t i = 0; i < rows; i += P) {
          const int64_t stop = i + P < rows ? i + P : rows;
          pack_panel<T>(mq, row + i, row + stop, a.D, T(factor.queries), q_panel + i * a.D, P);
          pack_panel<T>(mg, row + i, row + stop, a.Dv, T(1), go_panel + i * a.Dv, P);
          if (whole) continue;
          if constexpr (!std::is_same_v<T, S>) {
            auto of_panel = stop - i > W<T> ? deltas<T, 2, S> : deltas<T, 1, S>;
            of_panel(
                a, N, bias, row + i, row + stop, q_panel + i * a.D, go_panel + i * a.Dv, k, ldk, v, ldv,
                T(factor.scores), p, ds, high + i, low + i, delta + i);
            continue;
          }
          // delta = sum_d dO O
          pack_panel<T>(mo, row + i, row + stop, a.Dv, T(1), o_panel + i * a.Dv, P);
          for (int64_t j = 0; i + j < stop; j += W<T>) {
            vec<T> sum = {};
            for (int64_t d = 0; d < a.Dv; ++d)
              sum += load<T>(o_panel + i * a.Dv + d * P + j) * load<T>(go_panel + i * a.Dv + d * P + j);
            store<T>(delta + i + j, sum);
          }
        }
        T* dq = dq_here;
        if (a.dquery_partial) dq = static_cast<T*>(a.dquery_partial) + (unit * ldb + row) * a.D;
        if (key_begin == key_end) memset(dq, 0, kBlock * a.D * sizeof(T));
        for (int64_t key = key_begin; key < key_end; key += key_step) {
          const int64_t keys = key + key_step < key_end ? key_step : key_end - key;
          for (int64_t i = 0; i < rows; i += P) {
            const int64_t stop = i + P < rows ? i + P : rows;
            if (a.bias) bias.template transposed<T>(row + i, row + stop, key, keys, p + i, kBlock);
            auto scores = rows - i > W<T> ? block_of_scores<T, 2> : block_of_scores<T, 1>;
            scores(
                a, keys, q_panel + i * a.D, go_panel + i * a.Dv, k + key * ldk, ldk, v + key * ldv, ldv,
                T(factor.scores), p + i, ds + i, high + i, low + i, delta + i, whole, ahead);
            if (a.dbias && !a.dbias_partial) {
              const Lattice<S> to = {static_cast<S*>(a.dbias) + h * N * N + key, dbias_rows, 1, N};
              unpack_panel<T>(to, row + i, row + stop, keys, ds + i, kBlock, ones);
            }
            T* dqp = dq + i * a.D;
            if (by_rows) continue;
            if (rows - i > W<T>) {
              if (key == key_begin)
                product_tall<T, 2, Start::zero>(k_tiles, N, key, key + keys, k_tall, ds + i, kBlock, dqp, P);
              else
                product_tall<T, 2, Start::from>(k_tiles, N, key, key + keys, k_tall, ds + i, kBlock, dqp, P);
            } else {
              if (key == key_begin)
                product_tall<T, 1, Start::zero>(k_tiles, N, key, key + keys, k_tall, ds + i, kBlock, dqp, P);
              else
                product_tall<T, 1, Start::from>(k_tiles, N, key, key + keys, k_tall, ds + i, kBlock, dqp, P);
            }
          }
          if (by_rows && key == key_begin)
            product_columns<T, Start::zero>(rows, a.D, keys, ds, kBlock, k + key * ldk, ldk, dq, ldk);
          else if (by_rows)
            product_columns<T, Start::from>(rows, a.D, keys, ds, kBlock, k + key * ldk, ldk, dq, ldk);
          if (row == 0) {
            sum_over_queries<T, Start::zero>(keys, a.Dv, rows, p, go, dv + key * ldv, ldv);
            sum_over_queries<T, Start::zero>(keys, a.D, rows, ds, q, dk + key * ldk, ldk);
          } else {
            sum_over_queries<T, Start::from>(keys, a.Dv, rows, p, go, dv + key * ldv, ldv);
            sum_over_queries<T, Start::from>(keys, a.D, rows, ds, q, dk + key * ldk, ldk);
          }
          if (dbias) {
            for (int64_t r = 0; r < keys; ++r) {
              T* to = dbias + (key + r) * ldb + row;
              for (int64_t i = 0; i < rows; i += W<T>) {
                const vec<T> x = load<T>(ds + r * kBlock + i);
                store<T>(to + i, item == first ? x : x + load<T>(to + i));
              }
            }
          }
        }
        if (a.dquery_partial) continue;
        if (by_rows) {
          unpack_rows<T>(mdq, row, row + rows, a.D, dq, ldk, scales, 0);
          continue;
        }
        for (int64_t i = 0; i < rows; i += P)
          unpack_panel<T>(
              mdq, row + i, row + i + P < row + rows ? row + i + P : row + rows, a.D, dq + i * a.D, P, scales);
      }
      const auto mdk = lattice<S>(a, a.dkey, odk, g), mdv = lattice<S>(a, a.dvalue, odv, g);
      unpack_rows<T>(mdk, key_begin, key_end, a.D, dk + key_begin * ldk, ldk, scales, 0);
      unpack_rows<T>(mdv, key_begin, key_end, a.Dv, dv + key_begin * ldv, ldv, ones, 0);
    }
  }
}

// Over slice x head, where a slice is one (batch, group): with chunks there is no bias gradient.
template <class T, class S>
static void sum_dquery(const PatchAttention& a, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  const int64_t most = a.tokens(), size = a.padded() * a.D;
  arena.reset(Arena::bytes<int64_t>(most), a.poison);
  Offsets odq{arena.take<int64_t>(most)};
  T scales[P];
  for (T& x : scales) x = T(a.scale);
  for (int64_t i = begin; i < end; ++i) {
    const Group g(a, i / a.heads, i % a.heads);
    T* sum = static_cast<T*>(a.dquery_partial) + i * a.chunks * size;
    for (int64_t chunk = 1; chunk < a.chunks; ++chunk) {
      const T* other = sum + chunk * size;
      for (int64_t j = 0; j < size; ++j) sum[j] += other[j];
    }
    const auto mdq = lattice<S>(a, a.dquery, odq, g);
    for (int64_t n = 0; n < g.tokens; n += P)
      unpack_panel<T>(mdq, n, n + P < g.tokens ? n + P : g.tokens, a.D, sum + n * a.D, P, scales);
  }
}

// Over heads: the slices' parts, [key][query], summed in order into slice 0, which is then transposed into the gradient.
template <class T, class S>
static void sum_dbias(const PatchAttention& a, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  const int64_t N = a.tokens(), ld = a.padded(), size = N * ld;
  arena.reset(Arena::bytes<int64_t>(N), false);
  const int64_t* offset = row_offsets(N, N);
  T ones[P];
  for (T& x : ones) x = T(1);
  for (int64_t h = begin; h < end; ++h) {
    T* sum = static_cast<T*>(a.dbias_partial) + h * size;
    for (int64_t slice = 1; slice < a.slices; ++slice) {
      const T* other = sum + slice * a.heads * size;
      for (int64_t i = 0; i < size; i += W<T>) store<T>(sum + i, load<T>(sum + i) + load<T>(other + i));
    }
    // Queries as the tokens of a lattice, keys as its dims.
    const Lattice<S> m = {static_cast<S*>(a.dbias) + h * N * N, offset, 1, N};
    for (int64_t n = 0; n < N; n += P) unpack_panel<T>(m, n, n + P < N ? n + P : N, N, sum + n, ld, ones);
  }
}

}  // namespace

MVK_BY_DTYPE(PatchAttention, backward)
MVK_BY_DTYPE(PatchAttention, sum_dquery)
MVK_BY_DTYPE(PatchAttention, sum_dbias)

}  // namespace MVK_ISA
}  // namespace mvk
