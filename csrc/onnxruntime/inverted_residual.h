// The inverted residual as an op of ONNX Runtime. Its weights are initializers, and are packed when a session makes the kernel.
//
// Inputs: a map (B, H, W, C), and weights and biases of three convolutions as ONNX has them; the expansion and the biases may be left
// out. Attributes: stride, activation (a number of common/activations.h), residual. Output: (B, H', W', C').
// Included by register.cpp alone.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <new>

#include "host.h"
#include "inverted_residual/inverted_residual_op.h"

namespace mvk {
namespace {

constexpr size_t kBlockInputs = 7;
constexpr std::array<const char*, kBlockInputs> kBlockInputNames = {
    "x", "expand", "expand_bias", "depthwise", "depthwise_bias", "project", "project_bias"};
bool block_needs(size_t input) { return input == 0 || input == 3 || input == 5; }

struct InvertedResidualKernel {
  // The kernels read whole lines.
  struct Free {
    void operator()(float* packed) const { ::operator delete(packed, std::align_val_t(64)); }
  };
  const ort::Api* api;
  const InvertedResidualKernels& kernels = *current->inverted_residual;
  InvertedResidual block{};
  std::array<bool, kBlockInputs> given{};
  std::unique_ptr<float, Free> packed;
  static constexpr uint32_t kSureAlone = 3, kLookAgain = 64;
  mutable std::atomic<uint32_t> alone = 0, calls = 0;  // calls that no other thread helped with, and calls since

  InvertedResidualKernel(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
    block.stride = attribute(info, "stride");
    if (block.stride != 1 && block.stride != 2) refuse(kInvertedResidual, "the stride is neither 1 nor 2");
    const int64_t activation = attribute(info, "activation");
    if (activation < 0 || activation > int64_t(Activation::gelu_tanh))
      refuse(kInvertedResidual, "there is no such activation");
    block.activation = block.before = Activation(activation);
    block.residual = attribute(info, "residual");
    std::array<Tensor, kBlockInputs> found;
    for (size_t i = 1; i < kBlockInputs; ++i) {
      int constant = 0;
      const ort::Value* value = nullptr;
      check(api, api->KernelInfoGetConstantInput_tensor(info, i, &constant, &value));
      given[i] = constant && value;
      if (given[i]) found[i] = tensor_of(*api, value, kInvertedResidual);
      if (std::count(found[i].sizes(), found[i].sizes() + found[i].dim(), 0))
        refuse(kInvertedResidual, std::string(kBlockInputNames[i]) + " has no elements");
      if (!given[i] && block_needs(i)) refuse_weight(i);
    }
    BlockTensors tensors{std::move(found[1]), std::move(found[2]), std::move(found[3]),
                         std::move(found[4]), std::move(found[5]), std::move(found[6])};
    InvertedResidualWeights w = block_weights(tensors);
    if (w.sizes.kernel != 3 && w.sizes.kernel != 5) refuse(kInvertedResidual, "the kernel is neither 3 nor 5");
    const size_t bytes = size_t(packed_count(w.sizes)) * sizeof(float);
    packed.reset(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
    block.packed = w.packed = packed.get();
    block.sizes = w.sizes;
    kernels.pack(w);
  }

  void run() const {
    const ort::Value* value = nullptr;
    size_t count = 0;
    check(api, api->KernelContext_GetInputCount(call->context, &count));
    // What was no initializer looked as if it were left out.
    for (size_t i = 1; i < std::min(count, kBlockInputs); ++i) {
      if (given[i]) continue;
      check(api, api->KernelContext_GetInput(call->context, i, &value));
      if (value) refuse_weight(i);
    }
    check(api, api->KernelContext_GetInput(call->context, 0, &value));
    Tensor given_map = tensor_of(*api, value, kInvertedResidual), none, nothing;
    if (given_map.dim() != 4) refuse(kInvertedResidual, "x is not a map (B, H, W, C)");
    const int64_t *n = given_map.sizes(), *s = given_map.strides();
    const int64_t sizes[] = {n[0], n[3], n[1], n[2]}, strides[] = {s[0], s[3], s[1], s[2]};
    const Tensor x(given_map.data(), sizes, strides, 4, given_map.dtype());
    // Chunks of a picture expand the rows between them twice, which is for nothing where one thread does them all. Whether
    // another one ever helps is seen; a busy machine can hide it, so it is looked for again now and then. Values are the same.
    const bool looks = alone < kSureAlone || calls++ % kLookAgain == 0;
    if (!looks) call->threads = 1;
    call->returned = {n[0], strided(n[1], block.stride), strided(n[2], block.stride), block.sizes.outputs};
    run_block(kernels, block, x, none, nothing);
    if (call->split && looks) alone = call->helped ? 0 : alone + 1;
  }

 private:
  [[noreturn]] static void refuse_weight(size_t i) {
    refuse(kInvertedResidual, std::string(kBlockInputNames[i]) + " is not an initializer of the graph");
  }
  int64_t attribute(const ort::KernelInfo* info, const char* name) const {
    int64_t out;
    if (ort::Status* status = api->KernelInfoGetAttribute_int64(info, name, &out)) {
      api->ReleaseStatus(status);
      refuse(kInvertedResidual, std::string("the attribute ") + name + " is missing or has another type");
    }
    return out;
  }
};

const ort::CustomOp& inverted_residual_op() {
  using Self = const ort::CustomOp*;
  static const ort::CustomOp op = [] {
    ort::CustomOp out = cpu_op();
    out.GetName = [](Self) { return kInvertedResidual; };
    out.GetInputTypeCount = [](Self) { return kBlockInputs; };
    out.GetInputCharacteristic = [](Self, size_t i) -> int { return block_needs(i) ? ort::kRequired : ort::kOptional; };
    out.CreateKernelV2 = [](Self, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
      return guarded(api, [&] { *kernel = new InvertedResidualKernel(api, info); });
    };
    out.KernelComputeV2 = [](void* data, ort::KernelContext* context) {
      const auto& kernel = *static_cast<const InvertedResidualKernel*>(data);
      return guarded(kernel.api, [&] {
        Call here(kernel.api, context);
        kernel.run();
      });
    };
    out.KernelDestroy = [](void* data) { delete static_cast<InvertedResidualKernel*>(data); };
    return out;
  }();
  return op;
}

}  // namespace
}  // namespace mvk
