// The host of the ops inside torch: tensors, arguments and threads through its stable C interface. What another host gives instead
// has the same names, so that the ops are written once. Included by register.cpp alone, before the ops.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace mvk {
namespace {

bool poison = false;  // fill fresh buffers with NaN

// What a tensor's dtype() is.
int32_t float16() { return aoti_torch_dtype_float16(); }
int32_t bfloat16() { return aoti_torch_dtype_bfloat16(); }
int32_t float32() { return aoti_torch_dtype_float32(); }
int32_t float64() { return aoti_torch_dtype_float64(); }
size_t item_size(int32_t dtype) { return dtype == float64() ? 8 : dtype == float32() ? 4 : 2; }

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

// ---- memory ----

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

// A tensor that a call returns: here like any other.
Tensor result(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  return empty(sizes, strides, dtype);
}

// Elements of one dtype and shape. The storages are asked for first, for PyTorch's own copy reads one that was freed.
void copy(const Tensor& from, const Tensor& to) {
  from.data(), to.data();
  check(aoti_torch_copy_(to.handle(), from.handle(), 0));
}

// ---- arguments and results of a call ----

using Value = StableIValue;

template <class T>
T to(Value value) {
  return torch::stable::detail::to<T>(value);
}
Tensor take(Value value) { return Tensor(to<AtenTensorHandle>(value)); }
Tensor take_optional(Value value) {
  auto handle = to<std::optional<AtenTensorHandle>>(value);
  return handle ? Tensor(*handle) : Tensor();
}
void give(Value* to, Tensor& tensor) { *to = torch::stable::detail::from(tensor.release()); }

// The tensors of a list.
std::vector<Tensor> take_list(Value value) {
  const auto list = to<StableListHandle>(value);
  std::vector<Tensor> out;
  size_t size = 0;
  AOTITorchError error = torch_list_size(list, &size);
  for (size_t i = 0; !error && i < size; ++i) {
    Value item;
    error = torch_list_get_item(list, i, &item);
    if (!error) out.push_back(take(item));
  }
  torch_delete_list(list);
  check(error);
  return out;
}
void give_list(Value* to, std::vector<Tensor>& tensors) {
  StableListHandle list;
  check(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& tensor : tensors) check(torch_list_push_back(list, torch::stable::detail::from(tensor.release())));
  *to = torch::stable::detail::from(list);
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

}  // namespace
}  // namespace mvk
