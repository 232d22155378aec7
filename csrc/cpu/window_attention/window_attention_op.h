// Window attention as boxed operators. Included by the files that register them alone.
#pragma once

#include "common/attention_op.h"

namespace mvk {
namespace {

// The square of more than this could overflow.
constexpr int64_t kLargestWindow = (int64_t(1) << 31) - 1;

auto by_windows(const char* op, const int64_t* numbers) {
  const int64_t wh = numbers[0], ww = numbers[1], sy = numbers[2], sx = numbers[3];
  require(wh >= 1 && ww >= 1 && wh <= kLargestWindow && ww <= kLargestWindow, op, "window_size is out of range");
  require(sy >= 0 && sy < wh && sx >= 0 && sx < ww, op, "shift is out of range");
  return [=](int64_t height, int64_t width, int64_t key_height, int64_t key_width) {
    require(height == key_height && width == key_width, op, "query and key map have other sizes");
    const Axis y = Axis::of_windows(height, wh, sy), x = Axis::of_windows(width, ww, sx);
    return Groups{y, x, y, x};
  };
}

void window_attention_forward(Value* stack, uint64_t, uint64_t) {
  boxed_forward<4>("window_attention", stack, by_windows);
}
void window_attention_backward(Value* stack, uint64_t, uint64_t) {
  boxed_backward<4>("window_attention", stack, by_windows);
}

}  // namespace
}  // namespace mvk
