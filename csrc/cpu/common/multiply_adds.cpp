// Multiply-adds in registers and nothing else: the most that a kernel of this instruction set can do.
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

}  // namespace

const MultiplyAddsKernels multiply_adds_kernels = {kernel<float>, kernel<double>};

}  // namespace MVK_ISA
}  // namespace mvk
