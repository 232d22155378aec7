// Tensors and threads through torch's stable C interface. Included by register.cpp alone.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

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

bool poison = false;  // fill fresh buffers with NaN

void check(AOTITorchError error) {
  if (error) throw std::runtime_error("mvkernels: torch refused a call of its C interface");
}

// Owns a tensor handle.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  AtenTensorHandle handle() const { return handle_; }
  explicit operator bool() const { return handle_; }

  void* data() const {
    void* out;
    check(aoti_torch_get_data_ptr(handle_, &out));
    if (reinterpret_cast<uintptr_t>(out) < kLow) require_memory();
    return out;
  }
  int64_t dim() const {
    int64_t out;
    check(aoti_torch_get_dim(handle_, &out));
    return out;
  }
  const int64_t* sizes() const {
    int64_t* out;
    check(aoti_torch_get_sizes(handle_, &out));
    return out;
  }
  const int64_t* strides() const {
    int64_t* out;
    check(aoti_torch_get_strides(handle_, &out));
    return out;
  }
  int32_t dtype() const {
    int32_t out;
    check(aoti_torch_get_dtype(handle_, &out));
    return out;
  }

 private:
  // A storage that was freed (resized to 0 bytes) lies at null, a tensor in it at its offset from there: at a low address, where
  // hardly anything else lies, so that asking the storage costs the usual call nothing.
  static constexpr uint64_t kLow = uint64_t(1) << 40;
  void require_memory() const {
    int64_t bytes, elements;
    check(aoti_torch_get_storage_size(handle_, &bytes));
    check(aoti_torch_get_numel(handle_, &elements));
    if (!bytes && elements)
      throw std::runtime_error("mvkernels: the storage of a tensor has been freed (resized to 0)");
  }

  AtenTensorHandle handle_ = nullptr;
};

size_t item_size(int32_t dtype) {
  return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle out;
  check(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &out));
  Tensor tensor(out);
  if (poison) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    if (count) std::memset(tensor.data(), 0xff, size_t(count) * item_size(dtype));
  }
  return tensor;
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i--;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return empty(sizes, strides, dtype);
}

// As mvkernels.dispatch.checks.empty_map: dense, channels last if `like`'s stride over the dims is 1.
Tensor empty_map(const Tensor& like, int64_t dim) {
  const int64_t* n = like.sizes();
  const std::vector<int64_t> sizes{n[0], n[1], dim, n[3], n[4]};
  if (like.strides()[2] != 1) return empty(sizes, like.dtype());
  auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t x = at_least_1(n[1]) * at_least_1(dim), y = x * at_least_1(n[4]), b = y * at_least_1(n[3]);
  return empty(sizes, {b, at_least_1(dim), 1, y, x}, like.dtype());
}

// Elements of one dtype and shape. The storages are asked for first, for PyTorch's own copy reads one that was freed.
void copy(const Tensor& from, const Tensor& to) {
  from.data(), to.data();
  check(aoti_torch_copy_(to.handle(), from.handle(), 0));
}

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

Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
Tensor take_optional(StableIValue value) {
  auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  return handle ? Tensor(*handle) : Tensor();
}
void give(StableIValue* to, Tensor& tensor) { *to = torch::stable::detail::from(tensor.release()); }

DType dtype_of(const Tensor& t, const char* op) {
  const int32_t dtype = t.dtype();
  if (dtype == aoti_torch_dtype_float32()) return DType::f32;
  if (dtype == aoti_torch_dtype_float64()) return DType::f64;
  if (dtype == aoti_torch_dtype_float16()) return DType::f16;
  if (dtype == aoti_torch_dtype_bfloat16()) return DType::bf16;
  throw std::runtime_error(std::string("mvkernels: ") + op + ": dtype is not float16, bfloat16, float32 or float64");
}

int32_t sums_dtype(DType dtype) {
  return dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// ---- threads ----

template <class F>
void parallel(int64_t count, int64_t grain, const F& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  check(torch_parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&body))));
}

int64_t threads() {
  uint32_t out;
  check(torch_get_num_threads(&out));
  return out;
}

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
