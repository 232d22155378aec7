// Accesses to memory, byte by byte: whether they are in bounds, aligned, defined, and apart from other accesses by a
// barrier. And what they cost: sectors of 32 bytes in global memory, passes over the 32 banks in shared memory.
#include <algorithm>
#include <bit>
#include <span>
#include <utility>

#include "machine.h"

namespace ptx {

void Warp::fault(Fault kind) {
  Finding& found = machine().findings[{kind, static_cast<int>(at)}];
  if (found.count++ == 0) found.block = block.index, found.warp = index;
}

Region* Machine::region_of(uint64_t address) {
  const uint64_t index = (address >> REGION_BITS) - 1;
  return index < regions.size() ? &regions[index] : nullptr;
}

bool Cache::has(uint64_t sector) {
  const uint64_t number = sector / 4;
  const uint32_t bit = 1u << sector % 4;
  if (const auto found = known.find(number); found != known.end()) {
    order.splice(order.begin(), order, found->second);
    const bool there = order.front().sectors & bit;
    order.front().sectors |= bit;
    return there;
  }
  order.push_front({number, bit});
  known[number] = order.begin();
  if (order.size() > lines) {
    known.erase(order.back().number);
    order.pop_back();
  }
  return false;
}

namespace {

struct Place {
  uint8_t* data = nullptr;
  std::span<Trace> trace;  // of each byte; none where an access is out of bounds
};

Place shared_at(Warp& warp, uint32_t address, int bytes) {
  if (!in_bounds(warp, address, bytes, true)) return {};
  const uint32_t offset = address - SHARED_BASE;
  if (!warp.machine().traced) return {&warp.block.shared[offset], {}};
  return {&warp.block.shared[offset], {&warp.block.trace[offset], static_cast<size_t>(bytes)}};
}

Place global_at(Warp& warp, uint64_t address, int bytes) {
  if (!in_bounds(warp, address, bytes, false)) return {};
  Region& region = *warp.machine().region_of(address);
  const uint64_t offset = address - region.address;
  if (!warp.machine().traced) return {region.data + offset, {}};
  return {region.data + offset, {region.trace + offset, static_cast<size_t>(bytes)}};
}

// Another lane of this warp was there, and the warp has not been synchronised since.
bool other_lane(Warp& warp, int lane, uint32_t epoch, uint16_t thread, uint32_t syncs) {
  return lane >= 0 && epoch == warp.machine().epoch && thread / LANES == warp.index &&
         (thread % LANES != lane || lane == LANES) && syncs == warp.syncs;
}

void check_read(Warp& warp, int lane, Trace& byte) {
  const Machine& machine = warp.machine();
  if (byte.pending_writes) warp.fault(IN_FLIGHT);
  if (byte.write_epoch >= machine.block_epoch) {
    // One that has stored the same value too may still find what the other had stored before.
    if (byte.write_epoch == machine.epoch && (byte.writers & ~(1u << warp.index))) warp.fault(RACE);
    const int writer = lane >= 0 && byte.several_writers ? LANES : lane;
    if (other_lane(warp, writer, byte.write_epoch, byte.writer, byte.warp_syncs)) warp.fault(RACE_BETWEEN_LANES);
  } else if (byte.write_epoch >= machine.launch_epoch) {
    warp.fault(RACE_BETWEEN_BLOCKS);
  }
  const bool new_epoch = byte.read_epoch != machine.epoch;
  if (new_epoch) {
    if (byte.read_epoch < machine.launch_epoch) byte.first_read_epoch = machine.epoch;
    byte.read_epoch = machine.epoch, byte.readers = 0;
  }
  byte.readers |= 1u << warp.index;
  if (lane < 0) return;
  const auto thread = static_cast<uint16_t>(warp.index * LANES + lane % LANES);
  const bool again = byte.reader / LANES == warp.index && byte.reader_syncs == warp.syncs && !new_epoch;
  byte.several_readers = lane == LANES || (again && (byte.several_readers || byte.reader != thread));
  byte.reader = thread, byte.reader_syncs = warp.syncs;
}

// How a value relates to the one that is there.
struct Value {
  bool same, copy;
};

// Whether another lane of the warp has written there, and the two have not been synchronised since.
bool check_write(Warp& warp, int lane, const Trace& byte, Value value) {
  const Machine& machine = warp.machine();
  if (byte.pending_writes || byte.pending_reads) warp.fault(IN_FLIGHT);
  bool lanes = false;
  if (byte.write_epoch >= machine.block_epoch) {
    // Two warps may store the same value: that of a small tensor that several warps hold.
    const bool others = byte.write_epoch == machine.epoch && (byte.writers & ~(1u << warp.index));
    if (others && !value.same) warp.fault(RACE);
    const int writer = lane >= 0 && byte.several_writers ? LANES : lane;
    lanes = other_lane(warp, writer, byte.write_epoch, byte.writer, byte.warp_syncs);
    if (lanes && !value.copy) warp.fault(RACE_BETWEEN_LANES);
  } else if (byte.write_epoch >= machine.launch_epoch) {
    warp.fault(RACE_BETWEEN_BLOCKS);
  }
  if (byte.read_epoch == machine.epoch && (byte.readers & ~(1u << warp.index))) warp.fault(RACE);
  const int reader = byte.several_readers ? LANES : lane;
  if (lane >= 0 && other_lane(warp, reader, byte.read_epoch, byte.reader, byte.reader_syncs)) {
    warp.fault(RACE_BETWEEN_LANES);
  }
  const bool read = byte.read_epoch >= machine.launch_epoch && byte.first_read_epoch < machine.block_epoch;
  if (read) warp.fault(RACE_BETWEEN_BLOCKS);
  return lanes;
}

// Copies of one value, which several lanes of a warp hold, may differ in the last bits: where the compiler makes an fma
// of a product and a sum, each lane rounds another of the products. A store does not say what it stores: what has no
// exponent as a float, such as small integers, has to be the same.
template <class Word>
bool copies(const uint8_t* a, const uint8_t* b, Word exponent, int most) {
  Word x, y;
  std::memcpy(&x, a, sizeof(Word)), std::memcpy(&y, b, sizeof(Word));
  if (x == y) return true;
  return (x & exponent) && (y & exponent) && static_cast<int64_t>(std::max(x, y)) - std::min(x, y) <= most;
}

bool are_copies(const uint8_t* a, const uint8_t* b, int bytes) {
  if (bytes == 1) return *a == *b;
  if (bytes == 2) return copies<int16_t>(a, b, 0x7c00, 1);
  for (int i = 0; i < bytes; i += 4) {
    if (copies<int32_t>(a + i, b + i, 0x7f800000, 4)) continue;
    // Two halves in one word: both have an exponent, which the end of a round float32 has not.
    uint16_t low;
    std::memcpy(&low, a + i, 2);
    const bool halves = copies<int16_t>(a + i, b + i, 0x7c00, 1) && copies<int16_t>(a + i + 2, b + i + 2, 0x7c00, 1);
    if (!(low & 0x7c00) || !halves) return false;
  }
  return true;
}

bool read(Warp& warp, int lane, Place place, int bytes, void* to) {
  if (place.data == nullptr) return false;
  bool defined = true;
  for (Trace& byte : place.trace) {
    check_read(warp, lane, byte);
    defined &= byte.defined;
  }
  std::memcpy(to, place.data, bytes);
  return defined;
}

void write(Warp& warp, int lane, Place place, int bytes, const void* from, bool defined, bool copied) {
  if (place.data == nullptr) return;
  if (place.trace.empty()) {
    std::memcpy(place.data, from, bytes);
    return;
  }
  const auto* value = static_cast<const uint8_t*>(from);
  const bool copy = are_copies(place.data, value, bytes);
  const auto thread = static_cast<uint16_t>(warp.index * LANES + std::max(lane, 0));
  bool another = false;  // lane has stored a copy
  for (int i = 0; i < bytes; i++) {
    Trace& byte = place.trace[i];
    const bool same = place.data[i] == value[i] && byte.defined == defined;
    another |= check_write(warp, lane, byte, {same, same || (copy && byte.defined && defined)});
    const bool again = byte.write_epoch == warp.machine().epoch;
    const bool unsynchronised = again && byte.writer / LANES == warp.index && byte.warp_syncs == warp.syncs;
    byte.several_writers = unsynchronised && (byte.several_writers || byte.writer != thread);
    byte.writers = (again ? byte.writers : 0) | 1u << warp.index;
    byte.write_epoch = warp.machine().epoch;
    byte.proxy_fences = static_cast<uint32_t>(warp.proxy_fences.size());
    byte.warp_syncs = warp.syncs;
    byte.writer = thread;
    byte.defined = defined;
    byte.copied = copied;
  }
  // Any of the copies may land: the first, so that each is held against that one.
  if (!(another && copy)) std::memcpy(place.data, from, bytes);
}

// Whether a fence lies between a store and the asynchronous proxy's access that a warp asks for: after the store and
// before the barrier in the storing warp, or after the barrier in this one.
bool fenced(const Warp& warp, const Trace& byte) {
  const Warp& writer = *warp.block.warps[byte.writer / LANES];
  const bool since = writer.proxy_fences.size() > byte.proxy_fences;
  if (&writer == &warp) return since;
  if (since && writer.proxy_fences[byte.proxy_fences] < warp.block.machine.epoch) return true;
  return !warp.proxy_fences.empty() && warp.proxy_fences.back() > byte.write_epoch;
}

}  // namespace

bool in_bounds(Warp& warp, uint64_t address, int bytes, bool shared) {
  bool inside;
  if (shared) {
    inside = address >= SHARED_BASE && address - SHARED_BASE + bytes <= warp.block.shared.size();
  } else {
    const Region* region = warp.machine().region_of(address);
    inside = region && address >= region->address && address - region->address + bytes <= region->size;
    for (int i = 0; inside && region->allowed && i < bytes; i++)
      inside = region->allowed[address - region->address + i];
  }
  if (!inside) warp.fault(OUT_OF_BOUNDS);
  return inside;
}

bool read_shared(Warp& warp, int lane, uint32_t address, int bytes, void* to) {
  return read(warp, lane, shared_at(warp, address, bytes), bytes, to);
}
void write_shared(Warp& warp, int lane, uint32_t address, int bytes, const void* from, bool defined, bool copied) {
  write(warp, lane, shared_at(warp, address, bytes), bytes, from, defined, copied);
}
bool read_global(Warp& warp, int lane, uint64_t address, int bytes, void* to) {
  return read(warp, lane, global_at(warp, address, bytes), bytes, to);
}
void write_global(Warp& warp, int lane, uint64_t address, int bytes, const void* from) {
  write(warp, lane, global_at(warp, address, bytes), bytes, from, true, false);
}

void begin_read(Warp& warp, uint32_t address, int bytes) {
  for (Trace& byte : shared_at(warp, address, bytes).trace) {
    check_read(warp, -1, byte);
    // What cp.async has copied would by the letter of the ISA need the fence too. Neither Triton nor CUTLASS has one
    // there, so that no fault of a kernel can be told from it.
    const bool stored = byte.write_epoch >= warp.machine().block_epoch && !byte.copied;
    if (stored && !fenced(warp, byte)) warp.fault(UNFENCED_BYTES);
    byte.pending_reads++;
  }
}
void end_read(Warp& warp, uint32_t address, int bytes) {
  for (Trace& byte : shared_at(warp, address, bytes).trace) byte.pending_reads--;
}
void hold_global(Warp& warp, uint64_t address, int bytes, int change) {
  for (Trace& byte : global_at(warp, address, bytes).trace) byte.pending_reads += change;
}
void begin_write(Warp& warp, int lane, uint32_t address, int bytes) {
  for (Trace& byte : shared_at(warp, address, bytes).trace) {
    check_write(warp, lane, byte, {});
    byte.pending_writes++;
  }
}
void end_write(Warp& warp, uint32_t address, int bytes) {
  for (Trace& byte : shared_at(warp, address, bytes).trace) byte.pending_writes--;
}

// Passes over 32 banks of 4 bytes for a request, of which one serves 128 bytes: all lanes, or with wide accesses the
// half or the quarter of them. First those that the width asks for, then those that it takes.
std::pair<int, int> passes(const uint64_t* address, int bytes, Mask active) {
  const int lanes = std::min(LANES, 128 / bytes), words = std::max(bytes / 4, 1);
  std::pair<int, int> found{0, 0};
  for (int first = 0; first < LANES; first += lanes) {
    std::array<std::array<uint64_t, LANES>, 32> wanted;  // different words of a bank
    std::array<int, 32> count{};
    bool any = false;
    for (int lane = first; lane < first + lanes; lane++) {
      for (int i = 0; (active >> lane & 1) && i < words; i++) {
        const uint64_t word = address[lane] / 4 + i;
        auto& bank = wanted[word % 32];
        int& known = count[word % 32];
        if (std::find(bank.begin(), bank.begin() + known, word) == bank.begin() + known) bank[known++] = word;
        any = true;
      }
    }
    found.first += any;
    found.second += *std::max_element(count.begin(), count.end());
  }
  return found;
}

void count_global(Warp& warp, const uint64_t* address, int bytes, Mask active, bool store) {
  if (!active) return;
  Machine& machine = warp.machine();
  Counters& counters = machine.counters;
  std::array<uint64_t, LANES> sectors;  // an access is aligned, so it lies in one
  int lanes = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (active >> lane & 1) sectors[lanes++] = address[lane] / 32;
  }
  std::sort(sectors.begin(), sectors.begin() + lanes);
  counters.accesses[1][store][std::countr_zero(static_cast<unsigned>(bytes))] += lanes;
  counters.global_requests++;
  const auto end = std::unique(sectors.begin(), sectors.begin() + lanes);
  counters.global_sectors += end - sectors.begin();
  counters.global_bytes += static_cast<uint64_t>(lanes) * bytes;
  const uint64_t region = (sectors[0] * 32 >> REGION_BITS) - 1;
  if (!machine.traffic || region >= machine.regions.size()) return;
  Traffic& traffic = machine.traffic[region];
  uint64_t lines = 0;
  for (auto at = sectors.begin(); at != end; at++) {
    lines += at == sectors.begin() || at[-1] / 4 != *at / 4;
    if (store)
      traffic.stored++;
    else
      traffic.loaded++, traffic.missed += !machine.cache.has(*at);
  }
  // Four lines are looked up at once.
  traffic.passes += std::max<uint64_t>((lines + 3) / 4, passes(address, bytes, active).second);
}

void count_shared(Warp& warp, const uint64_t* address, int bytes, Mask active, bool store) {
  if (!active) return;
  Counters& counters = warp.machine().counters;
  counters.shared_requests++;
  counters.accesses[0][store][std::countr_zero(static_cast<unsigned>(bytes))] += std::popcount(active);
  const auto [least, taken] = passes(address, bytes, active);
  counters.shared_phases += least;
  counters.shared_wavefronts += taken;
}

}  // namespace ptx
