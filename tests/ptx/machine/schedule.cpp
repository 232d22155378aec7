// Which lanes of which warp run which instruction.
//
// Lanes of a warp that have gone different ways run in turn, those that are furthest behind first, so that they meet
// again where their ways do. A warp runs until it waits at the block's barrier; the barrier opens when all wait.
#include <algorithm>
#include <bit>

#include "machine.h"

namespace ptx {
namespace {

Mask guarded(Warp& warp, const Instruction& in, Mask active) {
  if (in.guard < 0) return active;
  const Mask unknown = active & ~warp.defined(in.guard);
  if (unknown) warp.fault(UNDEFINED);
  const Mask holds = warp.predicate(in.guard);
  return active & (in.negated ? ~holds : holds) & ~unknown;
}

// Lanes at the lowest address, and that address.
Mask furthest_behind(Warp& warp) {
  uint32_t lowest = ~0u;
  Mask found = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (warp.exited >> lane & 1 || warp.pc[lane] > lowest) continue;
    if (warp.pc[lane] < lowest) lowest = warp.pc[lane], found = 0;
    found |= Mask{1} << lane;
  }
  warp.at = lowest;
  return found;
}

void move(Warp& warp, Mask lanes, uint32_t to) {
  for (int lane = 0; lane < LANES; lane++) {
    if (lanes >> lane & 1) warp.pc[lane] = to;
  }
}

// Runs a warp until it waits or has ended.
void run_warp(Warp& warp, uint64_t& left) {
  Machine& machine = warp.machine();
  bool together = false;  // all lanes are at warp.at, and what `pc` says is old
  Mask active = 0;
  while (warp.exited != ALL) {
    if (!together) {
      active = furthest_behind(warp);
      together = active == ALL;
    }
    if (warp.at >= machine.program.size()) {  // past the end: as if it returned
      warp.exited = ALL;
      return;
    }
    const Instruction& in = machine.program[warp.at];
    machine.counters.issued[in.kind]++;
    if (machine.executed) machine.executed[warp.at]++;
    warp.clock++;
    if (left-- == 0) {
      warp.fault(ENDLESS);
      warp.exited = ALL;
      left = 0;
      return;
    }
    const uint32_t next = warp.at + 1;
    const Mask acting = guarded(warp, in, active);
    if (machine.effects && acting) machine.effects[warp.at]++;
    if (in.kind == CONTROL && in.a == WAIT && acting) {
      if (!warp.all(acting)) warp.fault(DIVERGENT);
      move(warp, active, next);
      warp.waits = true;
      return;
    }
    if (in.kind != CONTROL) {
      if (acting) in.handler(warp, in, acting);
    } else if (in.a == BRANCH && acting == active) {
      if (together) {
        warp.at = static_cast<uint32_t>(in.operand[0]);
        continue;
      }
      move(warp, active, static_cast<uint32_t>(in.operand[0]));
      continue;
    } else if (in.a == BRANCH && acting) {
      move(warp, active, next);
      move(warp, acting, static_cast<uint32_t>(in.operand[0]));
      together = false;
      continue;
    } else if (in.a == EXIT && acting) {
      move(warp, active, next);
      warp.exited |= acting;
      together = false;
      continue;
    }
    if (together)
      warp.at = next;
    else
      move(warp, active, next);
  }
}

}  // namespace

void run_block(Block& block, uint64_t limit) {
  Machine& machine = block.machine;
  machine.block_epoch = ++machine.epoch;
  uint64_t left = limit;
  for (bool backward = false;; backward = !backward) {
    // First one way round, then the other: a race that goes well in one order may not in the other.
    for (size_t i = 0; i < block.warps.size(); i++) {
      Warp& warp = *block.warps[backward ? block.warps.size() - 1 - i : i];
      if (warp.exited != ALL) run_warp(warp, left);
    }
    const Warp* first = nullptr;
    bool any_ended = false;
    for (Warp* warp : block.warps) {
      any_ended |= warp->exited == ALL;
      if (!warp->waits) continue;
      // Warps may meet at different barriers of the same number, but no compiler means them to.
      if (first && first->at != warp->at) warp->fault(DIVERGENT);
      if (!first) first = warp;
    }
    for (size_t i = 0; i + 4 <= block.warps.size(); i += 4) {
      // A product of a warp group is one of all its warps.
      for (size_t other = i + 1; other < i + 4; other++) {
        if (block.warps[other]->begun != block.warps[i]->begun) block.warps[other]->fault(DIVERGENT);
      }
    }
    if (!first) break;
    for (Warp* warp : block.warps) {
      if (warp->waits && any_ended) warp->fault(DIVERGENT);
      warp->waits = false;
    }
    machine.epoch++;
  }
  for (Warp* warp : block.warps) abandon_copies(*warp);
}

void add_control() {
  opcodes()["bra"] = {nullptr, CONTROL, BRANCH};
  opcodes()["ret"] = opcodes()["exit"] = {nullptr, CONTROL, EXIT};
  opcodes()["bar.sync"] = opcodes()["barrier.sync"] = {nullptr, CONTROL, WAIT};
}

}  // namespace ptx
