// A unit of backward_whole.cuh and backward_parts.cuh: what of it is where in shared memory, how its rows come there, and
// how gradients leave.
#pragma once

#include "backward_call.cuh"

namespace mvk::attention {

// TOKENS: of a unit at most, a multiple of 8. Rows are aligned to given.bytes, 16 or 8, and channels a multiple of as
// many bytes; strides fit 32 bits; all units have equally many rows and columns of tokens, of which a window may be
// cut. KEYS: whose P and dS are in shared memory at once.
template <class P, int DP, bool PLAIN, int TOKENS, int WARPS, int KEYS = (TOKENS + 15) / 16 * 16>
struct WholeUnit {
  using T = typename P::Element;
  static constexpr int TILES = (TOKENS + 15) / 16, ROWS = 16 * TILES, EIGHTS = TOKENS / 8, UNITS = WARPS / TILES;
  static constexpr int SIZE = sizeof(T), ROW = P::stride(DP) * SIZE, COLUMNS = DP / 8;
  static constexpr int PAIRS = P::pairs_stride(KEYS);  // of a row of P and dS: a query's
  // dP of many keys is computed again, with the same bits, where registers do not hold it beside the scores.
  static constexpr bool AGAIN = TILES > 4;
  // Bytes of a team's shared memory, and where in it things are.
  static constexpr int QUERY = 0, KEY = ROWS * ROW, VALUE = 2 * KEY, GRAD = 3 * KEY, PROBABILITIES = 4 * KEY;
  static constexpr int DS = PROBABILITIES + ROWS * PAIRS * SIZE, PIXELS = DS + ROWS * PAIRS * SIZE;
  static constexpr int MASKS = PIXELS + 4 * ROWS, STATE = MASKS + 4 * TILES;
  static constexpr int SUMS = MASKS + (AGAIN ? TILES + 10 : TILES + 3) / 4 * 16, HELD = ROWS * ROWS * 4;
  using Sums = float[COLUMNS][4];

  const Backward<T>& given;
  uint32_t at;             // the team's shared memory
  int mine, member, lane;  // the team, the warp in it, and the lane

  // What was made of these is not kept in registers any longer, which have more to hold than that.
  __device__ __forceinline__ void forget() { asm volatile("" : "+r"(at), "+r"(member), "+r"(lane)); }

  __device__ __forceinline__ WholeUnit(const Backward<T>& given, const unsigned char* shared)
      : given(given), lane(lane_id()) {
    const int warp = threadIdx.x >> 5;
    mine = UNITS == 1 ? 0 : warp / TILES, member = warp % TILES;
    at = shared_address(shared) + mine * (!PLAIN && given.held ? SUMS + HELD : SUMS);
  }

  static __device__ __forceinline__ void wait_for_team() {
    if constexpr (TILES == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The team's unit in a step, by its number.
  __device__ __forceinline__ int number_of(int step) const {
    int block;  // read anew, so that nothing that is made of it is kept from step to step
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    const int heads = given.groups.heads;
    if (PLAIN || !given.held) return block * UNITS + mine;
    const int turns = given.by_heads.divide(block), item = (turns * UNITS + mine) * given.steps + step;
    return item < given.items ? item * heads + (block - turns * heads) : given.groups.units;
  }
  // One beyond the last is the last again, and nothing is stored of it.
  __device__ __forceinline__ Unit find(int number) const {
    const Groups& groups = given.groups;
    const int which = min(number, groups.units - 1);
    const int group = given.by_heads.divide(which), row = given.by_across.divide(group);
    const int batch = given.by_down.divide(row);
    Unit unit =
        unit_at(groups, batch, row - batch * groups.down, group - row * groups.across, which - group * groups.heads);
    unit.exists = number < groups.units;
    return unit;
  }

  // The pixels of the warp's 16 tokens, counted from the unit's first.
  __device__ __forceinline__ void number_own_tokens() const {
    const Groups& groups = given.groups;
    const int down = groups.windows ? 1 : groups.ph, across = groups.windows ? 1 : groups.pw;
    const int wide = groups.windows ? groups.pw : groups.width / groups.pw;
    const int token = member * 16 + (lane & 15), row = token / wide;
    const int place = row * down << 16 | (token - row * wide) * across;
    if (lane < 16) store_shared(at + PIXELS + 4 * token, PLAIN || token < given.tokens ? place : -1);
    __syncwarp();
  }
  // -1 if a token does not exist in this unit.
  __device__ __forceinline__ int placed(const Unit& unit, int place) const {
    if (PLAIN || !unit.cut || place < 0) return place;
    const uint32_t y = unit.y0 + (place >> 16), x = unit.x0 + (place & 0xffff);
    return y < static_cast<uint32_t>(given.groups.height) && x < static_cast<uint32_t>(given.groups.width) ? place : -1;
  }
  template <class MINE>
  __device__ __forceinline__ void find_places(int (&places)[MINE::COUNT], const MINE& rows, const Unit& unit) const {
    const uint32_t from = at + PIXELS + (16 * member + rows.row) * 4;
#pragma unroll
    for (int i = 0; i < MINE::COUNT; i++) {
      places[i] = rows.has(i) ? placed(unit, __float_as_int(load_shared(from + i * MINE::STEP * 4))) : -1;
    }
  }
  // A map from the unit's first pixel on.
  template <typename E>
  static __device__ __forceinline__ Map<E> from(const Map<E>& map, const Unit& unit) {
    const int64_t image = static_cast<int64_t>(static_cast<int>(unit.batch)) * static_cast<int>(map.batch);
    const int64_t head = static_cast<int64_t>(static_cast<int>(unit.head)) * static_cast<int>(map.head);
    return {map.at + (image + head + (unit.y0 * map.y + unit.x0 * map.x)), 0, 0, 1, map.y, map.x};
  }

  template <int BYTES>
  __device__ __forceinline__ void load_pieces_of(const Unit& unit) const {
    using Mine = Pieces<DP * SIZE / BYTES>;
    const Mine rows(lane);
    int places[Mine::COUNT];
    find_places(places, rows, unit);
    const uint32_t to = at + member * 16 * ROW;
    load_pieces<T, ROW / SIZE, PLAIN, BYTES>(to + QUERY, from(given.query, unit), given.channels, rows, places);
    load_pieces<T, ROW / SIZE, PLAIN, BYTES>(to + KEY, from(given.key, unit), given.channels, rows, places);
    load_pieces<T, ROW / SIZE, PLAIN, BYTES>(to + VALUE, from(given.value, unit), given.value_channels, rows, places);
    load_pieces<T, ROW / SIZE, PLAIN, BYTES>(to + GRAD, from(given.grad, unit), given.value_channels, rows, places);
    commit_copies();
  }
  __device__ __forceinline__ void load(const Unit& unit) const {
    if (given.bytes == 16) {
      load_pieces_of<16>(unit);
    } else {
      load_pieces_of<8>(unit);
    }
  }
  // The warp's own rows of a tile, to a map.
  template <typename WORD>
  __device__ __forceinline__ void store_pieces(int tile, const Map<T>& map, const Unit& unit, int channels) const {
    using Mine = Pieces<DP * SIZE / sizeof(WORD)>;
    const Mine rows(lane);
    int places[Mine::COUNT];
    find_places(places, rows, unit);
    const bool some = rows.some() && rows.piece * static_cast<int>(sizeof(WORD)) < channels * SIZE;
    const Map<T> to = from(map, unit);
    const uint32_t of = at + tile + (member * 16 + rows.row) * ROW + rows.piece * sizeof(WORD);
    WORD words[Mine::COUNT];
#pragma unroll
    for (int i = 0; i < Mine::COUNT; i++) {
      words[i] = {};
      if (rows.has(i) && some) load_shared(words[i], of + i * Mine::STEP * ROW);
    }
#pragma unroll
    for (int i = 0; i < Mine::COUNT; i++) {
      store_word_if(
          to.at + rows.piece * static_cast<int>(sizeof(WORD) / SIZE) + to.offset(places[i]), words[i],
          some && rows.has(i) && unit.exists && (PLAIN || places[i] >= 0));
    }
  }
  __device__ __forceinline__ void store(int tile, const Map<T>& map, const Unit& unit, int channels) const {
    __syncwarp();
    if (given.bytes == 16) {
      store_pieces<uint4>(tile, map, unit, channels);
    } else {
      store_pieces<uint2>(tile, map, unit, channels);
    }
  }
  // Sums of a product, as half types, to the warp's own rows of a tile.
  __device__ __forceinline__ void put(int tile, const uint32_t (&packed)[COLUMNS][2]) const {
    const uint32_t to = at + tile + (member * 16 + (lane >> 2)) * ROW + 4 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2 * COLUMNS; i++) store_shared(to + i / 2 * 16 + i % 2 * 8 * ROW, packed[i / 2][i % 2]);
  }
  // As half types, so that they take half of the registers until they can be put.
  static __device__ __forceinline__ void pack_sums(uint32_t (&packed)[COLUMNS][2], const Sums& of, float factor) {
#pragma unroll
    for (int i = 0; i < 2 * COLUMNS; i++) {
      packed[i / 2][i % 2] = pack<T>(of[i / 2][i % 2 * 2] * factor, of[i / 2][i % 2 * 2 + 1] * factor);
    }
  }
};

}  // namespace mvk::attention
