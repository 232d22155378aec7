// Elements of a map in memory. Kernels compute in T, float or double; only what reads and writes maps is compiled for each type
// that their elements can have.
#pragma once

#include "common/map.h"
#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {

template <class T>
constexpr DType kOwn = std::is_same_v<T, double> ? DType::f64 : DType::f32;

struct Elements {
  char* data;
  DType dtype;

  Elements() = default;
  Elements(const void* at, DType type) : data(static_cast<char*>(const_cast<void*>(at))), dtype(type) {}
  int64_t size() const { return size_of(dtype); }
  Elements operator+(int64_t n) const { return {data + n * size(), dtype}; }
  template <class S>
  S* as() const {
    return reinterpret_cast<S*>(data);
  }
  // Where they are of the type computed in, else null.
  template <class T>
  T* own() const {
    return dtype == kOwn<T> ? as<T>() : nullptr;
  }
};

// f(S()) for the type S of elements that are computed in T.
template <class T, class F>
MVK_INLINE void with_type(DType dtype, const F& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(double());
  } else {
    if (dtype == DType::f16) return f(half());
    if (dtype == DType::bf16) return f(bfloat());
    f(float());
  }
}

// The kernel of a dtype, for the tables: runs the one or the other by the type that its elements are computed in.
template <auto of_float, auto of_double, class Arguments>
static void by_dtype(const Arguments& a, int64_t begin, int64_t end) {
  return a.dtype == DType::f64 ? of_double(a, begin, end) : of_float(a, begin, end);
}

}  // namespace MVK_ISA
}  // namespace mvk
