// Exponentials of scores in base 2.
#pragma once

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634;
template <class T>
constexpr T kInfinity = std::is_same_v<T, float> ? T(__builtin_inff()) : T(__builtin_inf());

// Exponents are (score - maximum) * scores: subtracting first is exact for what matters and safe for scores of any
// size, and unscaled queries need no rounding. Only the sign of the scale goes into the queries, so that the largest score
// stays the largest. With a bias, which is added to scaled scores, and with a scale that float cannot invert, the
// queries take all of it.
struct Factor {
  double queries, scores;
  Factor(double scale, bool bias) {
    const float f = float(__builtin_fabs(scale) * kLog2E);
    const bool whole = bias || !(f > 1e-30f && f < 1e30f);
    queries = whole ? scale : __builtin_copysign(1.0, scale);
    scores = whole ? kLog2E : __builtin_fabs(scale) * kLog2E;
  }
};

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
