// Scratch memory of a thread, how rows lie in it, and which pixels a chunk of work has.
#pragma once

#include <cstdlib>

#include "common/simd.h"

namespace mvk {
namespace MVK_ISA {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch of a thread, kept between calls: fresh pages cost more than the work on a small map.
class Arena {
 public:
  ~Arena() { free(base_); }
  void reset(size_t bytes, bool poison) {
    if (bytes > size_) {
      free(base_);
      size_ = round_up(bytes, 4096);
      base_ = static_cast<char*>(aligned_alloc(64, size_));
      if (!base_) {
        size_ = 0;
        __builtin_trap();
      }
    }
    if (poison) memset(base_, 0xff, size_);  // all ones is a NaN in every type
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(base_ + used_);
    used_ += bytes<T>(count);
    return out;
  }
  template <class T>
  static size_t bytes(int64_t count) {
    return round_up(count * sizeof(T) + 64, 64);
  }

 private:
  char* base_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

namespace {

// Leading dimension of packed rows: whole vectors, and not a multiple of 128 bytes, since rows a power of two
// apart fall into the same few cache sets.
template <class T>
constexpr int64_t leading(int64_t cols) {
  int64_t ld = round_up(cols, W<T>);
  return ld * int64_t(sizeof(T)) % 128 == 0 ? ld + W<T> : ld;
}

static thread_local Arena arena;

template <class T>
MVK_INLINE int at_most(int64_t n) {
  return n < W<T> ? int(n) : W<T>;
}

template <class T, bool Rectified>
MVK_INLINE vec<T> act(vec<T> x) {
  return Rectified ? relu<T>(x) : x;
}
// `count` elements that lie side by side, or their relu; lanes up to a whole vector become 0.
template <class T, bool Rectified = false, class S>
MVK_INLINE void take_row(const S* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + W<T> <= count; i += W<T>) store<T>(to + i, act<T, Rectified>(load<T>(from + i)));
  if (i < count) store<T>(to + i, act<T, Rectified>(load_partial<T>(from + i, int(count - i))));
}

// The pixels of a chunk: whole vectors but for the last.
template <class T>
MVK_INLINE void part_of(int64_t pixels, int64_t chunk, int64_t chunks, int64_t& begin, int64_t& end) {
  begin = 0, end = pixels;
  if (chunks == 1) return;
  const int64_t vectors = (pixels + W<T> - 1) / W<T>, cut = vectors * (chunk + 1) / chunks * W<T>;
  begin = vectors * chunk / chunks * W<T>;
  if (cut < end) end = cut;
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
