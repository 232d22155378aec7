// The host of the ops inside ONNX Runtime: what torch_host.h gives inside torch. Included by register.cpp alone, before the ops.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "api.h"

namespace mvk {
namespace {

bool poison = false;  // fill fresh buffers with NaN (tests)

int32_t float16() { return 10; }
int32_t bfloat16() { return 16; }
int32_t float32() { return ort::kFloat; }
int32_t float64() { return 11; }
size_t item_size(int32_t dtype) { return dtype == float64() ? 8 : dtype == float32() ? 4 : 2; }

void check(const ort::Api* api, ort::Status* status) {
  if (!status) return;
  api->ReleaseStatus(status);
  throw std::runtime_error("mvkernels: ONNX Runtime refused a call of its C interface");
}

struct Call;
thread_local Call* call = nullptr;  // the one that this thread is in

struct Call {
  const ort::Api* api;
  ort::KernelContext* context;
  std::vector<int64_t> returned = {};  // sizes of the result in the graph

  Call(const ort::Api* api, ort::KernelContext* context) : api(api), context(context) { call = this; }
  Call(const Call&) = delete;
  ~Call() {
    call = nullptr;
    if (allocator_) api->ReleaseAllocator(allocator_);
  }
  // The session's, which keeps what it got from the system.
  ort::Allocator* allocator() {
    if (!allocator_) {
      ort::MemoryInfo* info;
      check(api, api->CreateCpuMemoryInfo(ort::kArena, ort::kDefaultMemory, &info));
      ort::Status* status = api->KernelContext_GetAllocator(context, info, &allocator_);
      api->ReleaseMemoryInfo(info);
      check(api, status);
    }
    return allocator_;
  }

 private:
  ort::Allocator* allocator_ = nullptr;
};

// Strides over memory of ONNX Runtime's, or over memory of its own.
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
    if (!owner_) return;
    if (ort::Status* status = owner_->api->AllocatorFree(owner_->allocator(), data_))
      owner_->api->ReleaseStatus(status);
  }
  // Gives it memory of its own.
  void own(Call* owner, size_t bytes) {
    check(owner->api, owner->api->AllocatorAlloc(owner->allocator(), std::max<size_t>(bytes, 1), &data_));
    owner_ = owner;
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
    std::swap(owner_, other.owner_);
  }

  void* data_ = nullptr;
  std::array<int64_t, kMostAxes> sizes_{}, strides_{};
  int64_t dim_ = 0;
  int32_t dtype_ = 0;
  Call* owner_ = nullptr;
};

int64_t elements(const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  return count;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  Tensor out(nullptr, sizes.data(), strides.data(), int64_t(sizes.size()), dtype);
  const size_t bytes = size_t(elements(sizes)) * item_size(dtype);
  out.own(call, bytes);
  if (poison) std::memset(out.data(), 0xff, bytes);
  return out;
}

// The result of the call, in the memory of its output: dense, so that its axes have the order of the output's in memory.
Tensor result(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  if (elements(call->returned) != elements(sizes)) throw std::logic_error("mvkernels: a result has another size");
  ort::Value* value;
  check(
      call->api,
      call->api->KernelContext_GetOutput(call->context, 0, call->returned.data(), call->returned.size(), &value));
  void* data;
  check(call->api, call->api->GetTensorMutableData(value, &data));
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
void copy(const Tensor&, const Tensor&) { throw std::logic_error("mvkernels: no op of ONNX Runtime copies tensors"); }

// ---- threads ----

// ONNX Runtime does not say how many threads a session has. More than there are cost a second pass over sums, so the guess is low:
// from eight on only a batch of one with few heads leaves some idle.
int64_t threads() { return std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 8); }

template <class F>
void parallel(int64_t count, int64_t grain, const F& body) {
  struct Shared {
    const F& body;
    int64_t count, parts;
    std::atomic<bool> failed = false;
  };
  Shared shared{body, count, std::min((count + grain - 1) / grain, 4 * threads())};
  if (shared.parts <= 1) {
    if (count > 0) body(int64_t(0), count);
    return;
  }
  auto part = [](void* data, size_t i) {
    auto& s = *static_cast<Shared*>(data);
    try {
      s.body(s.count * int64_t(i) / s.parts, s.count * int64_t(i + 1) / s.parts);
    } catch (...) {
      s.failed = true;
    }
  };
  check(call->api, call->api->KernelContext_ParallelFor(call->context, part, size_t(shared.parts), 0, &shared));
  if (shared.failed) throw std::runtime_error("mvkernels: a kernel failed, probably for want of memory");
}

}  // namespace
}  // namespace mvk
