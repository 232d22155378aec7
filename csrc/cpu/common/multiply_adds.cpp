// Multiply-adds in registers and nothing else, and exponentials alone: the most that a kernel of this instruction set can do.
#include "common/multiply_adds.h"

#include <utility>

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// Enough independent chains for the latency of two pipes, or on NEON of four; with the two constants they fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr size_t kChains = 24;
#else
constexpr size_t kChains = 12;
#endif

template <class T, size_t... I>
double mean_of(int64_t rounds, double factor, double addend, std::index_sequence<I...>) {
  const vec<T> f = splat(T(factor)), a = splat(T(addend));
  // All different: of chains that start alike a compiler may compute one.
  vec<T> x[kChains] = {splat(T(I))...};
  for (int64_t round = 0; round < rounds; ++round) ((x[I] = x[I] * f + a), ...);
  return (double(lane_sum<T>(x[I])) + ...) / double(kChains * W<T>);
}

template <class T>
double mean(int64_t rounds, double factor, double addend) {
  return mean_of<T>(rounds, factor, addend, std::make_index_sequence<kChains>{});
}

template <class T>
constexpr MultiplyAdds kernel = {mean<T>, int64_t(2 * kChains * W<T>)};

// Vectors in step as in the kernels, and as many of these groups as hide what one waits for; they pass through L1, as scores do.
constexpr int kInStep = 4, kGroups = 4;
constexpr int64_t kExponentials = kInStep * kGroups * W<float>;

double mean_of_exponentials(int64_t rounds) {
  float x[kExponentials];
  for (int64_t i = 0; i < kExponentials; ++i) x[i] = -float(i % 8);
  for (int64_t round = 0; round < rounds; ++round)
    for (float* at = x; at < x + kExponentials; at += kInStep * W<float>) {
      vec<float> e[kInStep];
#pragma GCC unroll 4
      for (int u = 0; u < kInStep; ++u) e[u] = load<float>(at + u * W<float>);
      exp2_nonpositive<kInStep>(e);
#pragma GCC unroll 4
      for (int u = 0; u < kInStep; ++u) store<float>(at + u * W<float>, -e[u]);
    }
  double sum = 0;
  for (float one : x) sum += double(one);
  return sum / double(kExponentials);
}

}  // namespace

const MultiplyAddsKernels multiply_adds_kernels = {
    kernel<float>, kernel<double>, {mean_of_exponentials, kExponentials}};

}  // namespace MVK_ISA
}  // namespace mvk
