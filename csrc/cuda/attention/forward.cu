// Softmax attention inside groups of pixels, forward: the groups, types and strides that small.cuh and large.cuh do not
// take.
//
// A team of warps has one unit. It brings k and v of the unit to shared memory, once. Then each warp takes 16 queries
// at a time, whose rows it copies for itself while it computes the 16 before. Scores of 16 to 64 keys are in registers,
// and their weights become the left operand of the product with v there. q, k, v and out move once; out leaves by way
// of the place of its queries, in whole rows.
#include "queries.cuh"
#include "rows.cuh"

namespace mvk::attention {

template <typename T>
struct Forward {
  Map<const T> query, key, value;
  Map<T> out;
  Scores<T> scores;
  Groups groups;
  int channels, value_channels;
};

// PLAIN: every unit has a token in each row, there is no bias, and the scale is above 0.
template <class P, int DP, bool PLAIN>
__device__ __forceinline__ void forward(const Forward<typename P::Element>& given, unsigned char* shared, int warps) {
  using T = typename P::Element;
  constexpr int STRIDE = P::stride(DP), SIZE = sizeof(T), COLUMNS = DP / 8;
  constexpr Keys KEYS = PLAIN ? Keys::PLAIN : Keys::ANY;
  // Times 16 keys, whose scores are in registers; from sm_100 on the compiler needs more of these.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  constexpr int FLOATS = DP <= 24 ? 4 : DP <= 48 ? 2 : 1, FEWER = 40;
#else
  constexpr int FLOATS = DP <= 40 ? 4 : DP <= 48 ? 2 : 1, FEWER = 64;
#endif
  constexpr int AT_ONCE = !P::HALF ? FLOATS : PLAIN && DP >= FEWER ? 2 : 4;
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

  // A bias is -inf beyond the last token.
  const bool missing = !PLAIN && (given.scores.bias.exists() ? unit.cut : !unit.full);
  const float factor = PLAIN ? given.scores.scale2 : given.scores.factor();
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
    const T* const bias = PLAIN ? nullptr : given.scores.bias.template row<false>(unit.head, tile);
    queries.begin();
    uint32_t at = shared_address(keys);
    int first = 0;
#pragma unroll 1
    while (first + AT_ONCE <= rows / 16) {
      if (add_keys<P, DP, KEYS, AT_ONCE>(
              queries, given.scores, missing, masks + first, at, at + values, bias + first * 256, factor, lanes)) {
        first += AT_ONCE, at += AT_ONCE * 16 * STRIDE * SIZE;
      }
    }
    if constexpr (AT_ONCE > 1) {
#pragma unroll 1
      while (first < rows / 16) {
        if (add_keys<P, DP, KEYS, 1>(
                queries, given.scores, missing, masks + first, at, at + values, bias + first * 256, factor, lanes)) {
          first++, at += 16 * STRIDE * SIZE;
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float total = queries.total[r];
      if constexpr (!P::ROUNDED) total = sum_of_row(total);
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
         {{bias, heads, tiles}, scale, scale2},                                                                      \
         {heads, height, width, ph, pw, sy, sx, down, across, windows, units, rows, team},                           \
         d,                                                                                                          \
         dv},                                                                                                        \
        global_smem, WARPS);                                                                                         \
  }
// BLOCKS a processor: masks, a bias and many channels want more registers than four leave.
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
