// The activations that the kernels know: plain data, no torch.
#pragma once

#include <cstdint>

namespace mvk {

// As ACTIVATIONS in mvkernels/ops/common/activations.py.
enum class Activation : int64_t { identity, relu, silu, hardswish, gelu, relu6, gelu_tanh };

}  // namespace mvk
