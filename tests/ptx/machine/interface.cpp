// What Python calls, through ctypes: machine.py has the same structures.
#include <memory>

#include "machine.h"

namespace ptx {

std::unordered_map<std::string, Opcode>& opcodes() {
  static std::unordered_map<std::string, Opcode> table;
  return table;
}

namespace {

const Opcode* opcode(const char* name) {
  if (opcodes().empty()) add_arithmetic(), add_conversions(), add_transfers(), add_matrices(), add_control();
  const auto found = opcodes().find(name);
  return found == opcodes().end() ? nullptr : &found->second;
}

}  // namespace
}  // namespace ptx

extern "C" {

struct PtxInstruction {
  const char* name;
  int32_t guard, negated, first, count;  // operands
};

struct PtxConstant {  // a register that is the same in all lanes from the start
  int64_t at;
  int64_t bits;
  int32_t bytes;  // 0: a predicate
};

struct PtxLaunch {
  const PtxInstruction* instructions;
  const int64_t* operands;
  const PtxConstant* constants;
  const ptx::Region* regions;
  int32_t instruction_count, constant_count, region_count;
  int32_t threads, blocks, shared_bytes, file_bytes, skewed;
  int64_t tid, ctaid;  // their registers, or -1
  uint64_t limit;      // instructions of a block
  uint64_t* effects;   // of each instruction, or null
  uint32_t epoch;      // the first that no launch has had; what follows the last is left here
  // To count only: if not null, the blocks that are executed, as many as `blocks` says; accesses are not held against
  // each other, and regions need no trace.
  const int32_t* only;
  uint64_t* executed;     // of each instruction, by how many warps
  ptx::Traffic* traffic;  // of each region
  uint64_t cache_lines;   // of a block, in the first-level cache
};

struct PtxFinding {
  int32_t kind, instruction, block, warp;
  int64_t count;
};

int ptx_known(const char* name) { return ptx::opcode(name) != nullptr; }
// The name of the instruction at a place in the table, whose order means nothing; null after the last.
const char* ptx_name(int index) {
  ptx::opcode("");
  auto at = ptx::opcodes().begin();
  for (int i = 0; i < index && at != ptx::opcodes().end(); i++) at++;
  return at == ptx::opcodes().end() ? nullptr : at->first.c_str();
}
int ptx_trace_bytes() { return sizeof(ptx::Trace); }
int ptx_region_bits() { return ptx::REGION_BITS; }
int ptx_register_bytes() { return sizeof(ptx::Register); }
int ptx_shared_base() { return ptx::SHARED_BASE; }
int ptx_counter_bytes() { return sizeof(ptx::Counters); }

// Marks bytes as defined or not, before any launch.
void ptx_define(ptx::Trace* trace, const uint8_t* defined, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i++) trace[i].defined = trace[i].defined || defined == nullptr || defined[i];
}

void ptx_defined(const ptx::Trace* trace, uint8_t* defined, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i++) defined[i] = trace[i].defined;
}

// Returns how many findings there are, of which at most `room` are written.
int ptx_run(PtxLaunch* launch, ptx::Counters* counters, PtxFinding* findings, int room) {
  using namespace ptx;
  Machine machine;
  machine.program.resize(launch->instruction_count);
  for (int i = 0; i < launch->instruction_count; i++) {
    const PtxInstruction& from = launch->instructions[i];
    Instruction& to = machine.program[i];
    static_cast<Opcode&>(to) = *opcode(from.name);
    to.guard = from.guard, to.negated = from.negated;
    to.operand = launch->operands + from.first, to.count = from.count;
  }
  machine.regions.assign(launch->regions, launch->regions + launch->region_count);
  skew(launch->skewed);
  machine.effects = launch->effects;
  machine.epoch = machine.launch_epoch = launch->epoch;
  std::vector<uint64_t> fresh((launch->file_bytes + 7) / 8);
  std::vector<std::unique_ptr<Warp>> warps;
  machine.traced = launch->only == nullptr;
  machine.executed = launch->executed, machine.traffic = launch->traffic;
  machine.cache.lines = launch->cache_lines;
  for (int each = 0; each < launch->blocks; each++) {
    const int index = launch->only ? launch->only[each] : each;
    machine.cache.clear();
    Block block{
        machine, index, std::vector<uint8_t>(launch->shared_bytes, 0xff), std::vector<Trace>(launch->shared_bytes), {}};
    warps.clear();
    for (int w = 0; w < launch->threads / LANES; w++) {
      warps.push_back(std::make_unique<Warp>(Warp{block, w, fresh}));
      Warp& warp = *warps.back();
      for (int i = 0; i < launch->constant_count; i++) {
        const PtxConstant& constant = launch->constants[i];
        warp.head(constant.at).defined = ALL;
        if (constant.bytes == 0) warp.predicate(constant.at) = constant.bits ? ALL : 0;
        for (int lane = 0; lane < LANES && constant.bytes; lane++) {
          std::memcpy(warp.lanes<uint8_t>(constant.at) + lane * constant.bytes, &constant.bits, constant.bytes);
        }
      }
      for (int lane = 0; lane < LANES; lane++) {
        if (launch->tid >= 0) warp.lanes<uint32_t>(launch->tid)[lane] = w * LANES + lane;
        if (launch->ctaid >= 0) warp.lanes<uint32_t>(launch->ctaid)[lane] = index;
      }
      for (const int64_t special : {launch->tid, launch->ctaid}) {
        if (special >= 0) warp.head(special).defined = ALL;
      }
      block.warps.push_back(&warp);
    }
    run_block(block, launch->limit);
  }
  launch->epoch = machine.epoch + 1;
  *counters = machine.counters;
  int found = 0;
  for (const auto& [where, finding] : machine.findings) {
    if (found < room) findings[found] = {where.first, where.second, finding.block, finding.warp, finding.count};
    found++;
  }
  return found;
}
}
