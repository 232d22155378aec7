// Moves, and conversions from one type to another.
#include <cmath>
#include <limits>

#include "lanewise.h"

namespace ptx {
namespace {

// Rounds to nearest, ties away from zero, to the ten bits that tensor cores take.
uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000 : bits;
}

template <class H>
void pair_of(Warp& warp, const Instruction& in, Mask active) {
  const float *high = warp.lanes<float>(in.operand[1]), *low = warp.lanes<float>(in.operand[2]);
  H result[2 * LANES];
  for (int lane = 0; lane < LANES; lane++) result[2 * lane] = H(low[lane]), result[2 * lane + 1] = H(high[lane]);
  warp.put(
      in.operand[0], reinterpret_cast<uint32_t*>(result), active,
      {warp.defined(in.operand[2]), warp.defined(in.operand[1])});
}

// What does not fit becomes the nearest that does; NaN zero, or the highest bit where one side has 64 bits.
template <class To, class From>
To integer_of(From x) {
  if (std::isnan(x))
    return sizeof(To) < 8 && sizeof(From) < 8 ? To{0} : static_cast<To>(uint64_t{1} << (8 * sizeof(To) - 1));
  if (x <= static_cast<From>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (x >= static_cast<From>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}

// Of 32 bits all that a conversion from or to 16 bits looks at is the lower half.
template <class From, class To>
void convert_lower(Warp& warp, const Instruction& in, Mask active) {
  const uint32_t* given = warp.lanes<uint32_t>(in.operand[1]);
  To result[LANES];
  for (int lane = 0; lane < LANES; lane++) result[lane] = static_cast<To>(static_cast<From>(given[lane]));
  warp.put(in.operand[0], result, active, warp.halves(in.operand[1]).low);
}

template <class From, class To>
void between_integers(const std::string& from, const std::string& to) {
  if constexpr (std::is_same_v<From, To>) return;
  // Of a register wider than its type the low part is taken.
  if (sizeof(From) < 4) opcodes()["cvt." + to + "." + from + ".of32"] = {convert_lower<From, To>, CONVERT};
  if (sizeof(From) < 8)
    lanewise<[](uint64_t a) { return static_cast<To>(static_cast<From>(a)); }>(
        "cvt." + to + "." + from + ".of64", CONVERT);
  if (sizeof(From) == 4 && sizeof(To) == 2)
    opcodes()["cvt." + to + "." + from] = {convert_lower<From, To>, CONVERT};
  else
    lanewise<[](From a) { return static_cast<To>(a); }>("cvt." + to + "." + from, CONVERT);
}

template <class From>
void from_integers(const std::string& from) {
  between_integers<From, int16_t>(from, "s16"), between_integers<From, uint16_t>(from, "u16");
  between_integers<From, int32_t>(from, "s32"), between_integers<From, uint32_t>(from, "u32");
  between_integers<From, int64_t>(from, "s64"), between_integers<From, uint64_t>(from, "u64");
  lanewise<[](From a) { return static_cast<float>(a); }>("cvt.rn.f32." + from, CONVERT);
  lanewise<[](From a) { return static_cast<double>(a); }>("cvt.rn.f64." + from, CONVERT);
  lanewise<[](float a) { return integer_of<From>(std::trunc(a)); }>("cvt.rzi." + from + ".f32", CONVERT);
  lanewise<[](double a) { return integer_of<From>(std::trunc(a)); }>("cvt.rzi." + from + ".f64", CONVERT);
  lanewise<[](float a) { return integer_of<From>(std::nearbyint(a)); }>("cvt.rni." + from + ".f32", CONVERT);
}

// A copy is as old as what it is a copy of: ptxas gives both one register where it can. LLVM puts such copies anywhere,
// even between wgmma's fence and wgmma.
template <class T>
void move(Warp& warp, const Instruction& in, Mask active) {
  warp.put(in.operand[0], warp.lanes<T>(in.operand[1]), active, warp.halves(in.operand[1]));
  if (in.operand[0] >= 0) warp.head(in.operand[0]).written = warp.head(in.operand[1]).written;
}

template <class T>
void add_move(const std::string& type) {
  opcodes()["mov." + type] = {move<T>, MOVE};
}

// mov of a register to a list of its parts, the lowest first, and back. Opcode's a: the bytes of the whole.
void unpack(Warp& warp, const Instruction& in, Mask active) {
  const int parts = in.count - 1, bytes = in.a / parts;
  const int64_t whole = in.operand[parts];
  for (int part = 0; part < parts; part++) {
    uint8_t lanes[LANES * 4];
    for (int lane = 0; lane < LANES; lane++) {
      std::memcpy(lanes + lane * bytes, warp.lanes<uint8_t>(whole) + lane * in.a + part * bytes, bytes);
    }
    if (bytes == 4) warp.put(in.operand[part], reinterpret_cast<uint32_t*>(lanes), active, warp.defined(whole));
    if (bytes == 2) warp.put(in.operand[part], reinterpret_cast<uint16_t*>(lanes), active, warp.halves(whole).of(part));
  }
}

void pack(Warp& warp, const Instruction& in, Mask active) {
  const int parts = in.count - 1, bytes = in.a / parts;
  uint8_t lanes[LANES * 8];
  Defined defined = ALL;
  for (int part = 0; part < parts; part++) {
    const int64_t from = in.operand[1 + part];
    const Mask known = warp.defined(from);
    defined = defined & (in.a > 4 ? known : part ? Defined(ALL, known) : Defined(known, ALL));
    for (int lane = 0; lane < LANES; lane++) {
      std::memcpy(lanes + lane * in.a + part * bytes, warp.lanes<uint8_t>(from) + lane * bytes, bytes);
    }
  }
  if (in.a == 8) warp.put(in.operand[0], reinterpret_cast<uint64_t*>(lanes), active, defined);
  if (in.a == 4) warp.put(in.operand[0], reinterpret_cast<uint32_t*>(lanes), active, defined);
}

}  // namespace

void add_conversions() {
  from_integers<int16_t>("s16"), from_integers<uint16_t>("u16");
  from_integers<int32_t>("s32"), from_integers<uint32_t>("u32");
  from_integers<int64_t>("s64"), from_integers<uint64_t>("u64");
  lanewise<[](Bfloat a) { return static_cast<float>(a); }>("cvt.f32.bf16", CONVERT);
  lanewise<[](Half a) { return static_cast<float>(a); }>("cvt.f32.f16", CONVERT);
  lanewise<[](float a) { return Bfloat(a); }>("cvt.rn.bf16.f32", CONVERT);
  lanewise<[](float a) { return Half(a); }>("cvt.rn.f16.f32", CONVERT);
  opcodes()["cvt.rn.bf16x2.f32"] = {pair_of<Bfloat>, CONVERT};
  opcodes()["cvt.rn.f16x2.f32"] = {pair_of<Half>, CONVERT};
  lanewise<[](float a) { return static_cast<double>(a); }>("cvt.f64.f32", CONVERT);
  lanewise<[](double a) { return static_cast<float>(a); }>("cvt.rn.f32.f64", CONVERT);
  lanewise<to_tf32>("cvt.rna.tf32.f32", CONVERT);

  for (const char* sign : {"b", "u", "s"}) {
    add_move<uint16_t>(std::string(sign) + "16"), add_move<uint32_t>(std::string(sign) + "32");
    add_move<uint64_t>(std::string(sign) + "64");
  }
  add_move<uint32_t>("f32"), add_move<uint64_t>("f64");
  opcodes()["mov.b64.unpack"] = {unpack, MOVE, 8}, opcodes()["mov.b32.unpack"] = {unpack, MOVE, 4};
  opcodes()["mov.b64.pack"] = {pack, MOVE, 8}, opcodes()["mov.b32.pack"] = {pack, MOVE, 4};
}

}  // namespace ptx
