// The stages of ReLU linear attention for one head: sums over pixels, outputs, and their gradients.
//
// With p = 1 / (keys . relu(q) + eps) and g' = p dout the backward is, for each pixel, t = kv^T g', r = p (q . t), dq = t - r
// keys; the gradients of the sums are products of [g', -r] with relu(q), of which dk and dv are made. Where few of q are above
// 0, t and r keys nearly cancel: what rounding left in r is found from q . dq, which is r eps, and taken off too.
#pragma once

#include "common/linear.h"

namespace mvk {
namespace MVK_ISA {

// Scratch of a thread, for heads of D dims on maps of so many pixels.
template <class T>
struct Scratch {
  int64_t D, N, ldn, ldk;  // N: pixels of a block; the leading dimensions of rows of pixels and of dims
  T eps;
  int64_t* tables[4];  // for Head
  T *sums, *dsums, *turned, *factor;
  T* rows[3];    // [D + 1][ldn]
  T* tokens[3];  // [N][ldk]
  Scratch(int64_t D, int64_t pixels, double eps)
      : D(D), N(pixels_of_block<T>(D, pixels)), ldn(leading<T>(N)), ldk(round_up(D, W<T>)), eps(T(eps)) {}
  // The size of the parts when so many pixels are cut into the fewest blocks.
  int64_t step(int64_t pixels) const {
    const int64_t blocks = (pixels + N - 1) / N;
    return blocks ? round_up((pixels + blocks - 1) / blocks, W<T>) : N;
  }
  int64_t sums_size() const { return (D + 1) * ldk; }
  int64_t rows_size() const { return (D + 1) * ldn; }
  int64_t tokens_size() const { return round_up(N, W<T>) * ldk; }
  size_t bytes() const {
    return 4 * Arena::bytes<int64_t>(N) + 2 * Arena::bytes<T>(sums_size()) + Arena::bytes<T>(ldk * ldk) +
           Arena::bytes<T>(ldn) + 3 * Arena::bytes<T>(rows_size()) + 3 * Arena::bytes<T>(tokens_size());
  }
  void take(Arena& arena) {
    for (int64_t*& table : tables) table = arena.take<int64_t>(N);
    sums = arena.take<T>(sums_size()), dsums = arena.take<T>(sums_size());
    turned = arena.take<T>(ldk * ldk), factor = arena.take<T>(ldn);
    for (T*& one : rows) one = arena.take<T>(rows_size());
    for (T*& one : tokens) one = arena.take<T>(tokens_size());
  }
};

// Adds [v, 1] relu(k)^T over pixels n0 .. n1 to the sums; `then` is read after them.
template <class T>
void add_sums(Head<T> key, Head<T> value, const Head<T>& then, int64_t n0, int64_t n1, Scratch<T>& s);

// The same of pixels that lie ready: k [count][ldk], rectified, and v as rows.
template <class T>
void add_ready_sums(const T* k, const T* v, int64_t ldv, int64_t count, Scratch<T>& s);

// out of `count` pixels from n on, at most a block, whose rectified queries are rows. Prefetches `next`.
template <class T>
void output_rows(const T* q, int64_t ldq, int64_t n, int64_t count, Head<T>& out, Scratch<T>& s, Next& next);

// The same of pixels whose rectified queries are q[count][ldk], which are changed.
template <class T>
void output_tokens(T* q, int64_t n, int64_t count, Head<T>& out, Scratch<T>& s, Next& next);

// out over pixels n0 .. n1; `keys` and `values`, if any, are read after them.
template <class T>
void outputs(
    Head<T> query, Head<T> out, int64_t n0, int64_t n1, Scratch<T>& s, const Head<T>* keys = nullptr,
    const Head<T>* values = nullptr);

// dq over pixels n0 .. n1, and what they add to the gradient of the sums; `then` is prefetched at the end.
template <class T>
void query_gradients(
    Head<T> query, Head<T> grad, Head<T> dquery, int64_t n0, int64_t n1, Scratch<T>& s, const Next& then = {});

// dk and dv over pixels n0 .. n1.
template <class T>
void key_gradients(
    Head<T> key, Head<T> value, Head<T> dkey, Head<T> dvalue, int64_t n0, int64_t n1, Scratch<T>& s,
    const Next& then = {});

namespace {

template <class T>
static void fill(T* to, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
