// Which pixels attend to each other: a unit is one group of one head of one image of the batch.
//
// Patches: pixels (y0 + i ph, x0 + j pw), of which a map has ph * pw groups, not all of one size where the patch does
// not divide the map. Windows: rectangles of ph x pw pixels, the first at (sy, sx), which may reach beyond the map.
// Tokens of a window are numbered as if they did not, so that a bias is indexed by their numbers; what lies outside is
// zeros in shared memory, has no weight and is not stored.
//
// A team of 1 << team_bits warps has a unit to itself. Of each unit there are `rows` tokens in shared memory, a
// multiple of 16: where each token's pixel is, and of each 16 tokens a word that says which exist.
#pragma once

#include "../common/fragments.cuh"

namespace mvk::attention {

struct Groups {
  int heads, height, width, ph, pw, sy, sx, down, across, windows;
  int units, rows, team_bits;
};

struct Unit {
  int64_t batch, head;
  int y0, x0, tall, wide;  // tokens along both axes
  bool exists, full;       // full: all rows are tokens
  bool cut;                // some of the tokens of a whole group are missing
};

// Divides by a number that the host knows: n / it = (2 n by >> 32) >> shift, for 0 <= n < 2^31.
struct Divisor {
  uint32_t by;
  int shift;
  __device__ __forceinline__ int divide(int n) const {
    return static_cast<int>(__umulhi(2 * static_cast<uint32_t>(n), by) >> shift);
  }
};

// Of a group by its numbers along both axes. `exists` is left to who asks.
__device__ __forceinline__ Unit unit_at(const Groups& groups, int64_t batch, int gy, int gx, int head) {
  Unit unit;
  unit.batch = batch, unit.head = head;
  if (groups.windows) {
    unit.y0 = groups.sy + gy * groups.ph, unit.x0 = groups.sx + gx * groups.pw;
    unit.tall = groups.ph, unit.wide = groups.pw;
  } else {
    unit.y0 = gy, unit.x0 = gx;
    unit.tall = (groups.height - gy + groups.ph - 1) / groups.ph;
    unit.wide = (groups.width - gx + groups.pw - 1) / groups.pw;
  }
  unit.cut = false;  // of patches no token is missing: their groups may differ in size, but then there is no bias
  if (groups.windows) {
    unit.cut = unit.y0 < 0 || unit.x0 < 0;
    unit.cut |= unit.y0 + groups.ph > groups.height || unit.x0 + groups.pw > groups.width;
  }
  unit.full = !unit.cut && unit.tall * unit.wide == groups.rows;
  return unit;
}

__device__ __forceinline__ Unit unit_of(const Groups& groups, int index) {
  const int head = index % groups.heads, group = index / groups.heads, gx = group % groups.across;
  const int row = group / groups.across;
  Unit unit = unit_at(groups, row / groups.down, row % groups.down, gx, head);
  unit.exists = index < groups.units;
  unit.full &= unit.exists;
  return unit;
}

// By all lanes of a team's warps: the pixels of its unit's tokens, y << 16 | x, or -1; and which tokens exist.
__device__ __forceinline__ void find_tokens(
    const Groups& groups, const Unit& unit, int* pixels, uint32_t* masks, int index, int lanes) {
  const int down = groups.windows ? 1 : groups.ph, across = groups.windows ? 1 : groups.pw;
  for (int first = 0; first < groups.rows; first += lanes) {
    const int token = first + index;
    const int row = token / unit.wide;
    const int y = unit.y0 + row * down, x = unit.x0 + (token - row * unit.wide) * across;
    const bool keep = unit.exists && row < unit.tall && y >= 0 && x >= 0 && y < groups.height && x < groups.width;
    const uint32_t there = __ballot_sync(~0u, keep);
    if (token < groups.rows) {
      pixels[token] = keep ? y << 16 | x : -1;
      if ((token & 15) == 0) masks[token >> 4] = there >> (token & 16) & 0xffff;
    }
  }
}

}  // namespace mvk::attention
