// What executes PTX: blocks of warps of 32 lanes, their registers, and the memories with what was done to each byte.
//
// A warp runs alone until it waits at a barrier or ends; then the next one runs. Registers have a bit a lane that says
// whether the lane holds a defined value; it goes along with the value, through memory too, and only a use that
// cannot be taken back is a fault: as an address, to decide a branch, or stored to a tensor.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

using Mask = uint32_t;  // a bit a lane
constexpr int LANES = 32;
constexpr Mask ALL = ~Mask{0};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask active);

// Classes of instructions that are counted.
enum Class {
  INTEGER,
  FLOAT,
  SPECIAL,
  CONVERT,
  MOVE,
  PREDICATE,
  SHUFFLE,
  GLOBAL,
  SHARED,
  ASYNC,
  MATRIX,
  BARRIER,
  CONTROL,
  CLASSES
};

struct Opcode {
  Handler handler = nullptr;
  Class kind = INTEGER;
  int a = 0, b = 0;  // what the handler makes of them: a width and a count, a shape
};

std::unordered_map<std::string, Opcode>& opcodes();
void add_arithmetic();
void add_conversions();
void add_transfers();
void add_matrices();
void add_control();

struct Instruction : Opcode {
  int guard = -1;  // register of the predicate, or none
  bool negated = false;
  const int64_t* operand = nullptr;  // registers, as offsets into a warp's file, and plain numbers
  int count = 0;
};

// Which lanes hold a defined value: of 32 bits the lower and the upper half, for a pair of halves may have one alone.
// Of other widths both are alike.
struct Defined {
  Mask low, high;
  Defined(Mask both) : low(both), high(both) {}
  Defined(Mask low, Mask high) : low(low), high(high) {}
  Mask whole() const { return low & high; }
  Mask of(int half) const { return half ? high : low; }
  Defined operator&(Defined other) const { return {low & other.low, high & other.high}; }
  Defined operator|(Defined other) const { return {low | other.low, high | other.high}; }
};

// Heads a register's lanes in the file; a predicate's lanes are one Mask.
struct alignas(8) Register {
  Defined defined;
  uint16_t in_flight;  // asynchronous products that will write it
  uint16_t wanted;     // asynchronous products that will read it
  uint32_t written;    // when, in the clock of its warp
  Defined held;        // what `defined` will be when none is in flight; meanwhile it is 0
};

// What is known of one byte. Epochs are the stretches between two barriers of a block, numbered on and on.
struct Trace {
  uint32_t write_epoch, read_epoch, first_read_epoch;
  uint32_t readers;                        // warps, a bit each, in read_epoch
  uint32_t proxy_fences;                   // of the writing warp, before it wrote
  uint32_t warp_syncs;                     // the same
  uint32_t writers;                        // warps, a bit each, in write_epoch
  uint16_t writer;                         // thread, the last one
  uint16_t reader;                         // the last one: lanes of a warp may read at once
  uint32_t reader_syncs;                   // of its warp, when it read
  uint16_t pending_reads, pending_writes;  // asynchronous ones, begun and not waited for
  bool several_readers;                    // of one warp, since it was last synchronised
  bool several_writers;                    // the same
  bool defined;
  bool copied;  // by cp.async
};

// A tensor: where the kernel sees it, where it lies, and which of its bytes belong to it.
struct Region {
  uint64_t address;
  uint64_t size;
  uint8_t* data;
  const uint8_t* allowed;
  Trace* trace;
};
constexpr int REGION_BITS = 40;  // so far apart that no offset leads from one to the next

enum Fault {
  OUT_OF_BOUNDS,
  MISALIGNED,
  UNDEFINED,
  RACE,
  RACE_BETWEEN_BLOCKS,
  RACE_BETWEEN_LANES,
  IN_FLIGHT,
  UNFENCED_BYTES,
  UNFENCED_REGISTER,
  DIVERGENT,
  ENDLESS,
  FAULTS
};

struct Finding {
  int64_t count = 0;
  int block = 0, warp = 0;
};

struct Counters {
  uint64_t issued[CLASSES];
  uint64_t accesses[2][2][5];  // shared or global; load or store; by log2 of the bytes of a lane
  uint64_t global_requests, global_sectors, global_bytes;
  uint64_t shared_requests, shared_wavefronts, shared_phases;
  uint64_t matrix_flops;
};

// Which sectors of global memory a processor's first-level cache holds: lines of four, the least recently used goes.
struct Cache {
  struct Line {
    uint64_t number;
    uint32_t sectors;  // a bit each
  };
  size_t lines = 0;  // how many it has room for
  std::list<Line> order{};
  std::unordered_map<uint64_t, std::list<Line>::iterator> known{};

  void clear() { order.clear(), known.clear(); }
  bool has(uint64_t sector);  // whether it was there; now it is
};

// What a launch asked for in a region: sectors of 32 bytes; and passes of the first-level cache, of each request anew.
struct Traffic {
  uint64_t loaded, missed, stored;  // missed: loaded, and not in the first-level cache
  uint64_t passes;
};

struct Machine {
  std::vector<Instruction> program;
  std::vector<Region> regions;
  bool traced = true;            // whether accesses are held against each other; else they are only counted
  uint64_t* executed = nullptr;  // if wanted: by how many warps each instruction was executed
  Traffic* traffic = nullptr;    // if wanted: of each region
  Cache cache{};
  std::map<std::pair<int, int>, Finding> findings;  // by kind and instruction
  Counters counters{};
  uint64_t* effects = nullptr;  // if wanted: of each instruction, a number that all its results and addresses went into
  uint32_t epoch = 0, launch_epoch = 0, block_epoch = 0;

  Region* region_of(uint64_t address);
};

struct Copy {  // cp.async of one lane
  uint32_t to;
  uint64_t from;
  int bytes, source_bytes, lane;
};

struct Product {  // wgmma of one warp
  const Instruction* instruction;
  std::array<uint64_t, 2> descriptors;
  bool accumulate;
};

template <class T>
struct Queue {  // groups of asynchronous operations, the oldest first; the last is open
  std::deque<std::vector<T>> groups{{}};
  void commit() { groups.emplace_back(); }
};

constexpr uint32_t SHARED_BASE = 1024;  // as on sm_90, where the first KiB is the system's

struct Block {
  Machine& machine;
  int index;
  std::vector<uint8_t> shared;
  std::vector<Trace> trace;
  std::vector<Warp*> warps;
};

struct Warp {
  Block& block;
  int index;
  std::vector<uint64_t> file;
  std::array<uint32_t, LANES> pc{};
  uint32_t at = 0;  // the instruction that runs
  Mask exited = 0;
  bool waits = false;
  bool finishing = false;  // an asynchronous product is writing its registers
  uint32_t begun = 0;      // asynchronous products: the warps of a group have to agree
  uint32_t clock = 1, fenced = 0, syncs = 1;
  std::vector<uint32_t> proxy_fences{};  // the epoch of each
  Queue<Copy> copies{};
  Queue<Product> products{};

  Machine& machine() { return block.machine; }
  Register& head(int64_t at) { return *reinterpret_cast<Register*>(reinterpret_cast<char*>(file.data()) + at); }
  template <class T>
  T* lanes(int64_t at) {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(file.data()) + at + sizeof(Register));
  }
  Mask& predicate(int64_t at) { return *lanes<Mask>(at); }
  Mask defined(int64_t at) { return head(at).defined.whole(); }
  Defined halves(int64_t at) { return head(at).defined; }

  void took_effect(uint64_t value, int lane) {
    const uint64_t mixed = (value + 64 * index + lane + 1) * 0x9e3779b97f4a7c15u;
    machine().effects[at] += mixed ^ mixed >> 29;
  }

  bool all(Mask active) const { return active == ~exited; }
  // What a whole warp has to do; if only a part of it does, that is a fault and nothing is done.
  bool whole(Mask active) {
    if (active != ALL) fault(DIVERGENT);
    return active == ALL;
  }

  void note(Register& head, Mask active, Defined defined) {
    if ((head.in_flight || head.wanted) && !finishing) fault(IN_FLIGHT);
    head.defined = (head.defined & Defined(~active)) | (defined & Defined(active));
    head.written = clock;
  }
  template <class T>
  void put(int64_t to, const T* values, Mask active, Defined defined) {
    if (to < 0) return;  // a sink
    note(head(to), active, defined);
    T* mine = lanes<T>(to);
    for (int lane = 0; machine().effects && lane < LANES; lane++) {
      uint64_t value = 0;
      std::memcpy(&value, values + lane, sizeof(T));
      if (active >> lane & 1) took_effect(value, lane);
    }
    if (active == ALL) {
      std::memcpy(mine, values, LANES * sizeof(T));
    } else {
      for (int lane = 0; lane < LANES; lane++) mine[lane] = active >> lane & 1 ? values[lane] : mine[lane];
    }
  }
  void put_predicate(int64_t to, Mask value, Mask active, Mask defined) {
    if (to < 0) return;
    note(head(to), active, defined);
    if (machine().effects) took_effect(value & active, 0);
    predicate(to) = (predicate(to) & ~active) | (value & active);
  }
  void fault(Fault kind);
};

// Memory: one lane's access. Reads give whether all bytes were defined; both are checked against the other accesses.
bool read_shared(Warp& warp, int lane, uint32_t address, int bytes, void* to);
void write_shared(
    Warp& warp, int lane, uint32_t address, int bytes, const void* from, bool defined, bool copied = false);
bool read_global(Warp& warp, int lane, uint64_t address, int bytes, void* to);
void write_global(Warp& warp, int lane, uint64_t address, int bytes, const void* from);
bool in_bounds(Warp& warp, uint64_t address, int bytes, bool shared);
// An asynchronous access begins, or ends.
void begin_read(Warp& warp, uint32_t address, int bytes);
void end_read(Warp& warp, uint32_t address, int bytes);
void begin_write(Warp& warp, int lane, uint32_t address, int bytes);
void end_write(Warp& warp, uint32_t address, int bytes);
void abandon_copies(Warp& warp);
void hold_global(Warp& warp, uint64_t address, int bytes, int change);  // +1: will be read; -1: has been
// Counts a request of a warp: what each lane wants, and which lanes want something.
void count_global(Warp& warp, const uint64_t* address, int bytes, Mask active, bool store);
void count_shared(Warp& warp, const uint64_t* address, int bytes, Mask active, bool store);

enum Control { BRANCH, EXIT, WAIT };  // what only the scheduler can do: Opcode's a

void run_block(Block& block, uint64_t limit);
void skew(bool on);

}  // namespace ptx
