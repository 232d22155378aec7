// Instructions that work on each lane alone: integers, floats, predicates.
#include <cmath>
#include <concepts>
#include <limits>
#include <type_traits>

#include "lanewise.h"

namespace ptx {
namespace {

// A number in [-1, 1] that follows from the bits of another: the error of an approximation, as a part of its bound.
float part_of_bound(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x) * 2654435761u;
  bits ^= bits >> 15, bits *= 2246822519u, bits ^= bits >> 13;
  return bits & 1 ? 1.0f : -1.0f;
}

bool skewed = false;

// What an instruction of a documented relative error may give. Zero, infinity and NaN are exact.
float approximate(double exact, double bound, float seed) {
  const float rounded = static_cast<float>(exact);
  if (!skewed || rounded == 0 || !std::isfinite(rounded)) return rounded;
  return static_cast<float>(exact * (1 + bound * part_of_bound(seed)));
}

// Between a half and two its error is absolute, elsewhere relative.
float logarithm(float x) {
  const double exact = std::log2(static_cast<double>(x));
  if (!skewed || !(x > 0.5f && x < 2)) return approximate(exact, 0x1p-22, x);
  return static_cast<float>(exact + 0x1p-22 * part_of_bound(x));
}

float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Relative errors from the PTX ISA: "max relative error" of ex2, "2 ulp" of div.full, "1 ulp" of rcp, and so on.
constexpr double EX2 = 0x1p-22, DIV = 0x1p-22, RCP = 0x1p-23, RSQRT = 0x1.2p-23;

// The one NaN that instructions make.
template <class T>
T not_a_number() {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<T>(0x7fffffff);
  else
    return std::bit_cast<T>(0x7fffffffffffffff);
}

// Zero is greater than minus zero; of a number and NaN it is the number.
template <class T>
T maximum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (std::isnan(a)) return std::isnan(b) ? not_a_number<T>() : b;
    if (std::isnan(b)) return a;
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}
template <class T>
T minimum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (!std::isnan(a) || !std::isnan(b)) return -maximum(-a, -b);
    return not_a_number<T>();
  }
  return a < b ? a : b;
}
template <class T>
T maximum_or_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? not_a_number<T>() : maximum(a, b);
}
template <class T>
T minimum_or_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? not_a_number<T>() : minimum(a, b);
}

// Division by zero gives all ones on NVIDIA's processors; the ISA leaves it open.
template <class T>
T quotient(T a, T b) {
  return b == 0 ? static_cast<T>(-1) : b == static_cast<T>(-1) && std::is_signed_v<T> ? static_cast<T>(0 - a) : a / b;
}
template <class T>
T remainder(T a, T b) {
  return b == 0 ? a : b == static_cast<T>(-1) && std::is_signed_v<T> ? T{0} : a % b;
}

template <class T>
T shift_left(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? T{0} : static_cast<T>(a << by);
}
template <class T>
T shift_right(T a, uint32_t by) {
  if (by < sizeof(T) * 8) return static_cast<T>(a >> by);
  return a < 0 ? static_cast<T>(-1) : T{0};
}

template <class T>
T bit_field(T a, uint32_t from, uint32_t length) {
  using Word = std::make_unsigned_t<T>;
  constexpr uint32_t bits = 8 * sizeof(T);
  from &= 255, length &= 255;
  if (length == 0) return 0;
  const uint32_t top = std::min(from + length - 1, bits - 1);
  const bool sign = std::is_signed_v<T> && (static_cast<Word>(a) >> top & 1);
  const Word field = from >= bits ? 0 : static_cast<Word>(a) >> from;
  const uint32_t inside = from >= bits ? 0 : std::min(length, bits - from);
  const Word kept = inside >= bits ? ~Word{0} : static_cast<Word>((Word{1} << inside) - 1);
  return static_cast<T>((field & kept) | (sign ? ~kept : Word{0}));
}

// The low bits of a in place of a field of b.
uint32_t insert_field(uint32_t a, uint32_t b, uint32_t from, uint32_t length) {
  from &= 255, length &= 255;
  if (from > 31 || length == 0) return b;
  const uint32_t field = static_cast<uint32_t>((length >= 32 ? ~0ull : (1ull << length) - 1) << from);
  return (b & ~field) | (a << from & field);
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t select = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

template <class T>
void add_integers(const std::string& type) {
  using U = std::make_unsigned_t<T>;  // wraps around where a signed type may not
  lanewise<[](T a, T b) { return static_cast<T>(static_cast<U>(a) + static_cast<U>(b)); }>("add." + type, INTEGER);
  lanewise<[](T a, T b) { return static_cast<T>(static_cast<U>(a) - static_cast<U>(b)); }>("sub." + type, INTEGER);
  lanewise<[](T a, T b) { return static_cast<T>(uint64_t(a) * uint64_t(b)); }>("mul.lo." + type, INTEGER);
  lanewise<[](T a, T b, T c) { return static_cast<T>(uint64_t(a) * uint64_t(b) + uint64_t(c)); }>(
      "mad.lo." + type, INTEGER);
  using Product = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  lanewise<[](T a, T b) { return static_cast<T>(Product{a} * Product{b} >> (8 * sizeof(T))); }>(
      "mul.hi." + type, INTEGER);
  lanewise<quotient<T>>("div." + type, INTEGER);
  lanewise<remainder<T>>("rem." + type, INTEGER);
  lanewise<maximum<T>>("max." + type, INTEGER);
  lanewise<minimum<T>>("min." + type, INTEGER);
  lanewise<shift_right<T>>("shr." + type, INTEGER);
  if constexpr (std::is_signed_v<T>) {
    lanewise<[](T a) { return static_cast<T>(U{0} - static_cast<U>(a)); }>("neg." + type, INTEGER);
    lanewise<[](T a) { return static_cast<T>(a < 0 ? U{0} - static_cast<U>(a) : static_cast<U>(a)); }>(
        "abs." + type, INTEGER);
  }
}

template <class T, class Wide>
void add_wide(const std::string& type) {
  lanewise<[](T a, T b) { return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b)); }>(
      "mul.wide." + type, INTEGER);
  lanewise<[](T a, T b, Wide c) {
    return static_cast<Wide>(uint64_t(static_cast<Wide>(a) * static_cast<Wide>(b)) + uint64_t(c));
  }>("mad.wide." + type, INTEGER);
}

template <class T>
void add_bits(const std::string& type) {
  lanewise<[](T a, T b) { return static_cast<T>(a & b); }>("and." + type, INTEGER);
  lanewise<[](T a, T b) { return static_cast<T>(a | b); }>("or." + type, INTEGER);
  lanewise<[](T a, T b) { return static_cast<T>(a ^ b); }>("xor." + type, INTEGER);
  lanewise<[](T a) { return static_cast<T>(~a); }>("not." + type, INTEGER);
  lanewise<shift_left<T>>("shl." + type, INTEGER);
  lanewise<shift_right<T>>("shr." + type, INTEGER);
}

template <class T>
void add_floats(const std::string& type) {
  for (const char* rounding : {"", ".rn"}) {
    lanewise<[](T a, T b) { return a + b; }>(std::string("add") + rounding + "." + type, FLOAT);
    lanewise<[](T a, T b) { return a - b; }>(std::string("sub") + rounding + "." + type, FLOAT);
    lanewise<[](T a, T b) { return a * b; }>(std::string("mul") + rounding + "." + type, FLOAT);
  }
  lanewise<[](T a, T b, T c) { return std::fma(a, b, c); }>("fma.rn." + type, FLOAT);
  lanewise<[](T a, T b) { return a / b; }>("div.rn." + type, SPECIAL);
  lanewise<[](T a) { return std::sqrt(a); }>("sqrt.rn." + type, SPECIAL);
  lanewise<[](T a) { return T{1} / a; }>("rcp.rn." + type, SPECIAL);
  lanewise<maximum<T>>("max." + type, FLOAT);
  lanewise<minimum<T>>("min." + type, FLOAT);
  lanewise<[](T a) { return -a; }>("neg." + type, FLOAT);
  lanewise<[](T a) { return std::fabs(a); }>("abs." + type, FLOAT);
}

// With FTZ subnormal operands and results are zero.
template <bool FTZ>
float flushed(float x) {
  return FTZ ? flush(x) : x;
}

template <bool FTZ>
void add_approximations(const std::string& ftz) {
  lanewise<[](float a) { return flushed<FTZ>(approximate(std::exp2(double(flushed<FTZ>(a))), EX2, a)); }>(
      "ex2.approx" + ftz + ".f32", SPECIAL);
  lanewise<[](float a) { return flushed<FTZ>(logarithm(flushed<FTZ>(a))); }>("lg2.approx" + ftz + ".f32", SPECIAL);
  lanewise<[](float a) { return flushed<FTZ>(approximate(1 / double(flushed<FTZ>(a)), RCP, a)); }>(
      "rcp.approx" + ftz + ".f32", SPECIAL);
  lanewise<[](float a) { return flushed<FTZ>(approximate(1 / std::sqrt(double(flushed<FTZ>(a))), RSQRT, a)); }>(
      "rsqrt.approx" + ftz + ".f32", SPECIAL);
  lanewise<[](float a, float b) {
    return flushed<FTZ>(approximate(double(flushed<FTZ>(a)) / double(flushed<FTZ>(b)), DIV, a + b));
  }>("div.full" + ftz + ".f32", SPECIAL);
}

void add_flushing() {
  lanewise<maximum_or_nan<float>>("max.NaN.f32", FLOAT);
  lanewise<minimum_or_nan<float>>("min.NaN.f32", FLOAT);
  lanewise<[](float a) { return std::fabs(flush(a)); }>("abs.ftz.f32", FLOAT);
  lanewise<[](float a, float b, float c) { return flush(std::fma(flush(a), flush(b), flush(c))); }>(
      "fma.rn.ftz.f32", FLOAT);
}

// Two halves of a word each: H is the type of a half.
template <class H>
void add_halves(const std::string& type) {
  lanewise<[](H a, H b) { return H(float(a) + float(b)); }>("add." + type, FLOAT);
  lanewise<[](H a, H b) { return H(float(a) - float(b)); }>("sub." + type, FLOAT);
  lanewise<[](H a, H b) { return H(float(a) * float(b)); }>("mul." + type, FLOAT);
  lanewise<[](H a, H b) { return H(maximum_or_nan(float(a), float(b))); }>("max.NaN." + type, FLOAT);
  lanewise<[](H a, H b) { return H(maximum(float(a), float(b))); }>("max." + type, FLOAT);
  lanewise<[](H a, H b) { return H(minimum(float(a), float(b))); }>("min." + type, FLOAT);
  in_pairs<H, [](H a, H b) { return H(maximum_or_nan(float(a), float(b))); }>("max.NaN." + type + "x2", FLOAT);
  in_pairs<H, [](H a, H b) { return H(maximum(float(a), float(b))); }>("max." + type + "x2", FLOAT);
  in_pairs<H, [](H a, H b) { return H(float(a) + float(b)); }>("add." + type + "x2", FLOAT);
  in_pairs<H, [](H a, H b) { return H(float(a) - float(b)); }>("sub." + type + "x2", FLOAT);
  in_pairs<H, [](H a, H b) { return H(float(a) * float(b)); }>("mul." + type + "x2", FLOAT);
}

template <class T>
void add_equality(const std::string& type) {
  comparison<T, [](T a, T b) { return a == b; }>("eq", type);
  comparison<T, [](T a, T b) { return a != b; }>("ne", type);
}

template <class T, class Compared = T>
void add_comparisons(const std::string& type) {
  using C = Compared;
  comparison<T, ([](C a, C b) { return a == b; })>("eq", type);
  comparison<T, ([](C a, C b) { return a < b; })>("lt", type);
  comparison<T, ([](C a, C b) { return a <= b; })>("le", type);
  comparison<T, ([](C a, C b) { return a > b; })>("gt", type);
  comparison<T, ([](C a, C b) { return a >= b; })>("ge", type);
  if constexpr (std::is_floating_point_v<C>) {
    // The plain ones are false where one is NaN, those with a u are true.
    comparison<T, ([](C a, C b) { return a < b || a > b; })>("ne", type);
    comparison<T, ([](C a, C b) { return !(a < b || a > b); })>("equ", type);
    comparison<T, ([](C a, C b) { return !(a == b); })>("neu", type);
    comparison<T, ([](C a, C b) { return !(a >= b); })>("ltu", type);
    comparison<T, ([](C a, C b) { return !(a > b); })>("leu", type);
    comparison<T, ([](C a, C b) { return !(a <= b); })>("gtu", type);
    comparison<T, ([](C a, C b) { return !(a < b); })>("geu", type);
    comparison<T, ([](C a, C b) { return std::isnan(a) || std::isnan(b); })>("nan", type);
    comparison<T, ([](C a, C b) { return !std::isnan(a) && !std::isnan(b); })>("num", type);
  } else {
    comparison<T, ([](C a, C b) { return a != b; })>("ne", type);
  }
}

template <class T>
void select(Warp& warp, const Instruction& in, Mask active) {
  const Mask first = warp.predicate(in.operand[3]), known = warp.defined(in.operand[3]);
  const T *a = warp.lanes<T>(in.operand[1]), *b = warp.lanes<T>(in.operand[2]);
  T result[LANES];
  for (int lane = 0; lane < LANES; lane++) result[lane] = first >> lane & 1 ? a[lane] : b[lane];
  const Defined chosen = (warp.halves(in.operand[1]) & first) | (warp.halves(in.operand[2]) & ~first);
  warp.put(in.operand[0], result, active, chosen & known);
}

template <auto F, int OPERANDS>
void logic(Warp& warp, const Instruction& in, Mask active) {
  const Mask a = warp.predicate(in.operand[1]), b = OPERANDS == 2 ? warp.predicate(in.operand[2]) : 0;
  const Mask known = warp.defined(in.operand[1]), other = OPERANDS == 2 ? warp.defined(in.operand[2]) : ALL;
  // A side that decides alone needs no other: what `and` with false gives is known.
  const Mask decided = ~(F(a, 0) ^ F(a, ALL)) & known;
  const Mask by_other = ~(F(0, b) ^ F(ALL, b)) & other;
  warp.put_predicate(in.operand[0], F(a, b), active, (known & other) | decided | by_other);
}

}  // namespace

void skew(bool on) { skewed = on; }

void add_arithmetic() {
  add_integers<int16_t>("s16"), add_integers<uint16_t>("u16");
  add_integers<int32_t>("s32"), add_integers<uint32_t>("u32");
  add_integers<int64_t>("s64"), add_integers<uint64_t>("u64");
  add_wide<int16_t, int32_t>("s16"), add_wide<uint16_t, uint32_t>("u16");
  add_wide<int32_t, int64_t>("s32"), add_wide<uint32_t, uint64_t>("u32");
  add_bits<uint16_t>("b16"), add_bits<uint32_t>("b32"), add_bits<uint64_t>("b64");
  lanewise<bit_field<int32_t>>("bfe.s32", INTEGER);
  lanewise<bit_field<uint32_t>>("bfe.u32", INTEGER);
  lanewise<bit_field<int64_t>>("bfe.s64", INTEGER);
  lanewise<bit_field<uint64_t>>("bfe.u64", INTEGER);
  lanewise<insert_field>("bfi.b32", INTEGER);
  lanewise<permute>("prmt.b32", INTEGER);

  add_floats<float>("f32"), add_floats<double>("f64");
  add_approximations<false>(""), add_approximations<true>(".ftz");
  add_flushing();
  add_halves<Half>("f16"), add_halves<Bfloat>("bf16");

  add_equality<uint16_t>("b16"), add_equality<uint32_t>("b32"), add_equality<uint64_t>("b64");
  add_comparisons<int16_t>("s16"), add_comparisons<uint16_t>("u16");
  add_comparisons<int32_t>("s32"), add_comparisons<uint32_t>("u32");
  add_comparisons<int64_t>("s64"), add_comparisons<uint64_t>("u64");
  add_comparisons<float>("f32"), add_comparisons<double>("f64");
  add_comparisons<Half, float>("f16"), add_comparisons<Bfloat, float>("bf16");

  for (const char* type : {"b16", "u16", "s16"}) opcodes()[std::string("selp.") + type] = {select<uint16_t>, MOVE};
  for (const char* type : {"b32", "u32", "s32", "f32"})
    opcodes()[std::string("selp.") + type] = {select<uint32_t>, MOVE};
  for (const char* type : {"b64", "u64", "s64", "f64"})
    opcodes()[std::string("selp.") + type] = {select<uint64_t>, MOVE};

  opcodes()["and.pred"] = {logic<[](Mask a, Mask b) -> Mask { return a & b; }, 2>, PREDICATE};
  opcodes()["or.pred"] = {logic<[](Mask a, Mask b) -> Mask { return a | b; }, 2>, PREDICATE};
  opcodes()["xor.pred"] = {logic<[](Mask a, Mask b) -> Mask { return a ^ b; }, 2>, PREDICATE};
  opcodes()["not.pred"] = {logic<[](Mask a, Mask) -> Mask { return ~a; }, 1>, PREDICATE};
  opcodes()["mov.pred"] = {logic<[](Mask a, Mask) -> Mask { return a; }, 1>, PREDICATE};
}

}  // namespace ptx
