// The groups of a map: which pixels each has, and the walk over the units of work.
#pragma once

#include "common/lattice.h"
#include "patch_attention/patch_attention.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// One (batch, group, head): which pixels, and how many.
struct Group {
  int64_t b, h, y, x, high, wide, tokens;
  Group(const PatchAttention& a, int64_t slice, int64_t head)
      : b(slice / a.groups()),
        h(head),
        y(slice % a.groups() / a.groups_x()),
        x(slice % a.groups() % a.groups_x()),
        high((a.H - y + a.ph - 1) / a.ph),
        wide((a.W - x + a.pw - 1) / a.pw),
        tokens(high * wide) {}
};

// The units of a forward in order. A division takes as long as a dozen vectors of arithmetic, so a group is worked out only
// where the slice changes.
struct Walk {
  const PatchAttention* a;
  int64_t chunk, slice;
  Group group;
  Walk(const PatchAttention& args, int64_t unit)
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
  const int64_t* of(const Group& g, int64_t row_stride, int64_t step_stride) {
    if (g.high == high && g.wide == wide && row_stride == row && step_stride == step) return table;
    high = g.high, wide = g.wide, row = row_stride, step = step_stride;
    int64_t* out = table;
    for (int64_t i = 0; i < high; ++i)
      for (int64_t j = 0; j < wide; ++j) *out++ = i * row + j * step;
    return table;
  }
};

MVK_INLINE Elements first_token(const PatchAttention& a, const Map& map, const Group& g) {
  return Elements(map.data, a.dtype) + (g.b * map.b + g.h * map.h + g.y * map.y + g.x * map.x);
}

MVK_INLINE Lattice lattice(const PatchAttention& a, const Map& map, Offsets& offsets, const Group& g) {
  return {first_token(a, map, g), offsets.of(g, map.y * a.ph, map.x * a.pw), map.d, map.x * a.pw};
}

// Prefetches the next unit's tokens into L2 between the tiles of this one: rows of a map are far apart, and the hardware
// does not guess them. For maps whose dims are contiguous; others are left to the hardware.
struct Ahead {
  struct Rows {
    const char* base;
    const int64_t* offset;
    int64_t item, bytes;
  } maps[6];
  int some = 0;
  int64_t next = 0, count = 0, panel = 0;  // tokens: reached, all, and for one panel of queries
  void add(const PatchAttention& a, const Map& map, const Group& g, const int64_t* offset, int64_t dims) {
    if (map.d != 1) return;
    const Elements first = first_token(a, map, g);
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
