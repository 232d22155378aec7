// Makes an instruction of a function of one lane's values, whose parameters say the operands' types.
#pragma once

#include <algorithm>
#include <bit>
#include <string>
#include <utility>

#include "machine.h"

namespace ptx {

using Half = _Float16;

struct Bfloat {  // rounds to nearest, ties to even
  uint16_t bits;
  Bfloat() = default;
  explicit Bfloat(float x) {
    const uint32_t word = std::bit_cast<uint32_t>(x);
    bits = x != x ? 0x7fff : static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

template <auto F, class Result, class... Operands, size_t... I>
void apply(Warp& warp, const Instruction& in, Mask active, Result (*)(Operands...), std::index_sequence<I...>) {
  Result result[LANES];
  for (int lane = 0; lane < LANES; lane++) result[lane] = F(warp.lanes<Operands>(in.operand[I + 1])[lane]...);
  warp.put(in.operand[0], result, active, (warp.defined(in.operand[I + 1]) & ... & ALL));
}

template <auto F>
constexpr auto pointer_to() {
  if constexpr (std::is_pointer_v<decltype(F)>)
    return F;
  else
    return +F;
}

template <class Result, class... Operands>
constexpr size_t parameters(Result (*)(Operands...)) {
  return sizeof...(Operands);
}

template <auto F>
void lanewise(const std::string& name, Class kind) {
  opcodes()[name] = {
      [](Warp& warp, const Instruction& in, Mask active) {
        apply<F>(warp, in, active, pointer_to<F>(), std::make_index_sequence<parameters(pointer_to<F>())>{});
      },
      kind};
}

// The same on both halves of 32 bits.
template <class H, auto F>
void in_pairs(const std::string& name, Class kind) {
  opcodes()[name] = {
      [](Warp& warp, const Instruction& in, Mask active) {
        const H *a = warp.lanes<H>(in.operand[1]), *b = warp.lanes<H>(in.operand[2]);
        H result[2 * LANES];
        for (int half = 0; half < 2 * LANES; half++) result[half] = F(a[half], b[half]);
        warp.put(
            in.operand[0], reinterpret_cast<uint32_t*>(result), active,
            warp.halves(in.operand[1]) & warp.halves(in.operand[2]));
      },
      kind};
}

// setp, and for half types setp of both halves of 32 bits into two predicates.
template <class T, auto F>
void comparison(const std::string& how, const std::string& type) {
  opcodes()["setp." + how + "." + type] = {
      [](Warp& warp, const Instruction& in, Mask active) {
        const T *a = warp.lanes<T>(in.operand[1]), *b = warp.lanes<T>(in.operand[2]);
        Mask result = 0;
        for (int lane = 0; lane < LANES; lane++) result |= Mask(F(a[lane], b[lane])) << lane;
        warp.put_predicate(in.operand[0], result, active, warp.defined(in.operand[1]) & warp.defined(in.operand[2]));
      },
      PREDICATE};
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>) {
    opcodes()["setp." + how + "." + type + "x2"] = {
        [](Warp& warp, const Instruction& in, Mask active) {
          const T *a = warp.lanes<T>(in.operand[2]), *b = warp.lanes<T>(in.operand[3]);
          const Defined defined = warp.halves(in.operand[2]) & warp.halves(in.operand[3]);
          for (int half = 0; half < 2; half++) {
            Mask result = 0;
            for (int lane = 0; lane < LANES; lane++) result |= Mask(F(a[2 * lane + half], b[2 * lane + half])) << lane;
            warp.put_predicate(in.operand[half], result, active, defined.of(half));
          }
        },
        PREDICATE};
  }
}

}  // namespace ptx
