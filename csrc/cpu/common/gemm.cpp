// The register tiles of matrix products: for each width and height one loop over k whose sums stay in registers.
#include "common/gemm.h"

namespace mvk {
namespace MVK_ISA {
namespace {

// M rows and V vectors.
template <class T, bool Adjacent, int V, int M>
static void tile(
    int64_t K, const T* a, int64_t am, int64_t ak, const T* b, int64_t ldb, T* c, int64_t ldc, const End<T>& end) {
  vec<T> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = vec<T>{};
  constexpr bool prefetches = !Adjacent && std::is_same_v<T, float>;
  const char* ahead = end.prefetch.at ? end.prefetch.at : reinterpret_cast<const char*>(b);
  auto step = [&]() __attribute__((always_inline)) {
    vec<T> bv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bv[v] = load<T>(b + v * W<T>);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vec<T> av = splat<T>(Adjacent ? a[m] : a[m * am]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += av * bv[v];
    }
    a += Adjacent ? ak : 1;
    b += ldb;
    if constexpr (prefetches) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += end.prefetch.step;
    }
  };
  int64_t k = K;
  for (; k >= 2; k -= 2) {
    step();
    step();
  }
  if (k) step();

  // Row after row, so that one pointer walks over them.
  auto each = [&](const auto& f) __attribute__((always_inline)) {
    T* row = c;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, row += ldc)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) f(acc[m][v], row, v);
  };
  // What is there is added last: sums of sums err less than one long chain.
  if (end.start == Start::from)
    each([](vec<T>& x, const T* row, int v) __attribute__((always_inline)) { x += load<T>(row + v * W<T>); });
  if (end.factor)
    each([&](vec<T>& x, const T*, int v) __attribute__((always_inline)) { x *= load<T>(end.factor + v * W<T>); });
  if (end.rectified) each([](vec<T>& x, const T*, int) __attribute__((always_inline)) { x = relu<T>(x); });
  if (end.bias)
    each([&](vec<T>& x, const T*, int v) __attribute__((always_inline)) { x += load<T>(end.bias + v * W<T>); });
  if (end.plus) {
    const T* row = end.plus;
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m, row += end.ldp)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += load<T>(row + v * W<T>);
  }
  each([](vec<T>& x, T* row, int v) __attribute__((always_inline)) { store<T>(row + v * W<T>, x); });
  if (end.top) {
    vec<T> most[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) most[v] = load<T>(end.top + v * W<T>);
    each([&](vec<T>& x, const T*, int v) __attribute__((always_inline)) { most[v] = maximum<T>(most[v], x); });
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store<T>(end.top + v * W<T>, most[v]);
  }
}

template <class T, bool Adjacent, int V, class Rows = std::make_index_sequence<rows_of_tile(V)>>
struct OfWidth;
template <class T, bool Adjacent, int V, size_t... I>
struct OfWidth<T, Adjacent, V, std::index_sequence<I...>> {
  static constexpr Tile<T>* by_rows[] = {tile<T, Adjacent, V, int(I) + 1>...};
};

}  // namespace

template <class T, bool Adjacent>
Tile<T>* const* const TilesByWidth<T, Adjacent>::of[4] = {
    OfWidth<T, Adjacent, 1>::by_rows, OfWidth<T, Adjacent, 2>::by_rows, OfWidth<T, Adjacent, 3>::by_rows,
    OfWidth<T, Adjacent, 4>::by_rows};
template struct TilesByWidth<float, false>;
template struct TilesByWidth<float, true>;
template struct TilesByWidth<double, false>;
template struct TilesByWidth<double, true>;

}  // namespace MVK_ISA
}  // namespace mvk
