// What the registration and the kernels of Mobile-Former's two bridges share: plain data, no torch.
#pragma once

#include "common/each_isa.h"
#include "common/map.h"

namespace mvk {

// Tokens (B, heads, M, dim): strides in elements.
struct Tokens {
  void* data;
  int64_t b, h, m, d;
};

struct Bridge {
  DType dtype;
  int64_t B, heads, M, D, H, W;
  double scale;
  bool residual;
  Map x, out_map, grad_map, dx;
  // Mobile to Former has query, out, grad, dquery; Former to Mobile has key, value, dkey, dvalue.
  Tokens query, out, grad, dquery, key, value, dkey, dvalue;

  // A unit of work is one (batch, head, chunk): chunks split the pixels when there are fewer units than threads.
  int64_t chunks;
  void* partial;  // [units][partial_size()] in the type of the sums if chunks > 1, else null

  bool poison;

  MVK_SHARED int64_t pixels() const { return H * W; }
  MVK_SHARED int64_t units() const { return B * heads * chunks; }
  MVK_SHARED int64_t forward_partial() const { return M * (D + 2); }
  MVK_SHARED int64_t backward_partial() const { return 2 * M * D; }
  // Mobile to Former: what a unit's first stage of the backward leaves for its second, with room for what an instruction set
  // rounds up; behind the M * D of every unit in `partial`.
  MVK_SHARED int64_t weights() const { return 2 * M * (pixels() / chunks + 64) / 4 * 4 + 4 * M; }
};

// One set for each instruction set. Ranges are over units; those of the second stages, which add chunks up in order, over
// (batch, head).
struct MobileToFormerKernels {
  void (*forward)(const Bridge&, int64_t begin, int64_t end);
  void (*merge)(const Bridge&, int64_t begin, int64_t end);
  void (*weights)(const Bridge&, int64_t begin, int64_t end);
  void (*backward)(const Bridge&, int64_t begin, int64_t end);
  void (*sum_dquery)(const Bridge&, int64_t begin, int64_t end);
};
struct FormerToMobileKernels {
  void (*forward)(const Bridge&, int64_t begin, int64_t end);
  void (*backward)(const Bridge&, int64_t begin, int64_t end);
  void (*sum_dtokens)(const Bridge&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(MobileToFormerKernels, mobile_to_former_kernels)
MVK_EACH_ISA(FormerToMobileKernels, former_to_mobile_kernels)

}  // namespace mvk
