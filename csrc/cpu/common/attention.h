// What the registration and the kernels of softmax attention inside groups of pixels share: plain data, no torch.
#pragma once

#include "common/each_isa.h"
#include "common/map.h"

namespace mvk {

// The pixels of a group along one axis: first, first + step, ..., and which place of a whole group the first one has.
struct Span {
  int64_t first, count, place;
};

// How the pixels of an axis are divided into groups: by their place in a patch, or into windows. A group is a lattice of pixels,
// its span of y times its span of x.
struct Axis {
  int64_t groups, most, places;  // most: pixels of the largest group; places: those of a whole one, which a bias has
  int64_t size, step, start, window;  // window: 0 for patches; start: where the first one begins, at most 0

  MVK_SHARED static Axis of_patches(int64_t size, int64_t patch) {
    const int64_t most = (size + patch - 1) / patch;
    return {patch < size ? patch : size, most, most, size, patch, 0, 0};
  }
  MVK_SHARED static Axis of_windows(int64_t size, int64_t window, int64_t shift) {
    const int64_t start = shift ? shift - window : 0;
    return {(size - start + window - 1) / window, window < size ? window : size, window, size, 1, start, window};
  }
  MVK_SHARED Span span(int64_t group) const {
    const Span of_patch = {group, (size - group + step - 1) / step, 0};
    if (!window) return of_patch;
    const int64_t corner = start + group * window, end = corner + window, first = corner > 0 ? corner : 0;
    return {first, (end < size ? end : size) - first, first - corner};
  }
  // Whether all groups are whole.
  MVK_SHARED bool equal() const { return window ? !start && size % window == 0 : size % step == 0; }
};

// How a map is divided into groups. Queries and keys are the same pixels, or all pixels of two maps.
struct Groups {
  Axis y, x, key_y, key_x;
};

struct Attention : Groups {
  DType dtype;
  int64_t B, heads, D, Dv;
  double scale;
  Map query, key, value, out;
  const void* bias;  // (heads, places, key_places) or null
  DType bias_dtype;  // of the bias and its gradient: maps may have been copied to another one
  int64_t bias_stride[3];
  bool clipped;  // with a bias: some group lacks places

  // A unit of work is one (slice, head, chunk). A slice is one (batch, group); in the backward with a bias it is a
  // run of them, whose part of the bias gradient one thread sums in order. Chunks split the rows when there are fewer
  // units than threads.
  int64_t slices, chunks;

  // Backward only.
  Map grad, dquery, dkey, dvalue;
  void*
      dbias_partial;  // [slices][heads][key place][query place, padded] in the type of the sums; null for one whole item
  void* partial;      // [units][partial_size()]: each chunk's share of dkey and dvalue if chunks > 1, else null
  void* dbias;        // (heads, places, key_places), contiguous

  bool poison;  // fill scratch memory with NaN (tests)

  // Of some items and heads.
  MVK_SHARED Attention of(int64_t first, int64_t items, int64_t head, int64_t some) const {
    Attention a = *this;
    const int64_t size = size_of(dtype), bias_size = size_of(bias_dtype);
    Map* maps[] = {&a.query, &a.key, &a.value, &a.out, &a.grad, &a.dquery, &a.dkey, &a.dvalue};
    for (Map* map : maps)
      if (map->data) map->data = static_cast<char*>(map->data) + (first * map->b + head * map->h) * size;
    if (a.bias) a.bias = static_cast<const char*>(a.bias) + head * a.bias_stride[0] * bias_size;
    if (a.dbias) a.dbias = static_cast<char*>(a.dbias) + head * places() * key_places() * bias_size;
    a.B = items, a.heads = some;
    return a;
  }

  MVK_SHARED int64_t groups() const { return y.groups * x.groups; }
  // Pixels of the largest group.
  MVK_SHARED int64_t tokens() const { return y.most * x.most; }
  MVK_SHARED int64_t keys() const { return key_y.most * key_x.most; }
  MVK_SHARED int64_t places() const { return y.places * x.places; }
  MVK_SHARED int64_t key_places() const { return key_y.places * key_x.places; }
  // Queries, or keys, rounded up to what any instruction set takes at a time.
  static constexpr int64_t kBlock = 32;
  MVK_SHARED static int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
  MVK_SHARED int64_t units() const { return slices * heads * chunks; }
  // Keys by dims, with room for what an instruction set rounds up.
  MVK_SHARED int64_t partial_size() const { return padded(keys()) * (D + Dv + 64); }
};

// One set for each instruction set; ranges are over units, or over what the comment says.
struct AttentionKernels {
  void (*forward)(const Attention&, int64_t begin, int64_t end);
  void (*backward)(const Attention&, int64_t begin, int64_t end);
  // Second stages, in a fixed order: sums of chunks into dkey and dvalue (over slice x head), of slices into dbias (over heads).
  void (*sum_dkeys)(const Attention&, int64_t begin, int64_t end);
  void (*sum_dbias)(const Attention&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(AttentionKernels, attention_kernels)

}  // namespace mvk
