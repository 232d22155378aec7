// What the ops need of tensors and threads beside what their host gives (torch_host.h), which is included before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/map.h"

namespace mvk {
namespace {

struct Shape {
  std::vector<int64_t> sizes, strides;
};

// In the order of the axes.
Shape dense(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i--;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return {sizes, strides};
}

Tensor empty(const Shape& shape, int32_t dtype) { return empty(shape.sizes, shape.strides, dtype); }
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) { return empty(dense(sizes), dtype); }
Tensor result(const Shape& shape, int32_t dtype) { return result(shape.sizes, shape.strides, dtype); }

// As mvkernels.dispatch.checks.empty_map: dense, channels last if `like`'s stride over the dims is 1.
Shape map_like(const Tensor& like, int64_t dim) {
  const int64_t* n = like.sizes();
  const std::vector<int64_t> sizes{n[0], n[1], dim, n[3], n[4]};
  if (like.strides()[2] != 1) return dense(sizes);
  auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t x = at_least_1(n[1]) * at_least_1(dim), y = x * at_least_1(n[4]), b = y * at_least_1(n[3]);
  return {sizes, {b, at_least_1(dim), 1, y, x}};
}
Tensor empty_map(const Tensor& like, int64_t dim) { return empty(map_like(like, dim), like.dtype()); }
Tensor result_map(const Tensor& like, int64_t dim) { return result(map_like(like, dim), like.dtype()); }

// The tensor, or a contiguous copy of it.
Tensor contiguous(Tensor t) {
  int64_t size = 1;
  bool already = true;
  for (int64_t i = t.dim(); i--;) {
    already = already && (t.sizes()[i] == 1 || t.strides()[i] == size);
    size *= t.sizes()[i];
  }
  if (already) return t;
  Tensor out = empty({t.sizes(), t.sizes() + t.dim()}, t.dtype());
  copy(t, out);
  return out;
}

Map map(const Tensor& t) {
  const int64_t* s = t.strides();
  return {t.data(), s[0], s[1], s[2], s[3], s[4]};
}

void require(bool fits, const char* op, const char* what) {
  if (!fits) throw std::runtime_error(std::string("mvkernels: ") + op + ": " + what);
}

// As the checks in Python do: nothing but the batch is empty, and no head is wider than its sums are exact (_MOST_HEAD_DIM in
// mvkernels/dispatch/extension.py).
constexpr int64_t kMostHeadDim = 256;
void require_sizes(const char* op, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> dims) {
  const bool some = std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 1; });
  const bool fit = std::all_of(dims.begin(), dims.end(), [](int64_t dim) { return dim >= 1 && dim <= kMostHeadDim; });
  require(some && fit, op, "an axis other than the batch is empty, or head_dim exceeds 256");
}

bool same_sizes(const Tensor& a, const Tensor& b, std::initializer_list<int> axes) {
  const int64_t *n = a.sizes(), *m = b.sizes();
  return std::all_of(axes.begin(), axes.end(), [&](int axis) { return n[axis] == m[axis]; });
}

DType dtype_of(const Tensor& t, const char* op) {
  const int32_t dtype = t.dtype();
  if (dtype == float32()) return DType::f32;
  if (dtype == float64()) return DType::f64;
  if (dtype == float16()) return DType::f16;
  if (dtype == bfloat16()) return DType::bf16;
  throw std::runtime_error(std::string("mvkernels: ") + op + ": dtype is not float16, bfloat16, float32 or float64");
}

int32_t sums_dtype(DType dtype) { return dtype == DType::f64 ? float64() : float32(); }

// ---- how work is split ----

constexpr double kWorthAThread = 2e6;  // FLOPs: some 30 microseconds

// The fewest units of so many FLOPs that one thread should get.
int64_t grain(double flops) { return std::max<int64_t>(1, int64_t(kWorthAThread / std::max(flops, 1.0))); }

// Chunks of a unit that give every thread one, if the work is worth it.
int64_t chunks(int64_t units, double flops, int64_t most) {
  const int64_t wanted = threads(), some = std::max<int64_t>(units, 1);
  if (some >= wanted || flops < 2 * kWorthAThread) return 1;
  return std::clamp<int64_t>((wanted + some - 1) / some, 1, std::max<int64_t>(most, 1));
}

}  // namespace
}  // namespace mvk
