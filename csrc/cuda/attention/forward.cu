// Softmax attention inside groups of pixels, forward.
//
// A team of warps has one unit. It brings k and v of the unit to shared memory, once; then each warp takes 16 queries at
// a time, whose rows it prefetches for itself. Scores of 64 keys are in registers, and their probabilities become the
// left operand of the product with v there. Larger groups go over their keys with a running maximum. q, k, v and out
// move once; out leaves by way of the place of its queries, in whole rows.
#include "bias.cuh"
#include "products.cuh"
#include "rows.cuh"

namespace mvk::attention {

template <typename T>
struct Forward {
  Map<const T> query, key, value;
  Map<T> out;
  OrderedBias<T> bias;
  Groups groups;
  int channels, value_channels;
  float scale, scale2;  // scale2: scale times log2(e)

  // Scores are multiplied before the maximum is looked for where there is a bias, and where that turns their order.
  __device__ __forceinline__ bool scaled() const { return bias.exists() || scale2 <= 0; }
  // By what scores are multiplied after that.
  __device__ __forceinline__ float factor() const { return scaled() ? LOG2E : scale2; }
};

// What a warp knows of its 16 queries: sums of 2^(score factor - offset) times values, and of these weights; `top` is the
// score that the offset is made of, of rows lane / 4 and lane / 4 + 8. It is the highest of the keys that were
// searched for it: `careful` says that the next keys have to be.
template <class P, int DP>
struct Queries {
  Channels<P, DP> q;
  float o[DP / 8][4];
  float top[2] = {-INFINITY, -INFINITY}, offset[2], total[2] = {0.0f, 0.0f};
  bool careful = true;
};

// Adds the keys of TILES times 16 rows, whose first is at `key`, and says whether it could: if not, because a weight
// became too large, they have to be added again, with care. A later key may well be higher than `top`: to up to 2^15
// weights are as accurate as ever, and neither need a maximum to be looked for nor the sums to be made smaller.
template <class P, int DP, bool PLAIN, int TILES>
__device__ __forceinline__ bool add_keys(
    Queries<P, DP>& to, const Forward<typename P::Element>& given, const Unit& unit, const uint32_t* masks,
    uint32_t key, uint32_t value, const typename P::Element* bias, int first, float factor, const Lanes<P, DP>& lanes) {
  constexpr int ROWS = 16 * P::stride(DP) * sizeof(typename P::Element);
  using Order = OrderedBias<typename P::Element>;
  const bool biased = !PLAIN && given.bias.exists();
  float s[TILES][2][4];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    to.q.template multiply<false>(s[j], key + j * ROWS, lanes);
    if (biased) {
      Order::add(s[j], given.scale, bias + (first + j) * 256);
    } else if (!PLAIN && given.scale2 <= 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) s[j][i / 4][i % 4] *= given.scale;
    }
    // A bias is -inf beyond the last token.
    if (!PLAIN && (biased ? unit.cut : !unit.full)) mask_columns(s[j], masks[first + j], -INFINITY);
  }
  if (to.careful) {
    float highest[2] = {to.top[0], to.top[1]};
#pragma unroll
    for (int i = 0; i < 8 * TILES; i++) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], s[i / 8][i / 4 % 2][i % 4]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(~0u, highest[r], 1));
      highest[r] = fmaxf(highest[r], __shfl_xor_sync(~0u, highest[r], 2));
      // A row of -inf alone must come out as NaN (0 / 0), without -inf - -inf on the way.
      const float used = highest[r] == -INFINITY ? 0.0f : highest[r];
      const float shrink = exp2_fast((to.top[r] - used) * factor);
      to.total[r] *= shrink;
#pragma unroll
      for (int i = 0; i < DP / 4; i++) to.o[i / 2][2 * r + i % 2] *= shrink;
      to.top[r] = highest[r];
      to.offset[r] = used * factor;
    }
  }
  // Weights are summed as they are multiplied, rounded: of a row with one weight the result is that key's value. A sum of
  // operands is a product with ones, and no sum over the lanes of a row is left to do.
  float total[2] = {};
  typename P::template Left<16> p[TILES];
  if constexpr (P::ROUNDED) {
    typename P::template Right<16> ones;
    P::set_ones(ones);
    float sums[4] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
      for (int i = 0; i < 8; i++)
        s[j][i / 4][i % 4] = exp2_fast(fmaf(s[j][i / 4][i % 4], factor, -to.offset[i / 2 % 2]));
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
        x = exp2_fast(fmaf(x, factor, -to.offset[i / 2 % 2]));
        parts[i / 2 % 2][i % 2] += x;
      }
      P::from_sums(p[j], s[j][0], s[j][1]);
    }
    total[0] = parts[0][0] + parts[0][1], total[1] = parts[1][0] + parts[1][1];
  }
  if (to.careful) {
    to.careful = __any_sync(~0u, to.top[0] == -INFINITY || to.top[1] == -INFINITY);
  } else if (__any_sync(~0u, !(fmaxf(total[0], total[1]) < 32768.0f))) {
    to.careful = true;
    return false;
  }
  to.total[0] += total[0], to.total[1] += total[1];
#pragma unroll
  for (int j = 0; j < TILES; j++) add_tokens<P, DP / 8>(to.o, p[j], value + j * ROWS, lanes);
  return true;
}

// PLAIN: every unit has a token in each row, there is no bias, and the scale is above 0.
template <class P, int DP, bool PLAIN>
__device__ __forceinline__ void forward(const Forward<typename P::Element>& given, unsigned char* shared, int warps) {
  using T = typename P::Element;
  constexpr int STRIDE = P::stride(DP), SIZE = sizeof(T), COLUMNS = DP / 8;
  // Times 16 keys, whose scores are in registers; from sm_100 on the compiler needs more of these for float32.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int FLOATS = DP <= 24 ? 4 : DP <= 48 ? 2 : 1;
#else
  constexpr int FLOATS = DP <= 40 ? 4 : DP <= 48 ? 2 : 1;
#endif
  constexpr int AT_ONCE = !P::HALF ? FLOATS : PLAIN && DP > 48 ? 2 : 4;
  const Groups& groups = given.groups;
  const int rows = groups.rows, team = 1 << groups.team_bits, lane = lane_id(), warp = threadIdx.x >> 5;
  const int units = warps >> groups.team_bits, mine = warp >> groups.team_bits, member = warp & (team - 1),
            index = threadIdx.x & (32 * team - 1);
  // A team beyond the last unit has that unit again, and stores nothing.
  const int which = blockIdx.x * units + mine;
  const Unit unit = unit_of(groups, PLAIN ? min(which, groups.units - 1) : which);

  T* const keys = reinterpret_cast<T*>(shared) + mine * 2 * rows * STRIDE;
  T* const own = reinterpret_cast<T*>(shared) + (units * 2 * rows + warp * 32) * STRIDE;
  int* const pixels = reinterpret_cast<int*>(reinterpret_cast<T*>(shared) + (units * 2 * rows + warps * 32) * STRIDE) +
                      mine * (rows + rows / 16);
  uint32_t* const masks = reinterpret_cast<uint32_t*>(pixels + rows);
  find_tokens(groups, unit, pixels, masks, index, 32 * team);
  __syncthreads();

  const Map<const T> query = given.query.of(unit);
  const Map<T> out = given.out.of(unit);
  const int query_width = query.width(), out_width = out.width();
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    const Map<const T> map = i == 0 ? given.key.of(unit) : given.value.of(unit);
    const int channels = i == 0 ? given.channels : given.value_channels;
    load_unit_rows<T, DP, STRIDE, PLAIN>(keys + i * rows * STRIDE, map, channels, pixels, rows, member, team);
  }

  const float factor = PLAIN ? given.scale2 : given.factor();
  const uint32_t values = rows * STRIDE * SIZE;
  Lanes<P, DP> lanes;
  if constexpr (DP < 64) lanes.keep();
  int buffer = 16;
  for (int tile = member - team; tile < 0 || tile * 16 < rows; tile += team, buffer ^= 16) {
    T* const here = own + buffer * STRIDE;
    if ((tile + team) * 16 < rows) {
      T* const next = own + (buffer ^ 16) * STRIDE;
      load_rows<T, DP, STRIDE, PLAIN>(next, query, query_width, given.channels, pixels + (tile + team) * 16);
    }
    if (tile < 0) {
      wait_copies<0>();
      __syncthreads();
      continue;
    }
    Queries<P, DP> queries;
    queries.q.load(shared_address(here), lanes);
#pragma unroll
    for (int i = 0; i < 4 * COLUMNS; i++) queries.o[i / 4][i % 4] = 0.0f;

    uint32_t at = shared_address(keys);
    int first = 0;
    const T* const bias = PLAIN ? nullptr : given.bias.template row<false>(unit.head, tile);
#pragma unroll 1
    while (first + AT_ONCE <= rows / 16) {
      if (add_keys<P, DP, PLAIN, AT_ONCE>(queries, given, unit, masks, at, at + values, bias, first, factor, lanes)) {
        first += AT_ONCE, at += AT_ONCE * 16 * STRIDE * SIZE;
      }
    }
    if constexpr (AT_ONCE > 1) {
#pragma unroll 1
      while (first < rows / 16) {
        if (add_keys<P, DP, PLAIN, 1>(queries, given, unit, masks, at, at + values, bias, first, factor, lanes)) {
          first++, at += 16 * STRIDE * SIZE;
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float total = queries.total[r];
      if constexpr (!P::ROUNDED) {
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
      }
      const float over = reciprocal_fast(total);
      const uint32_t at = shared_address(here) + ((lane / 4 + 8 * r) * STRIDE + 2 * (lane & 3)) * SIZE;
#pragma unroll
      for (int n = 0; n < COLUMNS; n++)
        P::store(at + n * 8 * SIZE, queries.o[n][2 * r] * over, queries.o[n][2 * r + 1] * over);
    }
    __syncwarp();
    if (!PLAIN || which < groups.units)
      store_rows<T, DP, STRIDE, PLAIN>(here, out, out_width, given.value_channels, pixels + tile * 16);
    wait_copies<0>();
    __syncwarp();
  }
}

}  // namespace mvk::attention

#define FORWARD(NAME, TYPE, PRODUCTS, PLAIN, WARPS, BLOCKS, DP)                                                      \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) attention_forward_##NAME##_##DP(                  \
      const TYPE* q, const TYPE* k, const TYPE* v, TYPE* o, const TYPE* bias, int64_t qb, int64_t qh, int64_t kb,    \
      int64_t kh, int64_t vb, int64_t vh, int64_t ob, int64_t oh, int qd, int qy, int qx, int kd, int ky, int kx,    \
      int vd, int vy, int vx, int od, int oy, int ox, int tiles, int d, int dv, int heads, int height, int width,    \
      int ph, int pw, int sy, int sx, int down, int across, int windows, int units, int rows, int team, float scale, \
      float scale2) {                                                                                                \
    extern __shared__ __align__(16) unsigned char global_smem[];                                                     \
    mvk::attention::forward<PRODUCTS, DP, PLAIN>(                                                                    \
        {{q, qb, qh, qd, qy, qx},                                                                                    \
         {k, kb, kh, kd, ky, kx},                                                                                    \
         {v, vb, vh, vd, vy, vx},                                                                                    \
         {o, ob, oh, od, oy, ox},                                                                                    \
         {bias, heads, tiles},                                                                                       \
         {heads, height, width, ph, pw, sy, sx, down, across, windows, units, rows, team},                           \
         d,                                                                                                          \
         dv,                                                                                                         \
         scale,                                                                                                      \
         scale2},                                                                                                    \
        global_smem, WARPS);                                                                                         \
  }
// BLOCKS a processor: masks, a bias and 64 channels want more registers than four leave.
#define FORWARDS_OF_HALVES(BLOCKS, DP)                                   \
  FORWARD(bf16, mvk::bf16, mvk::Halves<mvk::bf16>, false, 4, BLOCKS, DP) \
  FORWARD(bf16_plain, mvk::bf16, mvk::Halves<mvk::bf16>, true, 4, 4, DP) \
  FORWARD(f16, mvk::f16, mvk::Halves<mvk::f16>, false, 4, BLOCKS, DP)    \
  FORWARD(f16_plain, mvk::f16, mvk::Halves<mvk::f16>, true, 4, 4, DP)
#define FORWARDS(BLOCKS, DP)                               \
  FORWARDS_OF_HALVES(BLOCKS, DP)                           \
  FORWARD(f32, float, mvk::Singles<true>, false, 8, 1, DP) \
  FORWARD(tf32, float, mvk::Singles<false>, false, 8, 1, DP)

FORWARDS(4, 16)
FORWARDS(4, 24)
FORWARDS(4, 32)
FORWARDS(3, 40)
FORWARDS(3, 48)
FORWARDS_OF_HALVES(3, 64)
