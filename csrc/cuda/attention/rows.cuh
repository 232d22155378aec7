// Rows of a unit between a map in global and a tile in shared memory, a row a token.
//
// Where channels are contiguous and rows aligned, lanes move 16 or 8 bytes each, neighbours in a row first, and to
// shared memory without passing through registers. Other maps are moved by elements; with channels apart lanes take the
// tokens.
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
  // Of y << 16 | x: y times its stride and x times its own, of which the second is taken too often by y << 16.
  __device__ __forceinline__ int offset(int place) const {
    const uint32_t often = static_cast<uint32_t>(y) - (static_cast<uint32_t>(x) << 16);
    return static_cast<uint32_t>(place) * x + (static_cast<uint32_t>(place) >> 16) * often;
  }
};

// A lane has one piece of each row that it moves, of 16: only the pixel changes from row to row.
template <int PIECES>
struct Pieces {
  static constexpr int STEP = 32 / PIECES, COUNT = (16 + STEP - 1) / STEP;
  int row, piece;
  __device__ __forceinline__ explicit Pieces(int lane = lane_id()) : row(lane / PIECES), piece(lane % PIECES) {}
  __device__ __forceinline__ bool some() const { return 32 % PIECES == 0 || row < STEP; }
  __device__ __forceinline__ bool has(int i) const { return 16 % STEP == 0 || i < COUNT - 1 || row + i * STEP < 16; }
  // All at once: nothing is read from shared memory between two copies.
  __device__ __forceinline__ void find(int (&places)[COUNT], const int* pixels) const {
#pragma unroll
    for (int i = 0; i < COUNT; i++) places[i] = has(i) ? pixels[row + i * STEP] : -1;
  }
};

template <typename T, int DP, int STRIDE, bool FULL, int BYTES>
__device__ __forceinline__ void load_wide(uint32_t tile, const Map<const T>& map, int channels, const int* pixels) {
  constexpr int EACH = BYTES / sizeof(T);
  using Mine = Pieces<DP / EACH>;
  const Mine mine;
  if (!mine.some()) return;
  const int there = min(max((channels - mine.piece * EACH) * int(sizeof(T)), 0), BYTES);
  const T* const from = there > 0 ? map.at + mine.piece * EACH : map.at;
  const uint32_t to = tile + (mine.row * STRIDE + mine.piece * EACH) * sizeof(T);
  int places[Mine::COUNT];
  mine.find(places, pixels);
#pragma unroll
  for (int i = 0; i < Mine::COUNT; i++) {
    if (!mine.has(i)) continue;
    const bool none = !FULL && places[i] < 0;
    const T* const at = from + (none ? 0 : map.offset(places[i]));
    copy_async<BYTES>(to + i * Mine::STEP * STRIDE * sizeof(T), at, none ? 0 : there);
  }
}

// The same of whole pieces: channels are a multiple of those of one.
template <typename T, int STRIDE, bool FULL, int BYTES, class MINE>
__device__ __forceinline__ void load_pieces(
    uint32_t tile, const Map<const T>& map, int channels, const MINE& mine, const int (&places)[MINE::COUNT]) {
  constexpr int EACH = BYTES / sizeof(T);
  if (!mine.some()) return;
  const bool there = mine.piece * EACH < channels;
  const T* const from = map.at + (there ? mine.piece * EACH : 0);
  const uint32_t to = tile + (mine.row * STRIDE + mine.piece * EACH) * sizeof(T);
#pragma unroll
  for (int i = 0; i < MINE::COUNT; i++) {
    if (!mine.has(i)) continue;
    const bool none = !FULL && places[i] < 0;
    const T* const at = from + (none ? 0 : map.offset(places[i]));
    copy_async_if<BYTES>(to + i * MINE::STEP * STRIDE * sizeof(T), at, there && !none);
  }
}

// By a warp, 16 rows; FULL: each is a token. Zeros where there is no token, and beyond the channels, up to DP. `width`
// is that of the map. Ends with a commit of copies.
template <typename T, int DP, int STRIDE, bool FULL>
__device__ __forceinline__ void load_rows(
    T* tile, const Map<const T>& map, int width, int channels, const int* pixels) {
  if (width == 16) {
    load_wide<T, DP, STRIDE, FULL, 16>(shared_address(tile), map, channels, pixels);
  } else if (width == 8) {
    load_wide<T, DP, STRIDE, FULL, 8>(shared_address(tile), map, channels, pixels);
  } else {
    const bool by_tokens = map.channel != 1;
    const int lane = lane_id();
#pragma unroll 1
    for (int row = by_tokens ? lane : 0; row < 16; row += by_tokens ? 32 : 1) {
      const int place = pixels[row];
#pragma unroll 4
      for (int d = by_tokens ? 0 : lane; d < DP; d += by_tokens ? 1 : 32) {
        const bool there = place >= 0 && d < channels;
        tile[row * STRIDE + d] =
            there ? map.at[map.offset(place) + static_cast<int64_t>(d) * map.channel] : from_float<T>(0.0f);
      }
    }
  }
  commit_copies();
}

// By a team: all rows of a unit.
template <typename T, int DP, int STRIDE, bool FULL>
__device__ __forceinline__ void load_unit_rows(
    T* tiles, const Map<const T>& map, int channels, const int* pixels, int rows, int member, int team) {
  const int width = map.width();
#pragma unroll 1
  for (int first = 16 * member; first < rows; first += 16 * team) {
    load_rows<T, DP, STRIDE, FULL>(tiles + first * STRIDE, map, width, channels, pixels + first);
  }
}

// At once: the compiler may divide what it stores of a structure.
__device__ __forceinline__ void store_word(void* to, const uint4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_word(void* to, const uint2& x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}

__device__ __forceinline__ void store_word_if(void* to, const uint4& x, bool keep) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(to), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w), "r"(static_cast<int>(keep))
               : "memory");
}
__device__ __forceinline__ void store_word_if(void* to, const uint2& x, bool keep) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2};}" ::"l"(to), "r"(x.x),
               "r"(x.y), "r"(static_cast<int>(keep))
               : "memory");
}

template <typename T, int DP, int STRIDE, bool FULL, typename WORD>
__device__ __forceinline__ void store_wide(const T* tile, const Map<T>& map, int channels, const int* pixels) {
  constexpr int EACH = sizeof(WORD) / sizeof(T);
  using Mine = Pieces<DP / EACH>;
  const Mine mine;
  if (!mine.some() || (mine.piece + 1) * EACH > channels) return;
  T* const to = map.at + mine.piece * EACH;
  const T* const from = tile + mine.row * STRIDE + mine.piece * EACH;
  int places[Mine::COUNT];
  mine.find(places, pixels);
  WORD words[Mine::COUNT];
#pragma unroll
  for (int i = 0; i < Mine::COUNT; i++) {
    if (mine.has(i)) words[i] = *reinterpret_cast<const WORD*>(from + i * Mine::STEP * STRIDE);
  }
#pragma unroll
  for (int i = 0; i < Mine::COUNT; i++) {
    if (mine.has(i) && (FULL || places[i] >= 0)) store_word(to + map.offset(places[i]), words[i]);
  }
}

template <typename T, int DP, int STRIDE, bool FULL>
__device__ __forceinline__ void store_rows(
    const T* tile, const Map<T>& map, int width, int channels, const int* pixels) {
  if (width == 16 && channels * sizeof(T) % 16 == 0) {
    store_wide<T, DP, STRIDE, FULL, uint4>(tile, map, channels, pixels);
  } else if (width >= 8) {
    store_wide<T, DP, STRIDE, FULL, uint2>(tile, map, channels, pixels);
  } else {
    const bool by_tokens = map.channel != 1;
    const int lane = lane_id();
#pragma unroll 1
    for (int row = by_tokens ? lane : 0; row < 16; row += by_tokens ? 32 : 1) {
      const int place = pixels[row];
      if (place < 0) continue;
      for (int d = by_tokens ? 0 : lane; d < channels; d += by_tokens ? 1 : 32) {
        map.at[map.offset(place) + static_cast<int64_t>(d) * map.channel] = tile[row * STRIDE + d];
      }
    }
  }
}

template <typename T, int DP, int STRIDE, bool FULL>
__device__ __forceinline__ void store_unit_rows(
    const T* tiles, const Map<T>& map, int channels, const int* pixels, int rows, int member, int team) {
  const int width = map.width();
#pragma unroll 1
  for (int first = 16 * member; first < rows; first += 16 * team) {
    store_rows<T, DP, STRIDE, FULL>(tiles + first * STRIDE, map, width, channels, pixels + first);
  }
}

}  // namespace mvk::attention
