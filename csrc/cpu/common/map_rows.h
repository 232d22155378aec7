// Copies of maps in rows, one of dims for each pixel of a head: plain data, no torch.
#pragma once

#include "common/each_isa.h"
#include "common/map.h"

namespace mvk {

struct MapRows {
  DType dtype;  // of the map; rows are of the type that its elements are computed in
  int64_t B, heads, dims, H, W;
  Map map;
  void* rows;  // (B, heads, H * W, ld)
  int64_t ld;

  // A unit of work is a block of pixels of one (batch, head).
  static constexpr int64_t kPixels = 128;
  MVK_SHARED int64_t blocks() const { return (H * W + kPixels - 1) / kPixels; }
  MVK_SHARED int64_t units() const { return B * heads * blocks(); }
};

// One set for each instruction set; ranges are over units. take() reads the map, put() writes it.
struct MapRowsKernels {
  void (*take)(const MapRows&, int64_t begin, int64_t end);
  void (*put)(const MapRows&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(MapRowsKernels, map_rows_kernels)

}  // namespace mvk
