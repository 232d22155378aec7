// What the hosts inside runtimes without strides have in common: strides over memory of the runtime's. Such a host has the functions
// declared here, and includes this before the ops.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

namespace mvk {
namespace {

// ---- what the host has ----

void* allocate(size_t bytes);         // throws if there is no memory
void release(void* memory) noexcept;  // of allocate()
void* output(int64_t elements);       // memory of the result of this thread's call, which must have so many elements
int64_t threads();                    // that run_parts() uses
void run_parts(int64_t parts, void (*part)(void* data, int64_t number), void* data);  // `part` throws nothing

// ---- tensors ----

bool poison = false;  // fill fresh buffers with NaN (tests)

int32_t float16() { return 0; }
int32_t bfloat16() { return 1; }
int32_t float32() { return 2; }
int32_t float64() { return 3; }
size_t item_size(int32_t dtype) { return dtype == float64() ? 8 : dtype == float32() ? 4 : 2; }

// Strides over memory of the runtime's, or over memory of its own.
class Tensor {
 public:
  static constexpr int64_t kMostAxes = 5;

  Tensor() = default;
  Tensor(void* data, const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t dtype)
      : data_(data), dim_(dim), dtype_(dtype) {
    std::copy(sizes, sizes + dim, sizes_.begin());
    std::copy(strides, strides + dim, strides_.begin());
  }
  Tensor(Tensor&& other) noexcept { swap(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Tensor() {
    if (owns_) release(data_);
  }
  // Gives it memory of its own.
  void own(size_t bytes) {
    data_ = allocate(std::max<size_t>(bytes, 1));
    owns_ = true;
  }
  explicit operator bool() const { return dim_ > 0; }

  void* data() const { return data_; }
  int64_t dim() const { return dim_; }
  const int64_t* sizes() const { return sizes_.data(); }
  const int64_t* strides() const { return strides_.data(); }
  int32_t dtype() const { return dtype_; }

 private:
  void swap(Tensor& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(sizes_, other.sizes_);
    std::swap(strides_, other.strides_);
    std::swap(dim_, other.dim_);
    std::swap(dtype_, other.dtype_);
    std::swap(owns_, other.owns_);
  }

  void* data_ = nullptr;
  std::array<int64_t, kMostAxes> sizes_{}, strides_{};
  int64_t dim_ = 0;
  int32_t dtype_ = 0;
  bool owns_ = false;
};

int64_t elements(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  Tensor out(nullptr, sizes.data(), strides.data(), int64_t(sizes.size()), dtype);
  const size_t bytes = size_t(elements(sizes)) * item_size(dtype);
  out.own(bytes);
  if (poison) std::memset(out.data(), 0xff, bytes);
  return out;
}

// The result of the call, in the memory of its output: dense, so that its axes have the order of the output's in memory.
Tensor result(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  void* data = output(elements(sizes));
  if (poison) std::memset(data, 0xff, size_t(elements(sizes)) * item_size(dtype));
  return Tensor(data, sizes.data(), strides.data(), int64_t(sizes.size()), dtype);
}

// ---- arguments and results of a call ----

struct Value {
  Tensor* tensor = nullptr;
  std::vector<Tensor>* list = nullptr;
  int64_t whole = 0;
  double number = 0;
};

template <class T>
T to(const Value& value) {
  if constexpr (std::is_floating_point_v<T>) return T(value.number);
  return T(value.whole);
}
Tensor take(const Value& value) { return std::move(*value.tensor); }
Tensor take_optional(const Value& value) { return value.tensor ? std::move(*value.tensor) : Tensor(); }
std::vector<Tensor> take_list(const Value& value) { return std::move(*value.list); }
void give(Value*, Tensor&) {}  // it is in the output
void give_list(Value*, std::vector<Tensor>&) {}
void copy(const Tensor&, const Tensor&) { throw std::logic_error("mvkernels: no op of this runtime copies tensors"); }

// ---- threads ----

template <class F>
void parallel(int64_t count, int64_t grain, const F& body) {
  struct Shared {
    const F& body;
    int64_t count, parts;
    std::atomic<bool> failed = false;
  };
  Shared shared{body, count, std::min((count + grain - 1) / grain, 4 * threads())};
  if (shared.parts <= 1 || threads() <= 1) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  auto part = [](void* data, int64_t i) {
    auto& s = *static_cast<Shared*>(data);
    try {
      s.body(s.count * i / s.parts, s.count * (i + 1) / s.parts);
    } catch (...) {
      s.failed = true;
    }
  };
  run_parts(shared.parts, part, &shared);
  if (shared.failed) throw std::runtime_error("mvkernels: a kernel failed, probably for want of memory");
}

}  // namespace
}  // namespace mvk
