// Vectors of the instruction set that this translation unit is compiled for.
//
// GCC and Clang vector extensions, so that one source serves SSE2, AVX2, AVX-512 and NEON; intrinsics only
// where the extensions have no word (partial loads and stores, half conversion). Everything lives in a
// namespace named after the instruction set: an inline function outside of one would be merged by the linker, and the
// AVX-512 copy might be the one kept.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef MVK_ISA
#define MVK_ISA baseline
#endif

#define MVK_INLINE static inline __attribute__((always_inline))
// A function of its own, called for many vectors at a time, so that a profile shows what it takes.
#define MVK_APART static __attribute__((noinline))

namespace mvk {
namespace MVK_ISA {

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd {
  static constexpr int width = kVectorBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using vec = typename Simd<T>::type;
template <class T>
constexpr int W = Simd<T>::width;

namespace {

template <class T, size_t... I>
MVK_INLINE vec<T> splat_lanes(T x, std::index_sequence<I...>) {
  return vec<T>{((void)I, x)...};
}
template <class T>
MVK_INLINE vec<T> splat(T x) {
  return splat_lanes<T>(x, std::make_index_sequence<W<T>>{});
}

// b where either is NaN, as maxps; compilers do not make one instruction of the comparison.
template <class T>
MVK_INLINE vec<T> maximum(vec<T> a, vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm_max_ps((__m128)a, (__m128)b);
#endif
  return a > b ? a : b;
}

// As minps in the same way.
template <class T>
MVK_INLINE vec<T> minimum(vec<T> a, vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) return (vec<T>)_mm_min_ps((__m128)a, (__m128)b);
#endif
  return a < b ? a : b;
}

template <class T>
MVK_INLINE vec<T> relu(vec<T> x) {
  return maximum<T>(vec<T>{}, x);  // NaN stays
}

template <class T>
MVK_INLINE vec<T> finite_or_zero(vec<T> x) {
  return x - x == vec<T>{} ? x : vec<T>{};
}

// ---- halves, one at a time and by the vector ----

MVK_INLINE float to_float(bfloat x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

MVK_INLINE float to_float(half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place and rescale by 2^112; this is right for subnormals too.
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float magnitude;
  if ((x.bits & 0x7c00) == 0x7c00) {
    bits |= 0x7f800000u;
    memcpy(&magnitude, &bits, 4);
  } else {
    memcpy(&magnitude, &bits, 4);
    magnitude *= 0x1p112f;
  }
  uint32_t out;
  memcpy(&out, &magnitude, 4);
  out |= sign;
  memcpy(&magnitude, &out, 4);
  return magnitude;
#endif
}
MVK_INLINE float to_float(float x) { return x; }
MVK_INLINE double to_float(double x) { return x; }

MVK_INLINE void from_float(float x, bfloat* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = uint16_t((bits >> 16) | 0x40);  // stays a NaN
    return;
  }
  out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

MVK_INLINE void from_float(float x, half* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(x, 0));
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    out->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    float value, shifted;
    memcpy(&value, &magnitude, 4);
    shifted = value + 0.5f;
    uint32_t shifted_bits;
    memcpy(&shifted_bits, &shifted, 4);
    out->bits = uint16_t(sign | (shifted_bits - 0x3f000000u));
  } else {
    magnitude += 0xc8000fffu + ((magnitude >> 13) & 1);
    out->bits = uint16_t(sign | (magnitude >> 13));
  }
#endif
}
MVK_INLINE void from_float(float x, float* out) { *out = x; }
MVK_INLINE void from_float(double x, double* out) { *out = x; }

// ---- loads and stores: T is the type computed in, S the type in memory ----

template <class T, class S>
MVK_INLINE vec<T> load(const S* p) {
  if constexpr (std::is_same_v<T, S>) {
    return *reinterpret_cast<const typename Simd<T>::unaligned*>(p);
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, half>) {
      return (vec<T>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
    } else {
      return (vec<T>)_mm512_maskz_slli_epi32(
          0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p)), 16);
    }
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<S, half>) {
      return (vec<T>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    } else {
      return (vec<T>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
    }
#else
    vec<T> out;
    for (int i = 0; i < W<T>; ++i) out[i] = to_float(p[i]);
    return out;
#endif
  }
}

template <class T>
MVK_INLINE void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Simd<T>::unaligned*>(p) = v;
}
template <class T, class S>
MVK_INLINE void store_as(S* p, vec<T> v) {
  if constexpr (std::is_same_v<T, S>) {
    store<T>(p, v);
  } else {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, half>) {
      _mm256_storeu_si256(
          (__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      return;
    }
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<S, half>) {
      _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      return;
    }
#endif
    for (int i = 0; i < W<T>; ++i) from_float(v[i], p + i);
  }
}

// Whether some lanes of S in memory are one instruction.
template <class S>
#if defined(__AVX512F__)
constexpr bool kLanesAtOnce = true;
#elif defined(__AVX2__)
constexpr bool kLanesAtOnce = std::is_same_v<S, float>;
#else
constexpr bool kLanesAtOnce = false;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
MVK_INLINE __m256i lanes_mask(int first, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(
      _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes), _mm256_cmpgt_epi32(_mm256_set1_epi32(first + count), lanes));
}
#endif

// v with p[0], ..., p[count - 1] in the lanes from `first` on; no other memory is touched.
template <class T, class S>
MVK_INLINE vec<T> load_lanes(vec<T> v, const S* p, int first, int count) {
#if defined(__AVX512F__)
  const auto mask = __mmask16(((1u << count) - 1) << first);
  if constexpr (std::is_same_v<S, float>) return (vec<T>)_mm512_mask_loadu_ps((__m512)v, mask, p - first);
  if constexpr (std::is_same_v<S, double>) return (vec<T>)_mm512_mask_loadu_pd((__m512d)v, __mmask8(mask), p - first);
  if constexpr (sizeof(S) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, p - first);
    if constexpr (std::is_same_v<S, half>) return (vec<T>)_mm512_mask_cvtph_ps((__m512)v, mask, bits);
    return (vec<T>)_mm512_mask_slli_epi32((__m512i)v, mask, _mm512_maskz_cvtepu16_epi32(mask, bits), 16);
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<S, float>) {
    const __m256i mask = lanes_mask(first, count);
    return (vec<T>)_mm256_blendv_ps((__m256)v, _mm256_maskload_ps(p - first, mask), (__m256)mask);
  }
#endif
  for (int i = 0; i < W<T>; ++i) {
    if (i >= first && i < first + count) v[i] = to_float(p[i - first]);
  }
  return v;
}

// The lanes of v from `first` on into p[0], ..., p[count - 1].
template <class T, class S>
MVK_INLINE void store_lanes(S* p, vec<T> v, int first, int count) {
#if defined(__AVX512F__)
  const auto mask = __mmask16(((1u << count) - 1) << first);
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p - first, mask, (__m512)v);
  if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(p - first, __mmask8(mask), (__m512d)v);
  if constexpr (sizeof(S) == 2) {
    S lanes[W<T>];
    store_as<T>(lanes, v);
    return _mm256_mask_storeu_epi16(p - first, mask, _mm256_loadu_si256((const __m256i*)lanes));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<S, float>) return _mm256_maskstore_ps(p - first, lanes_mask(first, count), (__m256)v);
#endif
  for (int i = 0; i < W<T>; ++i) {
    if (i >= first && i < first + count) from_float(v[i], p + (i - first));
  }
}

// The first n <= W lanes; the others are 0.
template <class T, class S>
MVK_INLINE vec<T> load_partial(const S* p, int n) {
  return load_lanes<T>(vec<T>{}, p, 0, n);
}
template <class T, class S>
MVK_INLINE void store_partial(S* p, vec<T> v, int n) {
  store_lanes<T>(p, v, 0, n);
}

// ---- arithmetic across lanes ----

template <class T>
MVK_INLINE T lane_sum(vec<T> v) {
#if defined(__SSE2__)
  // By halves as below, but in registers.
  if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
    const __m256 half =
        _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0) + _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
    __m128 sum = _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
#elif defined(__AVX2__)
    __m128 sum = _mm256_castps256_ps128((__m256)v) + _mm256_extractf128_ps((__m256)v, 1);
#else
    __m128 sum = (__m128)v;
#endif
    sum += _mm_movehl_ps(sum, sum);
    return sum[0] + sum[1];
  }
#endif
  T out[W<T>];
  store<T>(out, v);
  for (int step = W<T> / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) out[i] += out[i + step];
  return out[0];
}
template <class T>
MVK_INLINE T lane_max(vec<T> v) {
  T out[W<T>];
  store<T>(out, v);
  for (int step = W<T> / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) out[i] = out[i] > out[i + step] ? out[i] : out[i + step];
  return out[0];
}

// Unrolled, since at -O2 a loop over few vectors is left a loop, and the vectors go through memory.
#define MVK_EACH _Pragma("GCC unroll 8") for (int u = 0; u < U; ++u)

// x[i] = 2^x[i] for x <= 0 (and a little above), to 1e-7 relative. Below 2^-126.5 exactly 0, as masked scores need;
// NaN stays NaN. Round x to n by adding 1.5 * 2^23, which leaves n + 127 in the low bits: shifted by 23 they
// are the float 2^n. The polynomial is the minimax of degree 6 for 2^f on [-1/2, 1/2]. Several vectors go in step, since
// one chain of these operations fills the scheduler long before it fills the arithmetic units.
template <int U>
MVK_INLINE void exp2_nonpositive(vec<float>* x) {
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  const vec<float> magic = splat(12582912.0f + 127.0f);
  vec<float> n[U], p[U];
  MVK_EACH x[u] = maximum<float>(splat(-127.0f), x[u]);
  MVK_EACH n[u] = x[u] + magic;
  MVK_EACH x[u] -= n[u] - magic;
  MVK_EACH p[u] = splat(1.53458120e-04f) * x[u] + splat(1.33999312e-03f);
  MVK_EACH p[u] = p[u] * x[u] + splat(9.61848896e-03f);
  MVK_EACH p[u] = p[u] * x[u] + splat(5.55032878e-02f);
  MVK_EACH p[u] = p[u] * x[u] + splat(2.40226469e-01f);
  MVK_EACH p[u] = p[u] * x[u] + splat(6.93147206e-01f);
  MVK_EACH p[u] = p[u] * x[u] + splat(1.0f);
  MVK_EACH x[u] = p[u] * (vec<float>)((ints)n[u] << 23);
}
template <int U>
MVK_INLINE void exp2_nonpositive(vec<double>* x) {
  for (int u = 0; u < U; ++u)
    for (int i = 0; i < W<double>; ++i) x[u][i] = __builtin_exp2(x[u][i]);
}

// x[i] = 2^x[i] for any x, to 2e-7 relative, what is past the ends of the exponents 0 or infinity. The polynomials are the minimax
// of degree 5: AVX-512, which scales by a power of 2 and knows the ends, takes 2^f on [0, 1), the others on [-1/2, 1/2].
template <int U>
MVK_INLINE void exp2_any(vec<float>* x) {
  vec<float> p[U], f[U];
#if defined(__AVX512F__)
  MVK_EACH f[u] = (vec<float>)_mm512_maskz_reduce_ps(0xffff, (__m512)x[u], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  MVK_EACH p[u] = splat(1.87757667e-03f) * f[u] + splat(8.98934009e-03f);
  MVK_EACH p[u] = p[u] * f[u] + splat(5.58263181e-02f);
  MVK_EACH p[u] = p[u] * f[u] + splat(2.40153617e-01f);
  MVK_EACH p[u] = p[u] * f[u] + splat(6.93153073e-01f);
  MVK_EACH p[u] = p[u] * f[u] + splat(9.99999925e-01f);
  MVK_EACH x[u] = (vec<float>)_mm512_maskz_scalef_ps(0xffff, (__m512)p[u], (__m512)x[u]);
#else
  typedef int32_t ints __attribute__((vector_size(kVectorBytes)));
  const vec<float> magic = splat(12582912.0f + 127.0f);
  vec<float> n[U];
  MVK_EACH x[u] = minimum<float>(splat(128.0f), maximum<float>(splat(-127.0f), x[u]));
  MVK_EACH n[u] = x[u] + magic;
  MVK_EACH f[u] = x[u] - (n[u] - magic);
  MVK_EACH p[u] = splat(1.32764720e-03f) * f[u] + splat(9.67554133e-03f);
  MVK_EACH p[u] = p[u] * f[u] + splat(5.55071327e-02f);
  MVK_EACH p[u] = p[u] * f[u] + splat(2.40221197e-01f);
  MVK_EACH p[u] = p[u] * f[u] + splat(6.93146967e-01f);
  MVK_EACH p[u] = p[u] * f[u] + splat(1.00000007f);
  MVK_EACH x[u] = p[u] * (vec<float>)((ints)n[u] << 23);
#endif
}
}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
