// The groups of attention: which pixels each has, and the walk over the units of work.
#pragma once

#include "common/attention.h"
#include "common/lattice.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// The pixels of a group, line after line.
struct Pixels {
  Span y, x;
  int64_t count;
  Pixels(Span y, Span x) : y(y), x(x), count(y.count * x.count) {}
};

// One (batch, group, head): its queries and its keys.
struct Group {
  int64_t b, h;
  Pixels queries, keys;
  Group(const Attention& a, int64_t slice, int64_t head)
      : Group(a, slice / a.groups(), slice % a.groups() / a.x.groups, slice % a.groups() % a.x.groups, head) {}

 private:
  Group(const Attention& a, int64_t batch, int64_t y, int64_t x, int64_t head)
      : b(batch), h(head), queries(a.y.span(y), a.x.span(x)), keys(a.key_y.span(y), a.key_x.span(x)) {}
};

// The units of a forward in order. A division takes as long as a dozen vectors of arithmetic, so a group is worked out only
// where the slice changes.
struct Walk {
  const Attention* a;
  int64_t chunk, slice;
  Group group;
  Walk(const Attention& args, int64_t unit)
      : a(&args),
        chunk(unit % args.chunks),
        slice(unit / args.chunks / args.heads),
        group(args, slice, unit / args.chunks % args.heads) {}
  void step() {
    if (++chunk < a->chunks) return;
    chunk = 0;
    if (++group.h == a->heads) group = Group(*a, ++slice, 0);
  }
};

// Offsets of a group's tokens from its first one, kept while they stay the same: for heads, and for groups of one size.
struct Offsets {
  int64_t* table;
  int64_t high = 0, wide = 0, row = 0, step = 0;
  const int64_t* of(const Pixels& p, int64_t row_stride, int64_t step_stride) {
    if (p.y.count == high && p.x.count == wide && row_stride == row && step_stride == step) return table;
    high = p.y.count, wide = p.x.count, row = row_stride, step = step_stride;
    int64_t* out = table;
    for (int64_t i = 0; i < high; ++i)
      for (int64_t j = 0; j < wide; ++j) *out++ = i * row + j * step;
    return table;
  }
};

// The pixels of a group in one map.
MVK_INLINE Elements first_token(const Attention& a, const Map& map, const Group& g, const Pixels& p) {
  return Elements(map.data, a.dtype) + (g.b * map.b + g.h * map.h + p.y.first * map.y + p.x.first * map.x);
}
MVK_INLINE Lattice lattice(const Attention& a, const Map& map, Offsets& offsets, const Group& g, const Pixels& p) {
  const int64_t step = map.x * a.x.step;
  return {first_token(a, map, g, p), offsets.of(p, map.y * a.y.step, step), map.d, step};
}
MVK_INLINE Lattice of_queries(const Attention& a, const Map& map, Offsets& offsets, const Group& g) {
  return lattice(a, map, offsets, g, g.queries);
}
MVK_INLINE Lattice of_keys(const Attention& a, const Map& map, Offsets& offsets, const Group& g) {
  return lattice(a, map, offsets, g, g.keys);
}

// Prefetches the next unit's tokens into L2 between the tiles of this one: rows of a map are far apart, and the hardware
// does not guess them. For maps whose dims are contiguous; others are left to the hardware. Offsets are this unit's, and
// so are right for a unit of the same shape, as nearly all are.
struct Ahead : Nothing {
  struct Rows {
    const char* base;
    const int64_t* offset;
    int64_t item, bytes;
  } maps[4];
  int some = 0;
  int64_t next = 0, count = 0, panel = 0;  // tokens: reached, all, and for one panel of queries
  Ahead(const Group& now, const Group* after, int64_t panel) : panel(panel) {
    if (!after) return;
    auto alike = [](const Span& a, const Span& b) { return a.count == b.count; };
    const bool same = alike(now.queries.y, after->queries.y) && alike(now.queries.x, after->queries.x);
    if (same) count = now.queries.count < now.keys.count ? now.queries.count : now.keys.count;
  }
  void add(const Attention& a, const Map& map, const Group& g, const Pixels& p, const int64_t* offset, int64_t dims) {
    if (map.d != 1 || !count) return;
    const Elements first = first_token(a, map, g, p);
    maps[some++] = {first.data, offset, first.size(), dims * first.size()};
  }
  void between_tiles(int tiles) {
    for (int64_t n = (panel + tiles - 1) / tiles; n > 0 && next < count; --n, ++next)
      for (int i = 0; i < some; ++i) {
        const char* p = maps[i].base + maps[i].offset[next] * maps[i].item;
        for (int64_t at = 0; at < maps[i].bytes; at += 64) __builtin_prefetch(p + at, 0, 2);
      }
  }
};

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
