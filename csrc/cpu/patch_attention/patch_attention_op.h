// Patch attention as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/attention_op.h"

namespace mvk {
namespace {

// A patch as large as the map or larger makes every pixel its own group; sums with more than this could overflow.
constexpr int64_t kLargestPatch = (int64_t(1) << 31) - 1;

auto by_patches(const char* op, const int64_t* patch) {
  require(patch[0] >= 1 && patch[1] >= 1, op, "patch_size is less than 1");
  const int64_t ph = std::min(patch[0], kLargestPatch), pw = std::min(patch[1], kLargestPatch);
  return [=](int64_t height, int64_t width, int64_t key_height, int64_t key_width) {
    const bool alike = height == key_height && width == key_width;
    require(alike || (ph == 1 && pw == 1), op, "unequal maps need patches of 1");
    return Groups{
        Axis::of_patches(height, ph), Axis::of_patches(width, pw), Axis::of_patches(key_height, ph),
        Axis::of_patches(key_width, pw)};
  };
}

void patch_attention_forward(Value* stack, uint64_t, uint64_t) {
  boxed_forward<2>("patch_attention", stack, by_patches);
}
void patch_attention_backward(Value* stack, uint64_t, uint64_t) {
  boxed_backward<2>("patch_attention", stack, by_patches);
}

}  // namespace
}  // namespace mvk
