// Rows of a unit between a map in global and a tile in shared memory, a row a token.
//
// Where channels are contiguous and rows aligned, lanes move 16 or 8 bytes each, neighbours in a row first, and to shared
// memory without passing through registers. Other maps are moved by elements; with channels apart lanes take the tokens.
#pragma once

#include "../common/copies.cuh"
#include "groups.cuh"

namespace mvk::attention {

// Of a head of an image, or of a whole map: strides are numbers of elements.
template <typename T>
struct Map {
  T* at;
  int64_t batch, head;
  int channel, y, x;

  __device__ __forceinline__ Map of(const Unit& unit) const {
    return {at + unit.batch * batch + unit.head * head, 0, 0, channel, y, x};
  }
  // The most bytes, 16, 8 or those of an element, that all rows are aligned to.
  __device__ __forceinline__ int width() const {
    const uint64_t bits = reinterpret_cast<uint64_t>(at) | sizeof(T) * static_cast<uint32_t>(y | x);
    return channel != 1 || bits & 7 ? sizeof(T) : bits & 8 ? 8 : 16;
  }
  __device__ __forceinline__ int offset(int place) const { return (place >> 16) * y + (place & 0xffff) * x; }
};

// A lane has one piece of all rows that it moves: only the pixel changes from row to row.
template <int PIECES>
struct Pieces {
  int row, piece, step;
  __device__ __forceinline__ Pieces(int index, int lanes, int rows)
      : row(index / PIECES), piece(index % PIECES), step(lanes / PIECES) {
    if (row >= step) row = rows;  // lanes beyond the last whole row
  }
};

template <typename T, int DP, int BYTES>
__device__ __forceinline__ void load_wide(
    uint32_t tile, int stride, const Map<const T>& map, int channels, const int* pixels, int rows, int index,
    int lanes) {
  constexpr int EACH = BYTES / sizeof(T);
  const Pieces<DP / EACH> mine(index, lanes, rows);
  const int there = min(max((channels - mine.piece * EACH) * int(sizeof(T)), 0), BYTES);
  const T* from = there > 0 ? map.at + mine.piece * EACH : map.at;
  uint32_t to = tile + (mine.row * stride + mine.piece * EACH) * sizeof(T);
#pragma unroll 2
  for (int row = mine.row; row < rows; row += mine.step, to += mine.step * stride * sizeof(T)) {
    const int place = pixels[row];
    copy_async<BYTES>(to, from + (place < 0 ? 0 : map.offset(place)), place < 0 ? 0 : there);
  }
}

// Zeros where there is no token, and beyond the channels, up to DP. Ends with a commit of copies.
template <typename T, int DP>
__device__ __forceinline__ void load_rows(
    T* tile, int stride, const Map<const T>& map, int channels, const int* pixels, int rows, int index, int lanes) {
  const int width = map.width();
  if (width == 16) {
    load_wide<T, DP, 16>(shared_address(tile), stride, map, channels, pixels, rows, index, lanes);
  } else if (width == 8) {
    load_wide<T, DP, 8>(shared_address(tile), stride, map, channels, pixels, rows, index, lanes);
  } else {
    const bool by_tokens = map.channel != 1;
    for (int row = by_tokens ? index : 0; row < rows; row += by_tokens ? lanes : 1) {
      const int place = pixels[row];
#pragma unroll 4
      for (int d = by_tokens ? 0 : index; d < DP; d += by_tokens ? 1 : lanes) {
        const bool there = place >= 0 && d < channels;
        tile[row * stride + d] =
            there ? map.at[map.offset(place) + static_cast<int64_t>(d) * map.channel] : from_float<T>(0.0f);
      }
    }
  }
  commit_copies();
}

template <typename T, int DP, typename WORD>
__device__ __forceinline__ void store_wide(
    const T* tile, int stride, const Map<T>& map, int channels, const int* pixels, int rows, int index, int lanes) {
  constexpr int EACH = sizeof(WORD) / sizeof(T);
  const Pieces<DP / EACH> mine(index, lanes, rows);
  if ((mine.piece + 1) * EACH > channels) return;
  T* const to = map.at + mine.piece * EACH;
  const T* from = tile + mine.row * stride + mine.piece * EACH;
#pragma unroll 2
  for (int row = mine.row; row < rows; row += mine.step, from += mine.step * stride) {
    const int place = pixels[row];
    if (place >= 0) *reinterpret_cast<WORD*>(to + map.offset(place)) = *reinterpret_cast<const WORD*>(from);
  }
}

template <typename T, int DP>
__device__ __forceinline__ void store_rows(
    const T* tile, int stride, const Map<T>& map, int channels, const int* pixels, int rows, int index, int lanes) {
  const int width = map.width();
  if (width == 16 && channels * sizeof(T) % 16 == 0) {
    store_wide<T, DP, uint4>(tile, stride, map, channels, pixels, rows, index, lanes);
  } else if (width >= 8) {
    store_wide<T, DP, uint2>(tile, stride, map, channels, pixels, rows, index, lanes);
  } else {
    const bool by_tokens = map.channel != 1;
    for (int row = by_tokens ? index : 0; row < rows; row += by_tokens ? lanes : 1) {
      const int place = pixels[row];
      if (place < 0) continue;
      for (int d = by_tokens ? 0 : index; d < channels; d += by_tokens ? 1 : lanes) {
        map.at[map.offset(place) + static_cast<int64_t>(d) * map.channel] = tile[row * stride + d];
      }
    }
  }
}

}  // namespace mvk::attention
