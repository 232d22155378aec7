// Winograd's algorithm F(m x m, 3 x 3): m x m outputs from (m + 2) x (m + 2) inputs by as many products, where the direct
// one has 9 m m. (Lavin and Gray, arXiv 1509.09308, section 4.)
//
// m = 2 has the points 0, 1, -1 and infinity, and errs less than the direct algorithm. m = 4 has the points 0, +-1 / sqrt 2,
// +-sqrt 2 and infinity: with the usual 0, +-1, +-2 it errs three times as much.
#pragma once

#include <cmath>

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {
namespace {

constexpr double kNear = 0.70710678118654752440, kFar = 2 * kNear;

// B^T d
template <int m>
MVK_INLINE void of_inputs(const vec<float>* d, vec<float>* r) {
  if constexpr (m == 2) {
    r[0] = d[0] - d[2], r[1] = d[1] + d[2], r[2] = d[2] - d[1], r[3] = d[1] - d[3];
  } else {
    const vec<float> near = splat(float(kNear)), far = splat(float(kFar)), half = splat(0.5f), two = splat(2.0f);
    const vec<float> even = d[4] - two * d[2], odd = d[3] - two * d[1];
    r[1] = even + near * odd, r[2] = even - near * odd;
    const vec<float> even_far = d[4] - half * d[2], odd_far = d[3] - half * d[1];
    r[3] = even_far + far * odd_far, r[4] = even_far - far * odd_far;
    r[0] = d[0] - splat(2.5f) * d[2] + d[4], r[5] = d[1] - splat(2.5f) * d[3] + d[5];
  }
}

// A^T z
template <int m>
MVK_INLINE void of_products(const vec<float>* z, vec<float>* y) {
  if constexpr (m == 2) {
    y[0] = z[0] + z[1] + z[2], y[1] = z[1] - z[2] - z[3];
  } else {
    const vec<float> near = splat(float(kNear)), far = splat(float(kFar)), half = splat(0.5f), two = splat(2.0f);
    const vec<float> sum = z[1] + z[2], rest = z[1] - z[2], sum_far = z[3] + z[4], rest_far = z[3] - z[4];
    y[0] = z[0] + sum + sum_far, y[1] = near * rest + far * rest_far, y[2] = half * sum + two * sum_far;
    y[3] = half * near * rest + two * far * rest_far + z[5];
  }
}

// G, a row for each point
template <int m>
static void of_weights(double (*g)[3]) {
  const double near[3] = {1, kNear, 0.5}, far[3] = {1, kFar, 2};
  for (int j = 0; j < 3; ++j) {
    const double sign = j == 1 ? -1 : 1;
    g[0][j] = j == 0, g[m + 1][j] = j == 2;
    if constexpr (m == 2) {
      g[1][j] = 0.5, g[2][j] = 0.5 * sign;
    } else {
      g[1][j] = near[j] / -1.5, g[2][j] = sign * g[1][j];
      g[3][j] = far[j] / 6, g[4][j] = sign * g[3][j];
    }
  }
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
