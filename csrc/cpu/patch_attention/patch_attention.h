// What the registration and the kernels of patch attention share: plain data, no torch.
#pragma once

#include "common/each_isa.h"
#include "common/map.h"

namespace mvk {

struct PatchAttention {
  DType dtype;
  int64_t B, heads, D, Dv, H, W, ph, pw;
  double scale;
  Map query, key, value, out;
  const void* bias;  // (heads, N, N) or null
  int64_t bias_stride[3];

  // A unit of work is one (slice, head, chunk). A slice is one (batch, group); in the backward with a bias it is a
  // run of them, whose part of the bias gradient one thread sums in order. Chunks split the rows when there are fewer
  // units than threads.
  int64_t slices, chunks;

  // Backward only.
  Map grad, dquery, dkey, dvalue;
  void* dbias_partial;  // [slices][heads][key N][query, padded] in the type of the sums; null if there is one item
  void* partial;        // [units][partial_size()]: each chunk's share of dkey and dvalue if chunks > 1, else null
  void* dbias;          // (heads, N, N), contiguous

  bool poison;  // fill scratch memory with NaN (tests)

  MVK_SHARED int64_t groups_y() const { return ph < H ? ph : H; }
  MVK_SHARED int64_t groups_x() const { return pw < W ? pw : W; }
  MVK_SHARED int64_t groups() const { return groups_y() * groups_x(); }
  // Pixels of group 0, the largest.
  MVK_SHARED int64_t tokens() const { return ((H + ph - 1) / ph) * ((W + pw - 1) / pw); }
  // Queries rounded up to what any instruction set takes at a time.
  static constexpr int64_t kBlock = 32;
  MVK_SHARED int64_t padded() const { return (tokens() + kBlock - 1) / kBlock * kBlock; }
  MVK_SHARED int64_t units() const { return slices * heads * chunks; }
  // Keys by dims, with room for what an instruction set rounds up.
  MVK_SHARED int64_t partial_size() const { return padded() * (D + Dv + 64); }
};

// One set for each instruction set; ranges are over units, or over what the comment says.
struct PatchAttentionKernels {
  void (*forward)(const PatchAttention&, int64_t begin, int64_t end);
  void (*backward)(const PatchAttention&, int64_t begin, int64_t end);
  // Second stages, in a fixed order: sums of chunks into dkey and dvalue (over slice x head), of slices into dbias (over heads).
  void (*sum_dkeys)(const PatchAttention&, int64_t begin, int64_t end);
  void (*sum_dbias)(const PatchAttention&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(PatchAttentionKernels, patch_attention_kernels)

}  // namespace mvk
