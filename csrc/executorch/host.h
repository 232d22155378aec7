// The host of the ops inside ExecuTorch: what torch_host.h gives inside torch. Included by register.cpp alone, before the ops.
#pragma once

#define ET_USE_THREADPOOL  // for the declaration of parallel_for, which libexecutorch_threadpool has
#include <executorch/runtime/core/exec_aten/util/tensor_util.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <new>
#include <string>

#include "dense_host.h"

namespace mvk {
namespace {

namespace et = ::executorch::runtime;

struct Call {
  et::KernelRuntimeContext& context;
  et::etensor::Tensor& out;
  std::vector<int64_t> returned = {};  // sizes of the result in the graph

  Call(et::KernelRuntimeContext& context, et::etensor::Tensor& out);
  Call(const Call&) = delete;
  ~Call();
};
thread_local Call* call = nullptr;  // the one that this thread is in

Call::Call(et::KernelRuntimeContext& context, et::etensor::Tensor& out) : context(context), out(out) { call = this; }
Call::~Call() { call = nullptr; }

constexpr size_t kAlignment = 64;

// The method's, which has it until the kernel returns.
void* allocate(size_t bytes) {
  et::Result<void*> found = call->context.allocate_temp(bytes, kAlignment);
  if (!found.ok()) throw std::bad_alloc();
  return *found;
}
void release(void*) noexcept {}

void* output(int64_t count) {
  if (elements(call->returned) != count) throw std::logic_error("mvkernels: a result has another size");
  std::array<et::etensor::Tensor::SizesType, Tensor::kMostAxes> sizes{};
  std::copy(call->returned.begin(), call->returned.end(), sizes.begin());
  const auto order = call->out.dim_order();
  if (!et::is_contiguous_dim_order(order.data(), order.size()))
    throw std::invalid_argument("mvkernels: the output is not in the order of its axes");
  if (et::resize_tensor(call->out, {sizes.data(), call->returned.size()}) != et::Error::Ok)
    throw std::invalid_argument("mvkernels: the output has other sizes than the op's result");
  return call->out.mutable_data_ptr();
}

int64_t threads() { return std::max<int64_t>(::executorch::extension::get_thread_count(), 1); }

void run_parts(int64_t parts, void (*part)(void*, int64_t), void* data) {
  const bool ran = ::executorch::extension::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part(data, i);
  });
  if (!ran) throw std::runtime_error("mvkernels: ExecuTorch refused a parallel loop");
}

}  // namespace
}  // namespace mvk
