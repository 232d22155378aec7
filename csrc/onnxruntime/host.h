// The host of the ops inside ONNX Runtime: what torch_host.h gives inside torch. Included by register.cpp alone, before the ops.
#pragma once

#include <string>
#include <thread>

#include "api.h"
#include "dense_host.h"

namespace mvk {
namespace {

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

void* allocate(size_t bytes) {
  void* out;
  check(call->api, call->api->AllocatorAlloc(call->allocator(), bytes, &out));
  return out;
}

void release(void* memory) noexcept {
  if (ort::Status* status = call->api->AllocatorFree(call->allocator(), memory)) call->api->ReleaseStatus(status);
}

void* output(int64_t count) {
  if (elements(call->returned) != count) throw std::logic_error("mvkernels: a result has another size");
  ort::Value* value;
  check(
      call->api,
      call->api->KernelContext_GetOutput(call->context, 0, call->returned.data(), call->returned.size(), &value));
  void* data;
  check(call->api, call->api->GetTensorMutableData(value, &data));
  return data;
}

// ONNX Runtime does not say how many threads a session has. More than there are cost a second pass over sums, so the guess is low:
// from eight on only a batch of one with few heads leaves some idle.
int64_t threads() { return std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 8); }

void run_parts(int64_t parts, void (*part)(void*, int64_t), void* data) {
  struct Shared {
    void (*part)(void*, int64_t);
    void* data;
  } shared{part, data};
  auto each = [](void* data, size_t i) {
    const auto& s = *static_cast<Shared*>(data);
    s.part(s.data, int64_t(i));
  };
  check(call->api, call->api->KernelContext_ParallelFor(call->context, each, size_t(parts), 0, &shared));
}

}  // namespace
}  // namespace mvk
