// Sums of 16 queries of a warp of the forward, and how keys are added to them.
#pragma once

#include "ordered_bias.cuh"
#include "products.cuh"

namespace mvk::attention {

// What a warp knows of its 16 queries: sums of 2^((score - used) factor) times values, and of these weights. `used` is
// `top`, of rows lane / 4 and lane / 4 + 8, or 0 if that is -inf: it is subtracted before it is multiplied, so that no
// rounding of it is left however high scores are. `top` is the highest of the keys that were
// searched for it: `careful` says that the next keys have to be. A later key may well be higher: to up to 2^15 weights
// are as accurate as ever, and neither need a maximum to be looked for nor the sums to be made smaller. Where the sum
// of weights is more, keys are added once more, with care: of ANY keys and of PLAIN ones those that were added last, of
// others, whose loop is then without a branch, all keys, `always` with care.
template <class P, int DP>
struct Queries {
  Channels<P, DP> q;
  float o[DP / 8][4];
  float top[2], used[2], total[2];
  bool careful = true, always = false;

  __device__ __forceinline__ void begin() {
    top[0] = top[1] = -INFINITY, total[0] = total[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < DP / 2; i++) o[i / 4][i % 4] = 0.0f;
  }
  // After all keys: whether they have to be added again.
  __device__ __forceinline__ bool again() {
    if (always || !__any_sync(~0u, !(fmaxf(total[0], total[1]) < 32768.0f))) return false;
    careful = always = true;
    return true;
  }
};

// What keys may be: without a bias, all there, a scale above 0; anything; with a bias, all there; with one, some
// missing.
enum class Keys { PLAIN, ANY, BIASED, CUT };

// Adds the keys of TILES times 16 rows, whose first is at `key`, and says whether it could, or has to be called again.
// `bias` is that of the first tile; `masks` say of each 16 keys which exist, where `missing` says that some do not.
template <class P, int DP, Keys KEYS, int TILES, typename MASK>
__device__ __forceinline__ bool add_keys(
    Queries<P, DP>& to, const Scores<typename P::Element>& given, bool missing, const MASK* masks, uint32_t key,
    uint32_t value, const typename P::Element* bias, float factor, const Lanes<P, DP>& lanes) {
  constexpr int ROWS = 16 * P::stride(DP) * sizeof(typename P::Element);
  using Order = OrderedBias<typename P::Element>;
  const bool biased = KEYS == Keys::ANY ? given.bias.exists() : KEYS != Keys::PLAIN;
  constexpr bool CHECKED = KEYS == Keys::PLAIN || KEYS == Keys::ANY;
  float s[TILES][2][4];
  // All reads of a bias go on while the products are computed; where there may be none, registers are wanted elsewhere.
  constexpr int AHEAD = CHECKED ? 1 : TILES;
  typename Order::Words words[AHEAD];
  if constexpr (!CHECKED) {
#pragma unroll
    for (int j = 0; j < TILES; j++) Order::load(words[j % AHEAD], bias + j * 256);
  }
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    to.q.template multiply<false>(s[j], key + j * ROWS, lanes);
    if (biased) {
      if constexpr (CHECKED) Order::load(words[0], bias + j * 256);
      Order::add(s[j], given.scale, words[j % AHEAD]);
    } else if (KEYS == Keys::ANY && given.scale2 <= 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[j][i / 4][i % 4] *= given.scale;
    }
    if (KEYS == Keys::ANY ? missing : KEYS == Keys::CUT) mask_columns(s[j], masks[j], -INFINITY);
  }
  if (to.careful) {
    float highest[2] = {to.top[0], to.top[1]};
#pragma unroll
    for (int i = 0; i < 8 * TILES; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s[i / 8][i / 4 % 2][i % 4]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      highest[r] = max_of_row(highest[r]);
      // A row of -inf alone must come out as NaN (0 / 0), without -inf - -inf on the way.
      to.used[r] = highest[r] == -INFINITY ? 0.0f : highest[r];
      const float shrink = exp2_fast((to.top[r] - to.used[r]) * factor);
      to.total[r] *= shrink;
#pragma unroll
      for (int i = 0; i < DP / 4; i++) to.o[i / 2][2 * r + i % 2] *= shrink;
      to.top[r] = highest[r];
    }
  }
  // Weights are summed as they are multiplied, rounded: of a row with one weight the result is that key's value. A sum
  // of operands is a product with ones, and no sum over the lanes of a row is left to do.
  float total[2] = {};
  typename P::template Left<16> p[TILES];
  if constexpr (P::ROUNDED) {
    typename P::template Right<16> ones;
    P::set_ones(ones);
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[j][i / 4][i % 4] = exp2_fast((s[j][i / 4][i % 4] - to.used[i / 2 % 2]) * factor);
      P::from_sums(p[j], s[j][0], s[j][1]);
      P::template multiply<false>(sums, p[j], ones);
    }
    total[0] = sums[0], total[1] = sums[2];
  } else {
    float parts[2][2] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& x = s[j][i / 4][i % 4];
        x = exp2_fast((x - to.used[i / 2 % 2]) * factor);
        parts[i / 2 % 2][i % 2] += x;
      }
      P::from_sums(p[j], s[j][0], s[j][1]);
    }
    total[0] = parts[0][0] + parts[0][1], total[1] = parts[1][0] + parts[1][1];
  }
  if (to.careful) {
    to.careful = to.always || __any_sync(~0u, to.top[0] == -INFINITY || to.top[1] == -INFINITY);
  } else if (CHECKED && __any_sync(~0u, !(fmaxf(total[0], total[1]) < 32768.0f))) {
    to.careful = true;
    return false;
  }
  to.total[0] += total[0], to.total[1] += total[1];
#pragma unroll
  for (int j = 0; j < TILES; j++) add_tokens<P, DP / 8>(to.o, p[j], value + j * ROWS, lanes);
  return true;
}

}  // namespace mvk::attention
