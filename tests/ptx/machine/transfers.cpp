// Instructions that move values between registers and memory, or between lanes.
#include <algorithm>
#include <bit>
#include <utility>

#include "machine.h"

namespace ptx {
namespace {

constexpr int COLLECTIVE = LANES;  // in a lane's place: an access for other lanes too

struct Addresses {
  std::array<uint64_t, LANES> of{};
  Mask usable = 0;
};

// A register and a number added to it. A lane whose address is not defined, or not a multiple of the bytes that it
// wants there, goes nowhere.
template <class T>
Addresses addresses(Warp& warp, int64_t reg, int64_t offset, int bytes, Mask active) {
  Addresses found;
  const T* base = warp.lanes<T>(reg);
  for (int lane = 0; lane < LANES; lane++) found.of[lane] = static_cast<T>(base[lane] + static_cast<T>(offset));
  found.usable = active & warp.defined(reg);
  if (found.usable != active) warp.fault(UNDEFINED);
  for (int lane = 0; lane < LANES; lane++) {
    if (!(found.usable >> lane & 1) || found.of[lane] % bytes == 0) continue;
    warp.fault(MISALIGNED);
    found.usable &= ~(Mask{1} << lane);
  }
  for (int lane = 0; warp.machine().effects && lane < LANES; lane++) {
    if (found.usable >> lane & 1) warp.took_effect(found.of[lane], lane);
  }
  return found;
}

void put_bytes(Warp& warp, int64_t reg, int64_t width, const uint64_t* values, Mask active, Mask defined) {
  uint32_t word[LANES];
  uint16_t half[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    word[lane] = static_cast<uint32_t>(values[lane]), half[lane] = static_cast<uint16_t>(values[lane]);
  }
  if (width == 8) warp.put(reg, values, active, defined);
  if (width == 4) warp.put(reg, word, active, defined);
  if (width == 2) warp.put(reg, half, active, defined);
}

// ld: registers, address, offset, bytes of each register, which may be more than what is loaded. Opcode's a: bytes of
// an element; b: how many.
template <bool SHARED_SPACE>
void load(Warp& warp, const Instruction& in, Mask active) {
  const int bytes = in.a * in.b;
  const int64_t reg = in.operand[in.b], offset = in.operand[in.b + 1], *width = in.operand + in.b + 2;
  const Addresses at = SHARED_SPACE ? addresses<uint32_t>(warp, reg, offset, bytes, active)
                                    : addresses<uint64_t>(warp, reg, offset, bytes, active);
  uint64_t values[4][LANES] = {};
  Mask defined = 0;
  (SHARED_SPACE ? count_shared : count_global)(warp, at.of.data(), bytes, at.usable, false);
  for (int lane = 0; lane < LANES; lane++) {
    if (!(at.usable >> lane & 1)) continue;
    uint8_t value[16] = {};
    const bool known = SHARED_SPACE ? read_shared(warp, lane, static_cast<uint32_t>(at.of[lane]), bytes, value)
                                    : read_global(warp, lane, at.of[lane], bytes, value);
    defined |= Mask{known} << lane;
    for (int i = 0; i < in.b; i++) std::memcpy(&values[i][lane], value + i * in.a, in.a);
  }
  for (int i = 0; i < in.b; i++) put_bytes(warp, in.operand[i], width[i], values[i], active, defined);
}

// st: address, offset, registers, bytes of each register.
template <bool SHARED_SPACE>
void store(Warp& warp, const Instruction& in, Mask active) {
  const int bytes = in.a * in.b;
  const int64_t *registers = in.operand + 2, *width = registers + in.b;
  const Addresses at = SHARED_SPACE ? addresses<uint32_t>(warp, in.operand[0], in.operand[1], bytes, active)
                                    : addresses<uint64_t>(warp, in.operand[0], in.operand[1], bytes, active);
  (SHARED_SPACE ? count_shared : count_global)(warp, at.of.data(), bytes, at.usable, true);
  Mask defined = ALL;
  // Of a wider register two bytes are the lower half.
  for (int i = 0; i < in.b; i++) defined &= in.a == 2 ? warp.halves(registers[i]).low : warp.defined(registers[i]);
  if (!SHARED_SPACE && (at.usable & ~defined)) warp.fault(UNDEFINED);
  for (int lane = 0; lane < LANES; lane++) {
    if (!(at.usable >> lane & 1)) continue;
    uint8_t value[16];
    for (int i = 0; i < in.b; i++) {
      std::memcpy(value + i * in.a, warp.lanes<uint8_t>(registers[i]) + lane * width[i], in.a);
    }
    if (SHARED_SPACE)
      write_shared(warp, lane, static_cast<uint32_t>(at.of[lane]), bytes, value, defined >> lane & 1);
    else
      write_global(warp, lane, at.of[lane], bytes, value);
  }
}

// cp.async: address and offset in shared memory, the same in global memory, bytes, and a register of how many of them
// are read (the others become zero). It happens when it is waited for, which is as late as it may.
void copy(Warp& warp, const Instruction& in, Mask active) {
  const int bytes = static_cast<int>(in.operand[4]);
  const Addresses to = addresses<uint32_t>(warp, in.operand[0], in.operand[1], bytes, active);
  const Addresses from = addresses<uint64_t>(warp, in.operand[2], in.operand[3], bytes, active);
  const bool partial = in.count > 5;
  if (partial && (active & ~warp.defined(in.operand[5]))) warp.fault(UNDEFINED);
  Mask reading = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (!((to.usable & from.usable) >> lane & 1)) continue;
    const int wanted = partial ? static_cast<int>(warp.lanes<uint32_t>(in.operand[5])[lane]) : bytes;
    if (wanted > bytes) {
      warp.fault(OUT_OF_BOUNDS);
      continue;
    }
    const auto shared = static_cast<uint32_t>(to.of[lane]);
    if (!in_bounds(warp, shared, bytes, true)) continue;
    if (wanted && !in_bounds(warp, from.of[lane], wanted, false)) continue;
    reading |= Mask{wanted > 0} << lane;
    begin_write(warp, lane, shared, bytes);
    if (wanted) hold_global(warp, from.of[lane], wanted, 1);
    warp.copies.groups.back().push_back({shared, from.of[lane], bytes, wanted, lane});
  }
  count_global(warp, from.of.data(), bytes, reading, false);
  count_shared(warp, to.of.data(), bytes, to.usable, true);
}

// What is read, and whether it is defined.
std::pair<std::array<uint8_t, 16>, bool> end_reading(Warp& warp, const Copy& copy) {
  std::array<uint8_t, 16> value{};
  if (copy.source_bytes == 0) return {value, true};
  hold_global(warp, copy.from, copy.source_bytes, -1);
  const bool defined = read_global(warp, copy.lane, copy.from, copy.source_bytes, value.data());
  return {value, defined};
}

void finish(Warp& warp, const Copy& copy) {
  const auto [value, defined] = end_reading(warp, copy);
  end_write(warp, copy.to, copy.bytes);
  write_shared(warp, copy.lane, copy.to, copy.bytes, value.data(), defined, true);
}

// Groups are a thread's own. No compiler lets lanes differ here, so a warp has one queue.
void commit_copies(Warp& warp, const Instruction&, Mask active) {
  if (!warp.all(active)) warp.fault(DIVERGENT);
  warp.copies.commit();
}

void wait_for_copies(Warp& warp, const Instruction& in, Mask active) {
  if (!warp.all(active)) warp.fault(DIVERGENT);
  while (static_cast<int64_t>(warp.copies.groups.size()) - 1 > in.operand[0]) {
    for (const Copy& each : warp.copies.groups.front()) finish(warp, each);
    warp.copies.groups.pop_front();
  }
}

// Rows of eight halves that the first 8, 16 or 32 lanes give the addresses of. Opcode's a: matrices; b: transposed.
struct Rows {
  std::array<uint64_t, LANES> address;
  Mask usable;
};
Rows rows_of(Warp& warp, int64_t reg, int64_t offset, int matrices) {
  const Mask giving = matrices == 4 ? ALL : (Mask{1} << 8 * matrices) - 1;
  const Addresses at = addresses<uint32_t>(warp, reg, offset, 16, giving);
  return {at.of, at.usable};
}

// ldmatrix: registers, address, offset. A lane gets two halves of each matrix: of row lane / 4, or of that column.
void load_matrices(Warp& warp, const Instruction& in, Mask active) {
  if (!warp.whole(active)) return;
  const Rows rows = rows_of(warp, in.operand[in.a], in.operand[in.a + 1], in.a);
  count_shared(warp, rows.address.data(), 16, rows.usable, false);
  for (int matrix = 0; matrix < in.a; matrix++) {
    uint16_t values[8][8] = {};
    bool known[8];
    for (int row = 0; row < 8; row++) {
      const int lane = 8 * matrix + row;
      known[row] = (rows.usable >> lane & 1) &&
                   read_shared(warp, COLLECTIVE, static_cast<uint32_t>(rows.address[lane]), 16, values[row]);
    }
    uint32_t result[LANES];
    Mask defined = 0;
    for (int lane = 0; lane < LANES; lane++) {
      const int across = lane / 4, along = 2 * (lane % 4);
      const uint32_t low = in.b ? values[along][across] : values[across][along];
      const uint32_t high = in.b ? values[along + 1][across] : values[across][along + 1];
      result[lane] = high << 16 | low;
      defined |= Mask{in.b ? known[along] && known[along + 1] : known[across]} << lane;
    }
    warp.put(in.operand[matrix], result, active, defined);
  }
}

// stmatrix: address, offset, registers.
void store_matrices(Warp& warp, const Instruction& in, Mask active) {
  if (!warp.whole(active)) return;
  const Rows rows = rows_of(warp, in.operand[0], in.operand[1], in.a);
  count_shared(warp, rows.address.data(), 16, rows.usable, true);
  for (int matrix = 0; matrix < in.a; matrix++) {
    const int64_t reg = in.operand[2 + matrix];
    for (int row = 0; row < 8; row++) {
      const int giver = 8 * matrix + row;
      if (!(rows.usable >> giver & 1) || !in_bounds(warp, rows.address[giver], 16, true)) continue;
      for (int column = 0; column < 8; column++) {
        const int lane = in.b ? 4 * column + row / 2 : 4 * row + column / 2;
        const int half = (in.b ? row : column) % 2;
        const auto value = static_cast<uint16_t>(warp.lanes<uint32_t>(reg)[lane] >> 16 * half);
        write_shared(
            warp, lane, static_cast<uint32_t>(rows.address[giver]) + 2 * column, 2, &value,
            warp.halves(reg).of(half) >> lane & 1);
      }
    }
  }
}

// A member of the mask that is not here would be waited for.
void check_members(Warp& warp, int64_t reg, Mask active) {
  for (int lane = 0; lane < LANES; lane++) {
    const Mask members = warp.lanes<uint32_t>(reg)[lane] & ~warp.exited;
    if ((active >> lane & 1) && members != active) return warp.fault(DIVERGENT);
  }
}

enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };

// shfl.sync: register, predicate (in range), value, lane, clamp and segment, members.
template <Shuffle HOW>
void shuffle(Warp& warp, const Instruction& in, Mask active) {
  check_members(warp, in.operand[5], active);
  const uint32_t *value = warp.lanes<uint32_t>(in.operand[2]), *by = warp.lanes<uint32_t>(in.operand[3]),
                 *range = warp.lanes<uint32_t>(in.operand[4]);
  const Mask known = warp.defined(in.operand[2]);
  if (active & ~(warp.defined(in.operand[3]) & warp.defined(in.operand[4]))) warp.fault(UNDEFINED);
  uint32_t result[LANES];
  Mask defined = 0, inside = 0;
  for (int lane = 0; lane < LANES; lane++) {
    const int b = by[lane] & 31, clamp = range[lane] & 31, segment = range[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = HOW == UP ? lane - b : HOW == DOWN ? lane + b : HOW == BUTTERFLY ? lane ^ b : first | (b & ~segment);
    const bool in_range = HOW == UP ? from >= last : from <= last;
    if (!in_range) from = lane;
    result[lane] = value[from];
    inside |= Mask{in_range} << lane;
    defined |= (known & active) >> from & Mask{1} ? Mask{1} << lane : 0;
  }
  warp.put(in.operand[0], result, active, defined);
  warp.put_predicate(in.operand[1], inside, active, ALL);
}

enum Vote { EVERY, SOME, BALLOT };

// vote.sync: result, predicate, members.
template <Vote HOW>
void vote(Warp& warp, const Instruction& in, Mask active) {
  check_members(warp, in.operand[2], active);
  if (active & ~warp.defined(in.operand[1])) warp.fault(UNDEFINED);
  const Mask yes = warp.predicate(in.operand[1]) & active;
  if (HOW == BALLOT) {
    uint32_t result[LANES];
    std::fill_n(result, LANES, yes);
    warp.put(in.operand[0], result, active, ALL);
  } else {
    warp.put_predicate(in.operand[0], (HOW == EVERY ? yes == active : yes != 0) ? ALL : 0, active, ALL);
  }
}

void synchronise_warp(Warp& warp, const Instruction& in, Mask active) {
  check_members(warp, in.operand[0], active);
  if (warp.all(active)) warp.syncs++;
}

void fence_proxy(Warp& warp, const Instruction&, Mask active) {
  if (warp.all(active)) warp.proxy_fences.push_back(warp.machine().epoch);
}

}  // namespace

// At a block's end, those that nobody has waited for: they have read at any time since.
void abandon_copies(Warp& warp) {
  for (const std::vector<Copy>& group : warp.copies.groups) {
    for (const Copy& each : group) end_reading(warp, each);
  }
  warp.copies = {};
}

void add_transfers() {
  const std::pair<const char*, int> widths[] = {{"8", 1}, {"16", 2}, {"32", 4}, {"64", 8}};
  for (const auto& [bits, bytes] : widths) {
    for (const char* sign : {"b", "u", "f"}) {
      if (bytes < 4 && *sign == 'f') continue;
      for (const int count : {1, 2, 4}) {
        if (bytes * count > 16) continue;
        const std::string type = (count > 1 ? ".v" + std::to_string(count) : "") + "." + sign + bits;
        opcodes()["ld.global" + type] = {load<false>, GLOBAL, bytes, count};
        opcodes()["st.global" + type] = {store<false>, GLOBAL, bytes, count};
        opcodes()["ld.shared" + type] = {load<true>, SHARED, bytes, count};
        opcodes()["st.shared" + type] = {store<true>, SHARED, bytes, count};
      }
    }
  }
  opcodes()["cp.async.ca.shared.global"] = opcodes()["cp.async.cg.shared.global"] = {copy, ASYNC};
  opcodes()["cp.async.commit_group"] = {commit_copies, ASYNC};
  opcodes()["cp.async.wait_group"] = {wait_for_copies, ASYNC};
  for (const int count : {1, 2, 4}) {
    for (const bool transposed : {false, true}) {
      const std::string shape = "m8n8.x" + std::to_string(count) + (transposed ? ".trans" : "") + ".shared.b16";
      opcodes()["ldmatrix.sync.aligned." + shape] = {load_matrices, SHARED, count, transposed};
      opcodes()["stmatrix.sync.aligned." + shape] = {store_matrices, SHARED, count, transposed};
    }
  }
  opcodes()["shfl.sync.up.b32"] = {shuffle<UP>, SHUFFLE};
  opcodes()["shfl.sync.down.b32"] = {shuffle<DOWN>, SHUFFLE};
  opcodes()["shfl.sync.bfly.b32"] = {shuffle<BUTTERFLY>, SHUFFLE};
  opcodes()["shfl.sync.idx.b32"] = {shuffle<INDEX>, SHUFFLE};
  opcodes()["vote.sync.all.pred"] = {vote<EVERY>, SHUFFLE};
  opcodes()["vote.sync.any.pred"] = {vote<SOME>, SHUFFLE};
  opcodes()["vote.sync.ballot.b32"] = {vote<BALLOT>, SHUFFLE};
  opcodes()["bar.warp.sync"] = {synchronise_warp, BARRIER};
  opcodes()["fence.proxy.async.shared::cta"] = opcodes()["fence.proxy.async"] = {fence_proxy, BARRIER};
}

}  // namespace ptx
