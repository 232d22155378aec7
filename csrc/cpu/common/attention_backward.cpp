// Attention inside groups of pixels on CPUs, backward, for one (batch, group, head) at a time.
//
// For each block of queries the probabilities of all keys are made again, and with them the sums that softmax's backward
// takes, in the same arithmetic: what is left of a row whose softmax is 1 somewhere is then 0, and not a rounding error times the
// size of the keys and queries. dQ^T is summed over keys in L1, dK and dV over queries in L2, and each is stored once: q, k, v,
// dout are read once. No atomics: a bias gradient is summed per slice by one thread, then over slices in order, and so are dK
// and dV where the queries of a group are split over threads.
#include "common/attention_shared.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr int64_t kBackKeys = 256;  // keys that a sum over keys takes in one chain
constexpr int64_t kSummed = 32;     // rows added in one chain, a longer one would be the largest error of all

// P of 2^(factor (S - top)) over its sum, and dS = P (dP - sum P dP), over `rows` rows of V vectors of all keys' scores, `ld`
// apart.
template <class T, int V>
MVK_APART void probabilities(T* p, T* ds, int64_t rows, int64_t ld, T factor, const T* top) {
  const vec<T> f = splat<T>(factor);
  vec<T> most[V], dl[V], sum[V] = {}, sum_dp[V] = {}, part_sum[V] = {}, part_dp[V] = {};
  for (int v = 0; v < V; ++v) most[v] = load<T>(top + v * W<T>);
  auto some = [&](auto count, int64_t r) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value;
    vec<T> e[R * V];
#pragma GCC unroll 4
    for (int u = 0; u < R * V; ++u) e[u] = (load<T>(p + (r + u / V) * ld + u % V * W<T>) - most[u % V]) * f;
    exp2_nonpositive<R * V>(e);
#pragma GCC unroll 4
    for (int u = 0; u < R * V; ++u) {
      const int64_t at = (r + u / V) * ld + u % V * W<T>;
      store<T>(p + at, e[u]);
      part_sum[u % V] += e[u], part_dp[u % V] += e[u] * load<T>(ds + at);
    }
  };
  constexpr int R = 4 / V;
  int64_t r = 0;
  while (r < rows) {
    const int64_t to = r + kSummed < rows ? r + kSummed : rows;
    for (; r + R <= to; r += R) some(std::integral_constant<int, R>{}, r);
    for (; r < to; ++r) some(std::integral_constant<int, 1>{}, r);
    for (int v = 0; v < V; ++v) {
      sum[v] += part_sum[v], sum_dp[v] += part_dp[v];
      part_sum[v] = part_dp[v] = vec<T>{};
    }
  }
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

// S^T (added to the bias, which is in p), dP^T, then P^T and dS^T of all keys for one panel of V vectors of queries; the
// blocks have kBlock columns.
template <class T, int V>
static void block_of_scores(
    const Attention& a, int64_t keys, const T* q, const T* go, const T* k, int64_t ldk, const T* v, int64_t ldv,
    T factor, T* p, T* ds, Ahead& ahead) {
  constexpr int64_t P = kPanel<T>;
  T top[P];
  for (T& x : top) x = -kInfinity<T>;
  product_in_parts<T>(V, keys, a.D, k, ldk, q, P, p, kBlock, {start_if(a.bias), nullptr, false, top}, ahead);
  product_in_parts<T>(V, keys, a.Dv, v, ldv, go, P, ds, kBlock, {});
  probabilities<T, V>(p, ds, keys, kBlock, factor, top);
}

// c[key][d] (+)= sum over queries of a[key][query] * b[query][d].
template <class T>
static void sum_over_queries(
    int64_t keys, int64_t dims, int64_t queries, const T* a, const T* b, T* c, int64_t ld, Start start) {
  for (int64_t d = 0; d < dims; d += kPanel<T>)
    product_rows<T>(dims - d > W<T> ? 2 : 1, keys, queries, a, kBlock, b + d, ld, c + d, ld, {start});
}

// offset[n] = n * stride, in the arena.
static int64_t* row_offsets(int64_t count, int64_t stride) {
  int64_t* offset = arena.take<int64_t>(count);
  for (int64_t n = 0; n < count; ++n) offset[n] = n * stride;
  return offset;
}

// dbias[place of a key][place of a query] (+)= ds, which has kBlock columns. What is stored past a row's last query does not reach the gradient.
template <class T>
static void add_to_dbias(
    const Attention& a, const Group& g, int64_t key, int64_t keys, int64_t row, int64_t rows, const T* ds, T* dbias,
    int64_t ldb, Start start) {
  const Places of_keys(a.key_x, g.keys), of_queries(a.x, g.queries);
  of_keys.runs(key, key + keys, [&](int64_t first, int64_t place, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const T* from = ds + (first + r - key) * kBlock;
      T* to = dbias + (place + r) * ldb;
      if (!a.clipped) {
        for (int64_t i = 0; i < rows; i += W<T>) {
          const vec<T> x = load<T>(from + i);
          store<T>(to + row + i, start == Start::zero ? x : x + load<T>(to + row + i));
        }
        continue;
      }
      of_queries.runs(row, row + rows, [&](int64_t query, int64_t at, int64_t some) {
        for (int64_t i = 0; i < some; ++i) to[at + i] += from[query - row + i];
      });
    }
  });
}

template <class T>
static void backward(const Attention& a, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  const int64_t tokens = a.tokens(), most = a.keys(), tall = round_up(most, W<T>);
  const int64_t ldk = leading<T>(a.D), ldv = leading<T>(a.Dv), ldb = a.padded(a.places());
  arena.reset(
      5 * Arena::bytes<int64_t>(tokens) + 4 * Arena::bytes<int64_t>(most) + 2 * Arena::bytes<T>(tall * ldk) +
          2 * Arena::bytes<T>(tall * ldv) + Arena::bytes<T>(tall_size<T>(most, a.D)) + Arena::bytes<T>(kBlock * a.D) +
          Arena::bytes<T>(kBlock * a.Dv) + 2 * Arena::bytes<T>(kBlock * ldk) + Arena::bytes<T>(kBlock * ldv) +
          2 * Arena::bytes<T>(most * kBlock),
      a.poison);
  auto offsets = [&](int64_t count) { return Offsets{arena.take<int64_t>(count)}; };
  Offsets oq = offsets(tokens), og = offsets(tokens), odq = offsets(tokens), ob = offsets(tokens);
  Offsets ok = offsets(most), ov = offsets(most), odk = offsets(most), odv = offsets(most);
  T* k = arena.take<T>(tall * ldk);
  T* v = arena.take<T>(tall * ldv);
  T* dk_here = arena.take<T>(tall * ldk);
  T* dv_here = arena.take<T>(tall * ldv);
  T* k_tall = arena.take<T>(tall_size<T>(most, a.D));
  T* q_panel = arena.take<T>(kBlock * a.D);
  T* go_panel = arena.take<T>(kBlock * a.Dv);
  T* dq = arena.take<T>(kBlock * ldk);
  T* q = arena.take<T>(kBlock * ldk);
  T* go = arena.take<T>(kBlock * ldv);
  T* p = arena.take<T>(most * kBlock);
  T* ds = arena.take<T>(most * kBlock);
  T scales[kBlock], ones[kBlock];
  for (T& x : scales) x = T(a.scale);
  for (T& x : ones) x = T(1);
  const Tiles k_tiles(a.D, kTileRows);
  const Factor factor(a.scale, a.bias);

  int64_t* dbias_rows = row_offsets(tokens, a.key_places());
  const int64_t all = a.B * a.groups();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit % a.chunks, h = unit / a.chunks % a.heads, slice = unit / a.chunks / a.heads;
    T* dbias = nullptr;
    if (a.dbias_partial) dbias = static_cast<T*>(a.dbias_partial) + (slice * a.heads + h) * a.key_places() * ldb;
    if (dbias && a.clipped) memset(dbias, 0, a.key_places() * ldb * sizeof(T));
    const int64_t first = all * slice / a.slices, last = all * (slice + 1) / a.slices;
    for (int64_t item = first; item < last; ++item) {
      const Group g(a, item, h);
      const int64_t N = g.keys.count, key_step = part(N, kBackKeys);
      int64_t row_begin, row_end;
      rows_of_chunk(a, g.queries.count, chunk, row_begin, row_end);
      T *dk = dk_here, *dv = dv_here;
      if (a.partial) dk = static_cast<T*>(a.partial) + unit * a.partial_size(), dv = dk + tall * ldk;
      const auto mq = of_queries(a, a.query, oq, g), mg = of_queries(a, a.grad, og, g);
      const auto mdq = of_queries(a, a.dquery, odq, g);
      const auto mk = of_keys(a, a.key, ok, g), mv = of_keys(a, a.value, ov, g);
      const Bias bias(a, g, ob);
      const bool within = item + 1 < last;
      const Group after(
          a, within ? item + 1 : all * ((unit + 1) / a.heads) / a.slices, within ? h : (unit + 1) % a.heads);
      Ahead ahead(g, a.chunks == 1 && (within || unit + 1 < end) ? &after : nullptr, P);
      ahead.add(a, a.query, after, after.queries, mq.offset, a.D);
      ahead.add(a, a.key, after, after.keys, mk.offset, a.D);
      ahead.add(a, a.value, after, after.keys, mv.offset, a.Dv);
      ahead.add(a, a.grad, after, after.queries, mg.offset, a.Dv);
      pack_rows<T>(mk, 0, N, a.D, k, ldk);
      pack_rows<T>(mv, 0, N, a.Dv, v, ldv);
      const bool by_rows = rows_are_cheaper<T>(g.queries.count, N, a.D, mdq.d == 1);
      if (!by_rows) pack_tall<T>(k, ldk, N, k_tiles, k_tall);

      for (int64_t row = row_begin; row < row_end; row += kBlock) {
        const int64_t rows = row + kBlock < row_end ? kBlock : row_end - row;
        pack_rows<T>(mq, row, row + rows, a.D, q, ldk);
        pack_rows<T>(mg, row, row + rows, a.Dv, go, ldv);
        for (int64_t i = 0; i < rows; i += P) {
          const int64_t stop = i + P < rows ? i + P : rows;
          pack_panel<T>(mq, row + i, row + stop, a.D, T(factor.queries), q_panel + i * a.D, P);
          pack_panel<T>(mg, row + i, row + stop, a.Dv, T(1), go_panel + i * a.Dv, P);
          if (a.bias) bias.transposed<T>(row + i, row + stop, 0, N, p + i, kBlock);
          auto scores = rows - i > W<T> ? block_of_scores<T, 2> : block_of_scores<T, 1>;
          scores(a, N, q_panel + i * a.D, go_panel + i * a.Dv, k, ldk, v, ldv, T(factor.scores), p + i, ds + i, ahead);
          if (a.dbias && !a.dbias_partial) {
            const Lattice to = {Elements(a.dbias, a.bias_dtype) + h * g.queries.count * N, dbias_rows, 1, N};
            unpack_panel<T>(to, row + i, row + stop, N, ds + i, kBlock, ones);
          }
        }
        for (int64_t key = 0; key < N; key += key_step) {
          const int64_t keys = key + key_step < N ? key_step : N - key;
          const T *pk = p + key * kBlock, *dsk = ds + key * kBlock;
          const Start of_keys = start_if(key > 0), of_queries = start_if(row > row_begin);
          for (int64_t i = 0; !by_rows && i < rows; i += P) {
            product_tall<T>(
                rows - i > W<T> ? 2 : 1, k_tiles, N, key, key + keys, k_tall, dsk + i, kBlock, dq + i * a.D, P,
                {of_keys});
          }
          if (by_rows) product_columns<T>(rows, a.D, keys, dsk, kBlock, k + key * ldk, ldk, dq, ldk, {of_keys});
          sum_over_queries<T>(keys, a.Dv, rows, pk, go, dv + key * ldv, ldv, of_queries);
          sum_over_queries<T>(keys, a.D, rows, dsk, q, dk + key * ldk, ldk, of_queries);
          if (dbias) add_to_dbias<T>(a, g, key, keys, row, rows, dsk, dbias, ldb, start_if(a.clipped || item > first));
        }
        if (by_rows) {
          unpack_rows<T>(mdq, row, row + rows, a.D, dq, ldk, scales, 0);
          continue;
        }
        for (int64_t i = 0; i < rows; i += P)
          unpack_panel<T>(
              mdq, row + i, row + i + P < row + rows ? row + i + P : row + rows, a.D, dq + i * a.D, P, scales);
      }
      if (a.partial) {
        if (row_begin == row_end) memset(dk, 0, tall * (ldk + ldv) * sizeof(T));
        continue;
      }
      const auto mdk = of_keys(a, a.dkey, odk, g), mdv = of_keys(a, a.dvalue, odv, g);
      unpack_rows<T>(mdk, 0, N, a.D, dk, ldk, scales, 0);
      unpack_rows<T>(mdv, 0, N, a.Dv, dv, ldv, ones, 0);
    }
  }
}

// Over slice x head, where a slice is one (batch, group): with chunks there is no bias gradient.
template <class T>
static void sum_dkeys(const Attention& a, int64_t begin, int64_t end) {
  const int64_t most = a.keys(), tall = round_up(most, W<T>), ldk = leading<T>(a.D), ldv = leading<T>(a.Dv);
  arena.reset(2 * Arena::bytes<int64_t>(most), a.poison);
  Offsets odk{arena.take<int64_t>(most)}, odv{arena.take<int64_t>(most)};
  const T scale(a.scale), one(1);
  for (int64_t i = begin; i < end; ++i) {
    const Group g(a, i / a.heads, i % a.heads);
    T *dk = static_cast<T*>(a.partial) + i * a.chunks * a.partial_size(), *dv = dk + tall * ldk;
    for (int64_t chunk = 1; chunk < a.chunks; ++chunk) {
      const T *other_k = dk + chunk * a.partial_size(), *other_v = other_k + tall * ldk;
      for (int64_t j = 0; j < g.keys.count * ldk; j += W<T>) store<T>(dk + j, load<T>(dk + j) + load<T>(other_k + j));
      for (int64_t j = 0; j < g.keys.count * ldv; j += W<T>) store<T>(dv + j, load<T>(dv + j) + load<T>(other_v + j));
    }
    unpack_rows<T>(of_keys(a, a.dkey, odk, g), 0, g.keys.count, a.D, dk, ldk, &scale, 0);
    unpack_rows<T>(of_keys(a, a.dvalue, odv, g), 0, g.keys.count, a.Dv, dv, ldv, &one, 0);
  }
}

// Over heads: the slices' parts, [key][query], summed in order into slice 0, which is then transposed into the gradient.
template <class T>
static void sum_dbias(const Attention& a, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  const int64_t N = a.places(), M = a.key_places(), ld = a.padded(N), size = M * ld;
  arena.reset(Arena::bytes<int64_t>(N), false);
  const int64_t* offset = row_offsets(N, M);
  T ones[P];
  for (T& x : ones) x = T(1);
  for (int64_t h = begin; h < end; ++h) {
    T* sum = static_cast<T*>(a.dbias_partial) + h * size;
    for (int64_t slice = 1; slice < a.slices; ++slice) {
      const T* other = sum + slice * a.heads * size;
      for (int64_t i = 0; i < size; i += W<T>) store<T>(sum + i, load<T>(sum + i) + load<T>(other + i));
    }
    // Queries as the tokens of a lattice, keys as its dims.
    const Lattice m = {Elements(a.dbias, a.bias_dtype) + h * N * M, offset, 1, M};
    for (int64_t n = 0; n < N; n += P) unpack_panel<T>(m, n, n + P < N ? n + P : N, M, sum + n, ld, ones);
  }
}

}  // namespace

void backward_by_dtype(const Attention& a, int64_t begin, int64_t end) {
  by_dtype<backward<float>, backward<double>>(a, begin, end);
}
void sum_dkeys_by_dtype(const Attention& a, int64_t begin, int64_t end) {
  by_dtype<sum_dkeys<float>, sum_dkeys<double>>(a, begin, end);
}
void sum_dbias_by_dtype(const Attention& a, int64_t begin, int64_t end) {
  by_dtype<sum_dbias<float>, sum_dbias<double>>(a, begin, end);
}

}  // namespace MVK_ISA
}  // namespace mvk
