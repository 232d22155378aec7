// The host of the ops inside ONNX Runtime: what torch_host.h gives inside torch. Included by register.cpp alone, before the ops.
#pragma once

#include <atomic>
#include <string>
#include <thread>

#include "api.h"
#include "dense_host.h"

namespace mvk {
namespace {

void check(const ort::Api* api, ort::Status* status) {
  if (!status) return;
  const std::string message = std::string("mvkernels: ONNX Runtime: ") + api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

[[noreturn]] void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("mvkernels: ") + op + ": " + what);
}

// Runs `body`; an exception becomes a status.
template <class Body>
ort::Status* guarded(const ort::Api* api, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return api->CreateStatus(ort::kInvalidArgument, error.what());
  } catch (const std::exception& error) {
    return api->CreateStatus(ort::kFail, error.what());
  }
}

struct Call;
thread_local Call* call = nullptr;  // the one that this thread is in

struct Call {
  const ort::Api* api;
  ort::KernelContext* context;
  std::vector<int64_t> returned = {};  // sizes of the result in the graph
  int64_t threads = 0;                 // that there are, if the op knows; else 0
  bool split = false, helped = false;  // whether work was split, and whether another thread took some of it

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

// The elements of a value, contiguous as ONNX Runtime has them; nothing if there is no value.
Tensor tensor_of(const ort::Api& api, const ort::Value* value, const char* op) {
  if (!value) return Tensor();
  ort::TensorInfo* info;
  check(&api, api.GetTensorTypeAndShape(value, &info));
  size_t dim = 0;
  int type = 0;
  int64_t sizes[Tensor::kMostAxes], strides[Tensor::kMostAxes];
  bool known = !api.GetDimensionsCount(info, &dim) && !api.GetTensorElementType(info, &type) && dim >= 1 &&
               dim <= size_t(Tensor::kMostAxes) && type == ort::kFloat;
  known = known && !api.GetDimensions(info, sizes, dim);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (!known) refuse(op, "an input has a type or a number of axes that no input of the op has");
  int64_t step = 1;
  for (size_t i = dim; i--;) strides[i] = step, step *= std::max<int64_t>(sizes[i], 1);
  void* data;
  check(&api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  return Tensor(data, sizes, strides, int64_t(dim), float32());
}

// ONNX Runtime does not say how many threads a session has. More than there are cost a second pass over sums, so the guess is low:
// from eight on only a batch of one with few heads leaves some idle.
int64_t threads() {
  return call->threads ? call->threads : std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, 8);
}

void run_parts(int64_t parts, void (*part)(void*, int64_t), void* data) {
  struct Shared {
    void (*part)(void*, int64_t);
    void* data;
    std::atomic<bool> helped = false;
  } shared{part, data};
  auto each = [](void* data, size_t i) {
    auto& s = *static_cast<Shared*>(data);
    if (!call) s.helped = true;
    s.part(s.data, int64_t(i));
  };
  check(call->api, call->api->KernelContext_ParallelFor(call->context, each, size_t(parts), 0, &shared));
  call->split = true, call->helped = call->helped || shared.helped;
}

// ---- what the ops have in common ----

// An op on CPUs, of float32 tensors and with one output: name, inputs and functions are still to be said.
ort::CustomOp cpu_op() {
  using Self = const ort::CustomOp*;
  ort::CustomOp out{};
  out.version = ort::kVersion;
  out.GetExecutionProviderType = [](Self) -> const char* { return "CPUExecutionProvider"; };
  out.GetInputType = [](Self, size_t) -> int { return ort::kFloat; };
  out.GetInputMemoryType = [](Self, size_t) { return 0; };
  out.GetVariadicInputMinArity = [](Self) { return 0; };
  out.GetVariadicInputHomogeneity = [](Self) { return 1; };
  out.GetOutputTypeCount = [](Self) -> size_t { return 1; };
  out.GetOutputType = [](Self, size_t) -> int { return ort::kFloat; };
  out.GetOutputCharacteristic = [](Self, size_t) -> int { return ort::kRequired; };
  out.GetVariadicOutputMinArity = [](Self) { return 1; };
  out.GetVariadicOutputHomogeneity = [](Self) { return 1; };
  out.GetStartVersion = [](Self) { return 1; };
  out.GetEndVersion = [](Self) { return INT32_MAX; };
  return out;
}

}  // namespace
}  // namespace mvk
