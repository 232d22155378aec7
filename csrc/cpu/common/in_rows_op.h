// Attention on maps that it cannot read or write by whole vectors. Included by the files that register ops alone.
#pragma once

#include "common/tensor.h"
#include "instruction_sets.h"

namespace mvk {
namespace {

using MapOf = Map Attention::*;

int64_t dims_of(const Attention& a, MapOf map) {
  const bool of_values = map == &Attention::value || map == &Attention::out || map == &Attention::grad;
  return of_values || map == &Attention::dvalue ? a.Dv : a.D;
}

// Whether all pixels of a line lie side by side, but those of a group do not, or not in runs that can be loaded at once.
bool scattered(const Attention& a, const Map& map) {
  const bool half = a.dtype == DType::f16 || a.dtype == DType::bf16;
  return map.x == 1 && map.d != 1 && (a.x.step > 1 || (half && a.x.groups > 1));
}

// Pixels of all heads from which on copies cost less than they save.
constexpr int64_t kFewPixels = 128;
// How many bytes of copies stay near the processor; and of one head, how many still cost less than they save.
constexpr int64_t kCopied = 1 << 21, kMostCopied = 1 << 24;

// pass(attention) on all items and heads. If any map is scattered, on copies of the maps that have the dims of a pixel side by side, in
// the type that is computed in: of some items, or of some heads of one, after the others. `whole` if all items are to be together.
template <class Pass>
void in_rows(
    const Attention& a, std::initializer_list<MapOf> read, std::initializer_list<MapOf> written, bool whole,
    const Pass& pass) {
  std::vector<MapOf> maps(read);
  maps.insert(maps.end(), written);
  auto some_scattered = [&] {
    return std::any_of(maps.begin(), maps.end(), [&](MapOf map) { return scattered(a, a.*map); });
  };
  // Groups of more than one column are of one map, so queries and keys have the same pixels.
  const int64_t H = a.y.size, W = a.x.size;
  if (a.B * a.heads * H * W < kFewPixels || !some_scattered()) return pass(a);
  const int32_t type = sums_dtype(a.dtype);
  const int64_t size = int64_t(item_size(type));
  auto ld = [&](MapOf map) { return (dims_of(a, map) + 15) / 16 * 16; };
  int64_t of_head = 0;  // elements
  for (MapOf map : maps) of_head += H * W * ld(map);
  const int64_t together = whole ? a.B : 1, fit = kCopied / (of_head * size);
  if (together * of_head * size > kMostCopied) return pass(a);
  const int64_t items = whole ? a.B : std::clamp<int64_t>(fit / a.heads, 1, a.B);
  const int64_t heads = std::clamp<int64_t>(fit / items, 1, a.heads);
  const Tensor memory = empty({items * heads * of_head}, type);

  auto copied = [&](int64_t first, int64_t head) {
    Attention part = a.of(first, std::min(items, a.B - first), head, std::min(heads, a.heads - head));
    if (a.dtype != DType::f64) part.dtype = DType::f32;
    std::vector<MapRows> copies;
    char* at = static_cast<char*>(memory.data());
    for (MapOf map : maps) {
      const int64_t x = ld(map), h = H * W * x;
      copies.push_back({a.dtype, part.B, part.heads, dims_of(a, map), H, W, part.*map, at, x});
      part.*map = {at, part.heads * h, h, 1, W * x, x};
      at += items * heads * h * size;
    }
    auto turn = [&](size_t from, size_t to, auto kernel) {
      for (size_t i = from; i < to; ++i)
        parallel(copies[i].units(), 64, [&](int64_t begin, int64_t end) { kernel(copies[i], begin, end); });
    };
    turn(0, read.size(), current->map_rows->take);
    pass(part);
    turn(read.size(), copies.size(), current->map_rows->put);
  };
  for (int64_t first = 0; first < a.B; first += items)
    for (int64_t head = 0; head < a.heads; head += heads) copied(first, head);
}

}  // namespace
}  // namespace mvk
