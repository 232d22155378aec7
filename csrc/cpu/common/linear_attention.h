// What the registration and the kernels of ReLU linear attention share: plain data, no torch.
#pragma once

#include "common/each_isa.h"
#include "common/map.h"

namespace mvk {

// Of a kernel that runs in parts, between which all threads wait for each other.
enum class Stage { all, sums, rest, planes };

// Attention of some heads over one map each. The sums over pixels, kv[j][i] = sum_n v_j[n] relu(k_i[n]) and keys[i] = sum_n
// relu(k_i[n]), are what the forward leaves for the backward.
struct LinearAttention {
  DType dtype;
  int64_t B, heads, D, H, W;
  double eps;
  Map query, key, value, out, grad, dquery, dkey, dvalue;
  void *kv, *keys;  // (B, heads, D, D), (B, heads, D) in the type of the sums; null in a forward: not wanted

  // A unit of work is one (batch, head, chunk): chunks split the pixels when there are fewer units than threads. A kernel then
  // runs twice: it sums over the pixels of each chunk, and all have the sums added up, in order, before they go on.
  int64_t chunks;
  Stage stage;
  void* partial;  // [units][D + 1][D] in the type of the sums if chunks > 1, else null

  bool poison;

  MVK_SHARED int64_t pixels() const { return H * W; }
  MVK_SHARED int64_t units() const { return B * heads * chunks; }
  MVK_SHARED int64_t partial_size() const { return (D + 1) * D; }
};

// One set for each instruction set; ranges are over units.
struct LinearAttentionKernels {
  void (*forward)(const LinearAttention&, int64_t begin, int64_t end);
  void (*backward)(const LinearAttention&, int64_t begin, int64_t end);
};

MVK_EACH_ISA(LinearAttentionKernels, relu_linear_attention_kernels)

}  // namespace mvk
