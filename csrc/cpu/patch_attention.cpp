// Patch attention on CPUs: unfold + attention + fold for one (batch, group, head) at a time.
//
// Forward. A unit packs the group's keys transposed (scaled by scale * log2 e) and its values into scratch that stays in
// L1/L2, straight from the map, then goes over blocks of query rows: scores (register tiles of gemm.h), softmax over
// the block in L1 in base 2, product with the values, one store into the map. Each of q, k, v is read from memory once and
// out written once. Groups of more than kKeys tokens go over blocks of keys with a running maximum and sum.
//
// Backward. For each block of keys and of rows the probabilities are made again from the saved log-sum-exp; dV, dK (over
// the rows) and dQ (over the keys) are summed in scratch and stored once. No atomics: a bias gradient is
// summed per slice by one thread, then over slices in order.
#include "lattice.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kRows = 24;       // rows of scores at a time: 24 x 256 floats fill most of an L1
constexpr int64_t kKeys = 256;      // keys of a block, forward
constexpr int64_t kBackRows = 24;   // the backward holds P and dS: two blocks
constexpr int64_t kBackKeys = 128;

template <class T>
constexpr T kInfinity = std::is_same_v<T, float> ? T(__builtin_inff()) : T(__builtin_inf());

// The size of the parts when n is cut into the fewest parts of at most `most`, each but the last a multiple of `of`.
MVK_INLINE int64_t part(int64_t n, int64_t most, int64_t of) {
  int64_t parts = (n + most - 1) / most;
  return parts ? round_up((n + parts - 1) / parts, of) : of;
}

// S[r][c] = bias[row + r][col + c] * log2 e.
template <class T, class S>
static void fill_bias(
    const PatchAttention& a, int64_t h, int64_t row, int64_t rows, int64_t col, int64_t cols, T* s, int64_t lds) {
  const int64_t step = a.bias_stride[2];
  const vec<T> f = splat<T>(T(kLog2E));
  for (int64_t r = 0; r < rows; ++r, s += lds) {
    const S* p = static_cast<const S*>(a.bias) + h * a.bias_stride[0] + (row + r) * a.bias_stride[1] + col * step;
    int64_t c = 0;
    if (step == 1) {
      for (; c + W<T> <= cols; c += W<T>) store<T>(s + c, f * load<T>(p + c));
      if (c < cols) store<T>(s + c, f * load_partial<T>(p + c, int(cols - c)));
    } else {
      for (; c < cols; ++c) s[c] = T(kLog2E) * to_float(p[c * step]);
    }
  }
}

// One row of scores to probabilities relative to the running maximum; rescales what earlier blocks gave.
template <class T>
MVK_INLINE void softmax_row(T* s, int64_t cols, bool first, T* maximum_so_far, T* sum_so_far, T* o, int64_t out_cols) {
  store<T>(s + cols, splat<T>(-kInfinity<T>));  // the lanes past the last key; the row has room
  const int64_t end = round_up(cols, W<T>);
  vec<T> top = load<T>(s), top2 = top;
  int64_t c = W<T>;
  for (; c + W<T> < end; c += 2 * W<T>) {
    top = maximum<T>(top, load<T>(s + c));
    top2 = maximum<T>(top2, load<T>(s + c + W<T>));
  }
  if (c < end) top = maximum<T>(top, load<T>(s + c));
  T m = lane_max<T>(maximum<T>(top, top2));
  if (!first) m = m > *maximum_so_far ? m : *maximum_so_far;
  const vec<T> mv = splat<T>(m);
  vec<T> sum = {};
#pragma GCC unroll 2
  for (c = 0; c < end; c += W<T>) {
    vec<T> p = exp2_nonpositive(load<T>(s + c) - mv);
    store<T>(s + c, p);
    sum += p;
  }
  T total = lane_sum<T>(sum);
  if (!first) {
    const vec<T> alpha = exp2_nonpositive(splat<T>(*maximum_so_far) - mv);
    total += *sum_so_far * alpha[0];
    for (c = 0; c < out_cols; c += W<T>) store<T>(o + c, alpha * load<T>(o + c));
  }
  *maximum_so_far = m;
  *sum_so_far = total;
}

thread_local Arena arena;

template <class T, class S>
static void forward(const PatchAttention& a, int64_t begin, int64_t end) {
  const int64_t most = a.tokens(), P = kPanel<T>;
  const int64_t ldq = leading<T>(a.D), ldv = leading<T>(a.Dv);
  const int64_t widest = part(most, kKeys, P), lds = leading<T>(round_up(widest, P) + W<T>);
  const int64_t rows_most = round_up(kRows, W<T>);
  arena.reset(
      4 * Arena::bytes<int64_t>(most) + Arena::bytes<T>(round_up(most, P) * a.D) + Arena::bytes<T>(most * ldv) +
          Arena::bytes<T>(rows_most * ldq) + Arena::bytes<T>(rows_most * lds) + Arena::bytes<T>(rows_most * ldv),
      a.poison);
  Offsets oq{arena.take<int64_t>(most)}, ok{arena.take<int64_t>(most)};
  Offsets ov{arena.take<int64_t>(most)}, oo{arena.take<int64_t>(most)};
  T* kt = arena.take<T>(round_up(most, P) * a.D);
  T* v = arena.take<T>(most * ldv);
  T* q = arena.take<T>(rows_most * ldq);
  T* s = arena.take<T>(rows_most * lds);
  T* o = arena.take<T>(rows_most * ldv);
  T row_max[kRows], row_sum[kRows];

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit % a.chunks, h = unit / a.chunks % a.heads, slice = unit / a.chunks / a.heads;
    const int64_t g = slice % a.groups(), b = slice / a.groups();
    const int64_t y0 = g / a.groups_x(), x0 = g % a.groups_x();
    const int64_t wide = (a.W - x0 + a.pw - 1) / a.pw, N = (a.H - y0 + a.ph - 1) / a.ph * wide;
    const int64_t row_begin = N * chunk / a.chunks, row_end = N * (chunk + 1) / a.chunks;
    if (row_begin == row_end) continue;
    const auto mq = lattice<S>(a, a.query, oq, b, h, g), mo = lattice<S>(a, a.out, oo, b, h, g);
    pack_panels<T>(lattice<S>(a, a.key, ok, b, h, g), N, a.D, T(a.scale * kLog2E), kt);
    pack_rows<T>(lattice<S>(a, a.value, ov, b, h, g), 0, N, a.Dv, v, ldv);
    T* lse = static_cast<T*>(a.lse) + (b * a.heads + h) * a.H * a.W;

    const int64_t row_step = part(row_end - row_begin, kRows, 1), key_step = part(N, kKeys, P);
    for (int64_t row = row_begin; row < row_end; row += row_step) {
      const int64_t rows = row + row_step < row_end ? row_step : row_end - row;
      pack_rows<T>(mq, row, row + rows, a.D, q, ldq);
      for (int64_t key = 0; key < N; key += key_step) {
        const int64_t keys = key + key_step < N ? key_step : N - key;
        const T* panels = kt + key * a.D;
        if (a.bias) {
          fill_bias<T, S>(a, h, row, rows, key, keys, s, lds);
          gemm<T, true>(rows, keys, a.D, q, ldq, 1, panels, P, a.D * P, s, lds);
        } else {
          gemm<T, false>(rows, keys, a.D, q, ldq, 1, panels, P, a.D * P, s, lds);
        }
        for (int64_t r = 0; r < rows; ++r)
          softmax_row<T>(s + r * lds, keys, key == 0, row_max + r, row_sum + r, o + r * ldv, a.Dv);
        if (key == 0)
          gemm<T, false>(rows, a.Dv, keys, s, lds, 1, v, ldv, P, o, ldv);
        else
          gemm<T, true>(rows, a.Dv, keys, s, lds, 1, v + key * ldv, ldv, P, o, ldv);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const vec<T> f = splat<T>(T(1) / row_sum[r]);
        for (int64_t d = 0; d < a.Dv; d += W<T>) store<T>(o + r * ldv + d, f * load<T>(o + r * ldv + d));
        const int64_t n = row + r, y = y0 + n / wide * a.ph, x = x0 + n % wide * a.pw;
        lse[y * a.W + x] = T(kLn2) * row_max[r] + __builtin_log(row_sum[r]);
      }
      unpack_rows<T>(mo, row, row + rows, a.Dv, o, ldv, T(1));
    }
  }
}

template <class T, class S>
static void backward(const PatchAttention& a, int64_t begin, int64_t end) {
  const int64_t most = a.tokens(), P = kPanel<T>, padded = round_up(most, P), tall = round_up(most, W<T>);
  const int64_t ldq = leading<T>(a.D), ldv = leading<T>(a.Dv), ldp = leading<T>(kBackKeys + W<T>);
  arena.reset(
      8 * Arena::bytes<int64_t>(most) + Arena::bytes<T>(padded * a.D) + Arena::bytes<T>(padded * a.Dv) +
          4 * Arena::bytes<T>(tall * ldq) + 2 * Arena::bytes<T>(tall * ldv) + 2 * Arena::bytes<T>(tall) +
          2 * Arena::bytes<T>(kBackRows * ldp),
      a.poison);
  auto offsets = [&] { return Offsets{arena.take<int64_t>(most)}; };
  Offsets oq = offsets(), ok = offsets(), ov = offsets(), oo = offsets();
  Offsets og = offsets(), odq = offsets(), odk = offsets(), odv = offsets();
  T* kt = arena.take<T>(padded * a.D);
  T* vt = arena.take<T>(padded * a.Dv);
  T* k = arena.take<T>(tall * ldq);
  T* q = arena.take<T>(tall * ldq);
  T* dq_here = arena.take<T>(tall * ldq);
  T* dk = arena.take<T>(tall * ldq);
  T* dv = arena.take<T>(tall * ldv);
  T* go = arena.take<T>(tall * ldv);
  T* delta = arena.take<T>(tall);
  T* lse2 = arena.take<T>(tall);
  T* p = arena.take<T>(kBackRows * ldp);
  T* ds = arena.take<T>(kBackRows * ldp);

  const int64_t all = a.B * a.groups();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t chunk = unit % a.chunks, h = unit / a.chunks % a.heads, slice = unit / a.chunks / a.heads;
    T* dbias = nullptr;
    if (a.dbias_partial) dbias = static_cast<T*>(a.dbias_partial) + (slice * a.heads + h) * most * most;
    const int64_t first = all * slice / a.slices, last = all * (slice + 1) / a.slices;
    for (int64_t item = first; item < last; ++item) {
      const int64_t g = item % a.groups(), b = item / a.groups();
      const int64_t y0 = g / a.groups_x(), x0 = g % a.groups_x();
      const int64_t wide = (a.W - x0 + a.pw - 1) / a.pw, N = (a.H - y0 + a.ph - 1) / a.ph * wide;
      const int64_t panels = (N + P - 1) / P;
      const int64_t key_begin = panels * chunk / a.chunks * P;
      const int64_t key_end = chunk + 1 == a.chunks ? N : panels * (chunk + 1) / a.chunks * P;
      T* dq = a.dquery_partial ? static_cast<T*>(a.dquery_partial) + unit * most * ldq : dq_here;
      if (key_begin == key_end) {
        if (a.dquery_partial) memset(dq, 0, N * ldq * sizeof(T));
        continue;
      }
      const auto mk = lattice<S>(a, a.key, ok, b, h, g), mv = lattice<S>(a, a.value, ov, b, h, g);
      pack_panels<T>(mk, N, a.D, T(a.scale * kLog2E), kt);
      pack_panels<T>(mv, N, a.Dv, T(1), vt);
      pack_rows<T>(mk, 0, N, a.D, k, ldq);
      pack_rows<T>(lattice<S>(a, a.query, oq, b, h, g), 0, N, a.D, q, ldq);
      pack_rows<T>(lattice<S>(a, a.grad, og, b, h, g), 0, N, a.Dv, go, ldv);
      const int64_t row_step = part(N, kBackRows, 1), key_step = part(key_end - key_begin, kBackKeys, P);
      // delta = sum_j P dP over a whole row where one block of keys has it (as exact as softmax's own backward, also
      // for groups of a token or two), else from the output: sum_d dO O.
      const bool whole = key_end - key_begin == N && key_step >= N;
      if (!whole) pack_rows<T>(lattice<S>(a, a.out, oo, b, h, g), 0, N, a.Dv, dv, ldv);  // dv is free as yet
      const T* lse = static_cast<const T*>(a.lse) + (b * a.heads + h) * a.H * a.W;
      int64_t n = 0;
      for (int64_t y = y0; y < a.H; y += a.ph) {
        for (int64_t x = x0; x < a.W; x += a.pw, ++n) {
          lse2[n] = lse[y * a.W + x] * T(kLog2E);
          vec<T> sum = {};
          if (!whole)
            for (int64_t d = 0; d < a.Dv; d += W<T>) sum += load<T>(dv + n * ldv + d) * load<T>(go + n * ldv + d);
          delta[n] = lane_sum<T>(sum);
        }
      }

      for (int64_t key = key_begin; key < key_end; key += key_step) {
        const int64_t keys = key + key_step < key_end ? key_step : key_end - key, wide_keys = round_up(keys, W<T>);
        for (int64_t row = 0; row < N; row += row_step) {
          const int64_t rows = row + row_step < N ? row_step : N - row;
          if (a.bias) {
            fill_bias<T, S>(a, h, row, rows, key, keys, p, ldp);
            gemm<T, true>(rows, keys, a.D, q + row * ldq, ldq, 1, kt + key * a.D, P, a.D * P, p, ldp);
          } else {
            gemm<T, false>(rows, keys, a.D, q + row * ldq, ldq, 1, kt + key * a.D, P, a.D * P, p, ldp);
          }
          gemm<T, false>(rows, keys, a.Dv, go + row * ldv, ldv, 1, vt + key * a.Dv, P, a.Dv * P, ds, ldp);
          for (int64_t r = 0; r < rows; ++r) {
            T *pr = p + r * ldp, *dsr = ds + r * ldp;
            store<T>(pr + keys, splat<T>(-kInfinity<T>));  // lanes past the last key; the row has room
            const vec<T> l = splat<T>(lse2[row + r]);
            vec<T> sum = {}, dl = splat<T>(delta[row + r]);
#pragma GCC unroll 2
            for (int64_t c = 0; c < wide_keys; c += W<T>) {
              const vec<T> e = exp2_nonpositive(load<T>(pr + c) - l);
              store<T>(pr + c, e);
              sum += e * load<T>(dsr + c);
            }
            if (whole) dl = splat<T>(lane_sum<T>(sum));
#pragma GCC unroll 2
            for (int64_t c = 0; c < wide_keys; c += W<T>)
              store<T>(dsr + c, load<T>(pr + c) * (load<T>(dsr + c) - dl));
          }
          if (dbias) {
            for (int64_t r = 0; r < rows; ++r) {
              T* to = dbias + (row + r) * N + key;
              const T* from = ds + r * ldp;
              for (int64_t c = 0; c < keys; ++c) to[c] = item == first ? from[c] : to[c] + from[c];
            }
          }
          if (row == 0) {
            gemm<T, false>(keys, a.Dv, rows, p, 1, ldp, go, ldv, P, dv + key * ldv, ldv);
            gemm<T, false>(keys, a.D, rows, ds, 1, ldp, q, ldq, P, dk + key * ldq, ldq);
          } else {
            gemm<T, true>(keys, a.Dv, rows, p, 1, ldp, go + row * ldv, ldv, P, dv + key * ldv, ldv);
            gemm<T, true>(keys, a.D, rows, ds, 1, ldp, q + row * ldq, ldq, P, dk + key * ldq, ldq);
          }
          if (key == key_begin)
            gemm<T, false>(rows, a.D, keys, ds, ldp, 1, k + key * ldq, ldq, P, dq + row * ldq, ldq);
          else
            gemm<T, true>(rows, a.D, keys, ds, ldp, 1, k + key * ldq, ldq, P, dq + row * ldq, ldq);
        }
      }
      const T scale = T(a.scale);
      const auto mdk = lattice<S>(a, a.dkey, odk, b, h, g), mdv = lattice<S>(a, a.dvalue, odv, b, h, g);
      unpack_rows<T>(mdk, key_begin, key_end, a.D, dk + key_begin * ldq, ldq, scale);
      unpack_rows<T>(mdv, key_begin, key_end, a.Dv, dv + key_begin * ldv, ldv, T(1));
      if (!a.dquery_partial) unpack_rows<T>(lattice<S>(a, a.dquery, odq, b, h, g), 0, N, a.D, dq, ldq, scale);
    }
  }
}

// Over slice x head, where a slice is one (batch, group): with chunks there is no bias.
template <class T, class S>
static void sum_dquery(const PatchAttention& a, int64_t begin, int64_t end) {
  const int64_t most = a.tokens(), ldq = leading<T>(a.D);
  arena.reset(Arena::bytes<int64_t>(most), a.poison);
  Offsets odq{arena.take<int64_t>(most)};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t h = i % a.heads, slice = i / a.heads, g = slice % a.groups(), b = slice / a.groups();
    const int64_t y0 = g / a.groups_x(), x0 = g % a.groups_x();
    const int64_t N = ((a.H - y0 + a.ph - 1) / a.ph) * ((a.W - x0 + a.pw - 1) / a.pw);
    T* sum = static_cast<T*>(a.dquery_partial) + i * a.chunks * most * ldq;
    for (int64_t chunk = 1; chunk < a.chunks; ++chunk) {
      const T* other = sum + chunk * most * ldq;
      for (int64_t j = 0; j < N * ldq; ++j) sum[j] += other[j];
    }
    unpack_rows<T>(lattice<S>(a, a.dquery, odq, b, h, g), 0, N, a.D, sum, ldq, T(a.scale));
  }
}

template <class T, class S>
static void sum_dbias(const PatchAttention& a, int64_t begin, int64_t end) {
  const int64_t size = a.tokens() * a.tokens();
  for (int64_t i = begin * size; i < end * size; ++i) {
    const T* from = static_cast<const T*>(a.dbias_partial) + i;
    T sum = *from;
    for (int64_t slice = 1; slice < a.slices; ++slice) sum += from[slice * a.heads * size];
    from_float(sum, static_cast<S*>(a.dbias) + i);
  }
}

#define MVK_BY_DTYPE(name)                                                            \
  static void name##_by_dtype(const PatchAttention& a, int64_t begin, int64_t end) { \
    switch (a.dtype) {                                                                \
      case DType::f32: return name<float, float>(a, begin, end);                     \
      case DType::f64: return name<double, double>(a, begin, end);                   \
      case DType::f16: return name<float, half>(a, begin, end);                      \
      case DType::bf16: return name<float, bfloat>(a, begin, end);                   \
    }                                                                                 \
  }
MVK_BY_DTYPE(forward)
MVK_BY_DTYPE(backward)
MVK_BY_DTYPE(sum_dquery)
MVK_BY_DTYPE(sum_dbias)
#undef MVK_BY_DTYPE

}  // namespace

extern const PatchAttentionKernels patch_attention_kernels;
const PatchAttentionKernels patch_attention_kernels = {
    forward_by_dtype, backward_by_dtype, sum_dquery_by_dtype, sum_dbias_by_dtype};

}  // namespace MVK_ISA
}  // namespace mvk
