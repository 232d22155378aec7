// Units of a head, one after the other: how a block finds them, and brings the rows of the next while it computes one.
//
// What depends on where a token lies in its group is computed once; a unit only adds where its group begins. All rows
// of all maps are aligned to 16 bytes. A warp moves the rows of its own 16 tokens.
#pragma once

#include "rows.cuh"

namespace mvk::attention {

// Maps, their groups, and how the units of a head are divided among blocks.
template <typename T>
struct Walked {
  Map<const T> query, key, value;
  Map<T> out;
  Groups groups;  // all of one size; units, rows and team_bits are not used
  int channels, value_channels, tokens;
  int items, steps;  // units of a head; of a block
  // Between the first pixels of neighbouring units, and the last that a unit which is not cut may begin at.
  int step_y, step_x, last_y, last_x;
};

// Where a unit lies.
struct Position {
  int batch, gy, gx;

  __device__ __forceinline__ Position(const Groups& groups, int item) {
    gx = item % groups.across;
    item /= groups.across;
    gy = item % groups.down;
    batch = item / groups.down;
  }
  template <typename T>
  __device__ __forceinline__ int y(const Walked<T>& given) const {
    return given.groups.sy + gy * given.step_y;
  }
  template <typename T>
  __device__ __forceinline__ int x(const Walked<T>& given) const {
    return given.groups.sx + gx * given.step_x;
  }
  template <typename T>
  __device__ __forceinline__ bool cut(const Walked<T>& given) const {
    const int y0 = y(given), x0 = x(given);
    return (y0 | x0 | (given.last_y - y0) | (given.last_x - x0)) < 0;
  }
  // Of a token at y << 16 | x of its group, or -1: whether it is inside the map.
  template <typename T>
  __device__ __forceinline__ bool has(const Walked<T>& given, int token) const {
    const uint32_t height = given.groups.height, width = given.groups.width;
    const uint32_t there = static_cast<uint32_t>(y(given) + (token >> 16)) < height;
    return there & (static_cast<uint32_t>(x(given) + (token & 0xffff)) < width) & (token >= 0);
  }
};

// Where a lane's pieces of its warp's 16 rows are in a map. KEPT: in registers from unit to unit, else found for each.
template <typename T, int DP, bool KEPT>
struct Addresses {
  using Mine = Pieces<DP / 8>;
  const char* at;  // the first token of a unit
  uint32_t further[KEPT ? Mine::COUNT : 1];

  static __device__ __forceinline__ uint32_t offset(const Map<T>& map, const Mine& mine, int token) {
    return sizeof(T) * map.offset(token) + mine.piece * 16;
  }
  __device__ __forceinline__ void begin(const Map<T>& map, const Mine& mine, const int (&tokens)[Mine::COUNT]) {
    if constexpr (KEPT) {
#pragma unroll
      for (int i = 0; i < Mine::COUNT; i++) further[i] = offset(map, mine, tokens[i]);
    }
  }
  // To the neighbouring unit.
  template <typename GIVEN>
  __device__ __forceinline__ void advance(const Map<T>& map, const GIVEN& given) {
    at += static_cast<int64_t>(map.x) * static_cast<int>(sizeof(T) * given.step_x);
  }
  template <typename GIVEN>
  __device__ __forceinline__ void find(const Map<T>& map, const GIVEN& given, const Position& unit, int head) {
    asm volatile("" : "+r"(head));  // lest products are kept in registers from one row of units to the next
    const int64_t origin = static_cast<int64_t>(unit.y(given)) * map.y + static_cast<int64_t>(unit.x(given)) * map.x;
    at = reinterpret_cast<const char*>(map.at + (unit.batch * map.batch + head * map.head + origin));
  }
  __device__ __forceinline__ const char* of(const Map<T>& map, const Mine& mine, int i, const int* places) const {
    if constexpr (KEPT) {
      return at + further[i];
    } else {
      return at + offset(map, mine, places[min(mine.row + i * Mine::STEP, 15)]);
    }
  }
};

// Two places for q, k and v of a unit lie one after the other at `shared`, of `rows` tokens each; then where each token
// of a group is, and of the unit of each place which tokens exist. CUT: units may reach beyond the map.
template <class P, int DP, bool CUT, bool KEPT>
struct Walk {
  using T = typename P::Element;
  using Mine = Pieces<DP / 8>;
  static constexpr int ROW = P::stride(DP) * sizeof(T);
  static constexpr int WORDS = 9;  // of 32 tokens each a word of bits, and whether any is missing

  const Walked<T>& given;
  Mine mine;
  int first_row;  // of the warp
  const int head, rows;
  int left;  // units, with the one that is computed
  Position next;
  int* const places;
  uint32_t* const masks;
  Addresses<const T, DP, KEPT> query, key, value;
  Addresses<T, DP, KEPT> out;
  uint32_t buffer = 0;  // bytes to the place of the unit that is computed
  uint32_t at;          // of a lane's first piece
  uint32_t whole = 0;   // a bit for each row that a lane moves
  uint32_t moved = 0;   // a bit for each row of the unit that is computed, from bit 8 on of the next

  static __device__ __forceinline__ int* places_of(unsigned char* shared, int rows) {
    return reinterpret_cast<int*>(shared + 6 * rows * ROW);
  }
  // By all threads; a barrier has to follow.
  static __device__ __forceinline__ void find_places(const Walked<T>& given, unsigned char* shared, int rows) {
    const Groups& groups = given.groups;
    const int columns = groups.windows ? groups.pw : groups.width / groups.pw;
    const int down = groups.windows ? 1 : groups.ph, across = groups.windows ? 1 : groups.pw;
    const int token = threadIdx.x, y = token / columns, x = token - y * columns;
    if (token < rows) places_of(shared, rows)[token] = token < given.tokens ? (y * down) << 16 | x * across : -1;
  }

  __device__ __forceinline__ Walk(const Walked<T>& given, unsigned char* shared, int rows)
      : given(given),
        head(blockIdx.x % given.groups.heads),
        rows(rows),
        left(min(given.steps, given.items - static_cast<int>(blockIdx.x) / given.groups.heads * given.steps)),
        next(given.groups, blockIdx.x / given.groups.heads * given.steps),
        places(places_of(shared, rows)),
        masks(reinterpret_cast<uint32_t*>(places + rows)) {
    begin();
    int tokens[Mine::COUNT];
    mine.find(tokens, places + first_row);
    query.begin(given.query, mine, tokens), key.begin(given.key, mine, tokens);
    value.begin(given.value, mine, tokens), out.begin(given.out, mine, tokens);
#pragma unroll
    for (int i = 0; i < Mine::COUNT; i++) whole |= (tokens[i] >= 0) << i;
    if (KEPT) find(), out.find(given.out, given, next, head);
    load_unit(0);
  }
  // Which rows a lane moves is found anew for each unit, if it is not kept: the compiler is told that its index may
  // have changed.
  __device__ __forceinline__ void begin() {
    int thread = threadIdx.x;
    if constexpr (!KEPT) asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    first_row = thread >> 5 << 4;
    mine.row = (thread & 31) / (DP / 8), mine.piece = (thread & 31) % (DP / 8);
    at = shared_address(places) - 6 * rows * ROW + (first_row + mine.row) * ROW + mine.piece * 16;
  }

  __device__ __forceinline__ void find() {
    query.find(given.query, given, next, head), key.find(given.key, given, next, head);
    value.find(given.value, given, next, head);
  }
  __device__ __forceinline__ void load(
      const Addresses<const T, DP, KEPT>& from, const Map<const T>& map, int channels, uint32_t to) const {
    const bool there = mine.piece * 8 < channels;
#pragma unroll
    for (int i = 0; i < Mine::COUNT; i++) {
      if (mine.some() && mine.has(i)) {
        const char* const at = from.of(map, mine, i, places + first_row);
        copy_async_if<16>(to + i * Mine::STEP * ROW, at, there && (moved >> (8 + i) & 1));
      }
    }
  }
  __device__ __forceinline__ void load_unit(uint32_t to) {
    uint32_t next_rows;
    if constexpr (KEPT) {
      next_rows = whole;
    } else {
      begin();
      int tokens[Mine::COUNT];
      mine.find(tokens, places + first_row);
      next_rows = 0;
#pragma unroll
      for (int i = 0; i < Mine::COUNT; i++) next_rows |= (tokens[i] >= 0) << i;
    }
    if constexpr (CUT) {
      uint32_t* const words = masks + (to > 0) * WORDS;
      const bool cut = next.cut(given);
      if (cut) {
        next_rows = 0;
#pragma unroll
        for (int i = 0; i < Mine::COUNT; i++) {
          next_rows |= next.has(given, places[first_row + min(mine.row + i * Mine::STEP, 15)]) << i;
        }
        const int token = 2 * first_row + lane_id();
        if (2 * first_row < rows) {
          const bool there = token < rows && next.has(given, places[token]);
          words[first_row / 16] = __ballot_sync(~0u, there);
        }
      }
      if (lane_id() == 0) words[WORDS - 1] = cut;
    }
    moved |= next_rows << 8;
    if (!KEPT) find();
    load(query, given.query, given.channels, at + to);
    load(key, given.key, given.channels, at + to + rows * ROW);
    load(value, given.value, given.value_channels, at + to + 2 * rows * ROW);
    commit_copies();
  }
  __device__ __forceinline__ bool more() const { return left > 0; }
  // Waits for the rows of the next unit, which then is the one to compute, and begins to bring those of the one after
  // it.
  __device__ __forceinline__ void enter() {
    wait_copies<0>();
    __syncthreads();
    moved >>= 8;
    if constexpr (!KEPT) {
      // To registers again when they are needed.
      out.find(given.out, given, next, head);
      if (lane_id() == 0) *place_of_out() = out.at - reinterpret_cast<const char*>(given.out.at), slot()[2] = left;
    }
    if (left > 1) {
      const bool neighbour = ++next.gx < given.groups.across;
      if (!neighbour) {
        next.gx = 0;
        if (++next.gy == given.groups.down) next.gy = 0, next.batch++;
      }
      if (KEPT && neighbour) {
        query.advance(given.query, given), key.advance(given.key, given);
        value.advance(given.value, given);
      } else if (KEPT) {
        find();
      }
      load_unit(other());
    }
  }
  // Of a warp, for what registers do not keep while it computes.
  __device__ __forceinline__ uint32_t* slot() const { return masks + 2 * WORDS + 4 * (threadIdx.x >> 5); }
  __device__ __forceinline__ int64_t* place_of_out() const { return reinterpret_cast<int64_t*>(slot()); }
  __device__ __forceinline__ uint32_t other() const { return 6 * rows * ROW / 2 - buffer; }
  // Of the unit that is computed: whether tokens are missing, and a word for each 32 of them.
  __device__ __forceinline__ const uint32_t* words() const { return masks + (buffer > 0) * WORDS; }
  __device__ __forceinline__ bool cut() const { return CUT && words()[WORDS - 1] != 0; }
  // Out from the place of q, by the warp that left it there.
  __device__ __forceinline__ void store() {
    if constexpr (!KEPT) {
      begin();
      out.at = reinterpret_cast<const char*>(given.out.at) + *place_of_out();
    }
    if (!mine.some() || mine.piece * 8 >= given.value_channels) return;
#pragma unroll
    for (int i = 0; i < Mine::COUNT; i++) {
      if (!mine.has(i)) continue;
      uint4 all;
      load_shared(all, at + buffer + i * Mine::STEP * ROW);
      const char* const to = out.of(given.out, mine, i, places + first_row);
      if (moved >> i & 1) store_word(const_cast<char*>(to), all);
    }
  }
  __device__ __forceinline__ void leave() {
    if (KEPT && next.gx > 0) {
      out.advance(given.out, given);
    } else if (KEPT) {
      out.find(given.out, given, next, head);
    }
    buffer = other();
    if (!KEPT) left = static_cast<int>(slot()[2]);
    left--;
  }
};

}  // namespace mvk::attention
