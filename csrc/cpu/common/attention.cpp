// Attention inside groups of pixels on CPUs, forward, for one (batch, group, head) at a time, straight from and into the maps.
//
// A unit packs the group's keys and values into scratch that stays in L1/L2; then, for each panel of two vectors of
// queries: scores S^T = K Q^T in register tiles that also find the maximum, exponentials in base 2 in L1, O = P V (small
// groups) or O^T = V^T P^T in register tiles, one store into the map. q, k, v are read and out is written once. More
// than kKeys keys are taken in blocks with a running maximum and sum.
#include "common/attention_shared.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Keys of a block in the forward: its scores fill half of an L1.
template <class T>
constexpr int64_t kKeys = 16384 / (kPanel<T> * int64_t(sizeof(T)));

// P = 2^(factor (S - top)) in place over `rows` rows of V vectors; adds to the sums of each lane, 32 rows at a time, since one long
// chain of additions would be the largest error of all.
template <class T, int V>
MVK_APART void exponentials(T* s, int64_t rows, T factor, const T* top, T* sums) {
  const vec<T> f = splat<T>(factor);
  vec<T> m[V], sum[V];
  for (int v = 0; v < V; ++v) m[v] = load<T>(top + v * W<T>);
  auto some = [&](auto count) __attribute__((always_inline)) {
    constexpr int n = decltype(count)::value * V;
    vec<T> p[n];
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) p[u] = (load<T>(s + u * W<T>) - m[u % V]) * f;
    exp2_nonpositive<n>(p);
#pragma GCC unroll 4
    for (int u = 0; u < n; ++u) {
      store<T>(s + u * W<T>, p[u]);
      sum[u % V] += p[u];
    }
    s += n * W<T>;
  };
  constexpr int R = 4 / V;
  for (int64_t from = 0; from < rows; from += 32) {
    const int64_t to = from + 32 < rows ? from + 32 : rows;
    for (int v = 0; v < V; ++v) sum[v] = vec<T>{};
    int64_t r = from;
    for (; r + R <= to; r += R) some(std::integral_constant<int, R>{});
    for (; r < to; ++r) some(std::integral_constant<int, 1>{});
    for (int v = 0; v < V; ++v) store<T>(sums + v * W<T>, load<T>(sums + v * W<T>) + sum[v]);
  }
}

// Attention of one panel of V vectors of queries over all keys: O^T (O if v_rows), not yet divided, and the lanes' sums.
// v is in tall panels; v_rows has rows of ldv, as O then.
template <class T, int V>
static void attend(
    const Attention& a, int64_t N, const T* q, const T* k, int64_t ldk, const T* v, const Tiles& v_tiles,
    const T* v_rows, int64_t ldv, const Bias& bias, int64_t row, int64_t stop, T factor, T* s, T* o, T* sums,
    Ahead& ahead) {
  constexpr int64_t L = V * W<T>;
  T top[L], shift[L];  // the highest score, and what the scores were taken less
  for (int i = 0; i < L; ++i) top[i] = -kInfinity<T>, shift[i] = 0, sums[i] = 0;
  const int64_t step = part(N, kKeys<T>);
  for (int64_t key = 0; key < N; key += step) {
    const int64_t keys = key + step < N ? step : N - key;
    const bool biased = bias.scores.data.data;
    if (biased) bias.transposed<T>(row, stop, key, keys, s, L);
    product_in_parts<T>(V, keys, a.D, k + key * ldk, ldk, q, L, s, L, {start_if(biased), nullptr, false, top}, ahead);
    // A lane with nothing but -inf so far is shifted by 0: its terms are 0 then, not NaN.
    T before[L];
    memcpy(before, shift, sizeof before);
    for (int i = 0; i < L; ++i) shift[i] = top[i] == -kInfinity<T> ? T(0) : top[i];
    if (key) {
      vec<T> alpha[V];
      for (int i = 0; i < V; ++i)
        alpha[i] = (load<T>(before + i * W<T>) - load<T>(shift + i * W<T>)) * splat<T>(factor);
      exp2_nonpositive<V>(alpha);
      for (int i = 0; i < V; ++i) store<T>(sums + i * W<T>, alpha[i] * load<T>(sums + i * W<T>));
      for (int64_t d = 0; d < a.Dv; ++d)
        for (int i = 0; i < V; ++i) store<T>(o + d * L + i * W<T>, alpha[i] * load<T>(o + d * L + i * W<T>));
    }
    exponentials<T, V>(s, keys, factor, shift, sums);
    for (int i = 0; i < L; ++i) shift[i] = top[i] == -kInfinity<T> ? top[i] : shift[i];
    if (v_rows)
      product_columns<T>(stop - row, a.Dv, keys, s, L, v_rows, ldv, o, ldv, {});
    else
      product_tall<T>(V, v_tiles, N, key, key + keys, v, s, L, o, L, {start_if(key > 0)});
  }
}

template <class T>
static void forward(const Attention& a, int64_t begin, int64_t end) {
  constexpr int64_t P = kPanel<T>;
  const int64_t tokens = a.tokens(), most = a.keys(), ldk = leading<T>(a.D), ldv = leading<T>(a.Dv),
                keys_most = most < kKeys<T> ? most : kKeys<T>;
  arena.reset(
      3 * Arena::bytes<int64_t>(tokens) + 2 * Arena::bytes<int64_t>(most) +
          Arena::bytes<T>(round_up(most, W<T>) * ldk) + Arena::bytes<T>(round_up(most, W<T>) * ldv) +
          Arena::bytes<T>(tall_size<T>(most, a.Dv)) + Arena::bytes<T>(a.D * P) + Arena::bytes<T>(keys_most * P) +
          Arena::bytes<T>(ldv * P),
      a.poison);
  auto offsets = [&](int64_t count) { return Offsets{arena.take<int64_t>(count)}; };
  Offsets oq = offsets(tokens), oo = offsets(tokens), ob = offsets(tokens), ok = offsets(most), ov = offsets(most);
  T* k = arena.take<T>(round_up(most, W<T>) * ldk);
  T* v_rows = arena.take<T>(round_up(most, W<T>) * ldv);
  T* v = arena.take<T>(tall_size<T>(most, a.Dv));
  T* q = arena.take<T>(a.D * P);
  T* s = arena.take<T>(keys_most * P);
  T* o = arena.take<T>(ldv * P);
  T sums[P];
  const Tiles v_tiles(a.Dv, kTileRows);
  const Factor factor(a.scale, a.bias);

  Walk after(a, begin);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = after.chunk;
    const Group g = after.group;
    after.step();
    const int64_t N = g.keys.count;
    int64_t row_begin, row_end;
    rows_of_chunk(a, g.queries.count, chunk, row_begin, row_end);
    if (row_begin == row_end) continue;
    const auto mq = of_queries(a, a.query, oq, g), mo = of_queries(a, a.out, oo, g);
    const auto mk = of_keys(a, a.key, ok, g), mv = of_keys(a, a.value, ov, g);
    const Bias bias(a, g, ob);
    Ahead ahead(g, unit + 1 < end && a.chunks == 1 ? &after.group : nullptr, P);
    ahead.add(a, a.query, after.group, after.group.queries, mq.offset, a.D);
    ahead.add(a, a.key, after.group, after.group.keys, mk.offset, a.D);
    ahead.add(a, a.value, after.group, after.group.keys, mv.offset, a.Dv);
    ahead.add(a, a.out, after.group, after.group.queries, mo.offset, a.Dv);
    pack_rows<T>(mk, 0, N, a.D, k, ldk);
    pack_rows<T>(mv, 0, N, a.Dv, v_rows, ldv);
    const bool by_rows = N <= kKeys<T> && rows_are_cheaper<T>(g.queries.count, N, a.Dv, mo.d == 1);
    if (!by_rows) pack_tall<T>(v_rows, ldv, N, v_tiles, v);

    for (int64_t row = row_begin; row < row_end; row += P) {
      const int64_t stop = row + P < row_end ? row + P : row_end;
      const int64_t L = stop - row > W<T> ? P : W<T>;
      pack_panel<T>(mq, row, stop, a.D, T(factor.queries), q, L);
      auto panel = L == P ? attend<T, 2> : attend<T, 1>;
      panel(
          a, N, q, k, ldk, v, v_tiles, by_rows ? v_rows : nullptr, ldv, bias, row, stop, T(factor.scores), s, o, sums,
          ahead);
      for (int64_t i = 0; i < L; ++i) sums[i] = T(1) / sums[i];
      if (by_rows)
        unpack_rows<T>(mo, row, stop, a.Dv, o, ldv, sums, 1);
      else
        unpack_panel<T>(mo, row, stop, a.Dv, o, L, sums);
    }
  }
}

}  // namespace

void backward_by_dtype(const Attention&, int64_t, int64_t);
void sum_dkeys_by_dtype(const Attention&, int64_t, int64_t);
void sum_dbias_by_dtype(const Attention&, int64_t, int64_t);
extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    by_dtype<forward<float>, forward<double>>, backward_by_dtype, sum_dkeys_by_dtype, sum_dbias_by_dtype};

}  // namespace MVK_ISA
}  // namespace mvk
