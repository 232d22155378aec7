// Which weights a thread reads after which: as it was the last time. The layers of a model follow each other always in the same order,
// so while one runs, the first weights of the next can be prefetched. Included by the files that register ops alone.
#pragma once

#include "common/packed_sizes.h"

namespace mvk {
namespace {

class Following {
 public:
  // Notes that `packed` is read now, `first` of it before all else. Returns what was read after it the last time.
  Stretch after(const void* packed, Stretch first) {
    Place& here = places_[reinterpret_cast<uintptr_t>(packed) / 64 % kPlaces];
    if (last_) last_->next = first;
    if (here.packed != packed) here = {packed, {}};
    last_ = &here;
    return here.next;
  }

 private:
  static constexpr size_t kPlaces = 256;
  // The memory may have been freed since: prefetching it is harmless, since nothing is read.
  struct Place {
    const void* packed;
    Stretch next;
  } places_[kPlaces] = {};
  Place* last_ = nullptr;
};
thread_local Following following;

}  // namespace
}  // namespace mvk
