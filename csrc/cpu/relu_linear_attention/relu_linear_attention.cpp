// ReLU linear attention on CPUs, forward and backward. Chunks of pixels are added up in order: no atomics.
#include "common/linear_stages.h"

namespace mvk {
namespace MVK_ISA {
namespace {

struct Unit {
  int64_t item, b, h, chunk;
  Unit(const LinearAttention& a, int64_t unit)
      : item(unit / a.chunks), b(item / a.heads), h(item % a.heads), chunk(unit % a.chunks) {}
};

template <class T>
static Head<T> head(const LinearAttention& a, const Map& map, const Unit& u, const Scratch<T>& s, int table) {
  return Head<T>(a.dtype, map, u.b, u.h, a.D, a.H, a.W, s.tables[table]);
}
template <class T>
static T* kv_of(const LinearAttention& a, const Unit& u) {
  return static_cast<T*>(a.kv) + u.item * a.D * a.D;
}
template <class T>
static T* keys_of(const LinearAttention& a, const Unit& u) {
  return static_cast<T*>(a.keys) + u.item * a.D;
}
template <class T>
static T* partial_of(const LinearAttention& a, const Unit& u) {
  return static_cast<T*>(a.partial) + u.item * a.chunks * a.partial_size();
}

template <class T>
static void forward(const LinearAttention& a, int64_t begin, int64_t end) {
  Scratch<T> s(a.D, a.pixels(), a.eps);
  arena.reset(s.bytes(), a.poison);
  s.take(arena);
  const int64_t D = a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u(a, unit);
    int64_t n0, n1;
    part_of<T>(a.pixels(), u.chunk, a.chunks, n0, n1);
    if (a.stage == Stage::rest) {
      merge_sums(D, a.chunks, partial_of<T>(a, u), a.partial_size(), s.sums, s.ldk);
    } else {
      fill(s.sums, (D + 1) * s.ldk, T(0));
      add_sums<T>(head(a, a.key, u, s, 0), head(a, a.value, u, s, 1), head(a, a.query, u, s, 2), n0, n1, s);
    }
    if (a.stage == Stage::sums) {
      T* to = partial_of<T>(a, u) + u.chunk * a.partial_size();
      give_sums(D, s.sums, s.ldk, to, to + D * D);
    } else {
      if (u.chunk == 0 && a.kv) give_sums(D, s.sums, s.ldk, kv_of<T>(a, u), keys_of<T>(a, u));
      const Unit after(a, unit + 1 < end ? unit + 1 : unit);
      const auto keys = head(a, a.key, after, s, 0), values = head(a, a.value, after, s, 1);
      const bool more = unit + 1 < end && a.stage == Stage::all;
      outputs<T>(
          head(a, a.query, u, s, 0), head(a, a.out, u, s, 1), n0, n1, s, more ? &keys : nullptr,
          more ? &values : nullptr);
    }
  }
}

template <class T>
static void backward(const LinearAttention& a, int64_t begin, int64_t end) {
  Scratch<T> s(a.D, a.pixels(), a.eps);
  arena.reset(s.bytes(), a.poison);
  s.take(arena);
  const int64_t D = a.D;
  for (int64_t unit = begin; unit < end; ++unit) {
    const Unit u(a, unit);
    int64_t n0, n1;
    part_of<T>(a.pixels(), u.chunk, a.chunks, n0, n1);
    const int64_t first = s.step(n1 - n0) < n1 - n0 ? s.step(n1 - n0) : n1 - n0;
    if (a.stage == Stage::rest) {
      merge_sums(D, a.chunks, partial_of<T>(a, u), a.partial_size(), s.dsums, s.ldk);
    } else {
      take_sums(D, kv_of<T>(a, u), keys_of<T>(a, u), s.sums, s.ldk);
      fill(s.dsums, (D + 1) * s.ldk, T(0));
      Next then;
      if (a.stage == Stage::all) {
        then.add(head(a, a.key, u, s, 0), n0, first), then.add(head(a, a.value, u, s, 1), n0, first);
        then.add(head(a, a.dkey, u, s, 2), n0, first), then.add(head(a, a.dvalue, u, s, 3), n0, first);
      }
      query_gradients<T>(
          head(a, a.query, u, s, 0), head(a, a.grad, u, s, 1), head(a, a.dquery, u, s, 2), n0, n1, s, then);
    }
    if (a.stage == Stage::sums) {
      T* to = partial_of<T>(a, u) + u.chunk * a.partial_size();
      give_sums(D, s.dsums, s.ldk, to, to + D * D);
    } else {
      Next then;
      if (a.stage == Stage::all && unit + 1 < end) {
        const Unit v(a, unit + 1);
        then.add(head(a, a.query, v, s, 0), n0, first), then.add(head(a, a.grad, v, s, 1), n0, first);
        then.add(head(a, a.dquery, v, s, 2), n0, first);
      }
      key_gradients<T>(
          head(a, a.key, u, s, 0), head(a, a.value, u, s, 1), head(a, a.dkey, u, s, 2), head(a, a.dvalue, u, s, 3), n0,
          n1, s, then);
    }
  }
}

}  // namespace

extern const LinearAttentionKernels relu_linear_attention_kernels;
const LinearAttentionKernels relu_linear_attention_kernels = {
    by_dtype<forward<float>, forward<double>>, by_dtype<backward<float>, backward<double>>};

}  // namespace MVK_ISA
}  // namespace mvk
