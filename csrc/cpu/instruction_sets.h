// The kernels by instruction set, and which one runs. Included by the files that register ops.
#pragma once

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "common/attention.h"
#include "common/linear_attention.h"
#include "common/map_rows.h"
#include "common/mobile_former.h"
#include "common/multiply_adds.h"
#include "conv3x3/conv3x3.h"
#include "elementwise/elementwise.h"
#include "inverted_residual/inverted_residual.h"
#include "multiscale_linear_attention/multiscale.h"
#include "pointwise/pointwise.h"

namespace mvk {
namespace {

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const AttentionKernels* attention;
  const MapRowsKernels* map_rows;
  const MobileToFormerKernels* mobile_to_former;
  const FormerToMobileKernels* former_to_mobile;
  const LinearAttentionKernels* relu_linear_attention;
  const MultiscaleKernels* multiscale;
  const MultiscaleBackwardKernels* multiscale_backward;
  const ElementwiseKernels* elementwise;
  const InvertedResidualKernels* inverted_residual;
  const Conv3x3Kernels* conv3x3;
  const PointwiseKernels* pointwise;
  const MultiplyAddsKernels* multiply_adds;
};

#define MVK_KERNELS(isa)                                                                                           \
  &isa::attention_kernels, &isa::map_rows_kernels, &isa::mobile_to_former_kernels, &isa::former_to_mobile_kernels, \
      &isa::relu_linear_attention_kernels, &isa::multiscale_kernels, &isa::multiscale_backward_kernels,            \
      &isa::elementwise_kernels, &isa::inverted_residual_kernels, &isa::conv3x3_kernels, &isa::pointwise_kernels,  \
      &isa::multiply_adds_kernels
const InstructionSet kInstructionSets[] = {
// best first
#if defined(MVK_AVX512)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     MVK_KERNELS(avx512)},
#endif
#if defined(MVK_AVX2)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     MVK_KERNELS(avx2)},
#endif
#if defined(MVK_NEON)
    {"neon", [] { return true; }, MVK_KERNELS(neon)},
#endif
#if defined(MVK_BASELINE)
    {"baseline", [] { return true; }, MVK_KERNELS(baseline)},
#endif
};
#undef MVK_KERNELS

const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets)
    if (set.supported() && (!name || !std::strcmp(name, set.name))) return &set;
  return nullptr;
}

const InstructionSet* current = find(nullptr);

// Takes the set that MVKERNELS_CPU_ISA names, if it names one; false if that is not there, or none is. Read until it succeeds once.
bool take_wanted_set() {
  static std::mutex mutex;
  static bool taken = false;
  const std::lock_guard lock(mutex);
  if (taken) return true;
  const char* wanted = std::getenv("MVKERNELS_CPU_ISA");
  const InstructionSet* found = wanted && *wanted ? find(wanted) : current;
  if (found) current = found;
  return taken = found;
}

}  // namespace
}  // namespace mvk
