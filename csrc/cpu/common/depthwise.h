// Depthwise convolution of planes, forward and backward, with the pixels of a row as lanes.
//
// A plane is rows of W pixels with K / 2 zeros on either side, `pitch` apart; rows above and below the map are not there and
// not computed. A vector of pixels walks down the rows: what K output rows are owed by the rows so far stays in registers, so
// that K loads serve K * K multiplications.
#pragma once

#include "common/lattice.h"

namespace mvk {
namespace MVK_ISA {

// Rows y0 .. y1 of the convolution, at out[(y - y0) * width]: what a vector writes beyond its row is overwritten; two vectors of room at
// the end are not. `in` is row `low` of a plane, of whose rows low .. high are there.
template <class T>
void convolve(
    int64_t K, const T* in, int64_t width, int64_t low, int64_t high, int64_t y0, int64_t y1, const T* w, T bias,
    T* out);

// lanes[dy * K + dx] (a vector each) += the plane g, which gradients have come to, times the rows x, dense, that the convolution read.
template <class T>
void convolve_weights(int64_t K, const T* g, const T* x, int64_t height, int64_t width, T* lanes);

namespace {

constexpr int64_t pitch_of(int64_t width, int64_t k) { return width + k - 1; }
// Elements of a plane: the last vector of a row reaches beyond it.
template <class T>
constexpr int64_t plane_size(int64_t height, int64_t width, int64_t k) {
  return round_up(height * pitch_of(width, k) + 2 * W<T>, W<T>);
}

// One row into a plane, between its zeros.
template <class T, class S>
MVK_INLINE void put_row(const S* from, int64_t width, T* to) {
  int64_t i = 0;
  for (; i + W<T> <= width; i += W<T>) store<T>(to + i, load<T>(from + i));
  if (i < width) store_partial<T>(to + i, load_partial<T>(from + i, int(width - i)), int(width - i));
}
template <class T>
MVK_INLINE void put_row_and_zeros(const T* from, int64_t width, int64_t pad, T* to) {
  for (int64_t i = 0; i < pad; ++i) to[i] = 0, to[pad + width + i] = 0;
  put_row<T, T>(from, width, to + pad);
}

}  // namespace
}  // namespace MVK_ISA
}  // namespace mvk
