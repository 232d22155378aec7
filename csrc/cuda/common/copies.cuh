// Copies from global to shared memory that go on while other instructions run.
#pragma once

#include <cstdint>

namespace mvk {

// BYTES (4, 8 or 16, both addresses a multiple of it), of which the first `read` are read and the rest is zeros.
template <int BYTES>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int read) {
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(read), "n"(BYTES)
                 : "memory");
  }
}

template <int BYTES>
void copy_async(uint32_t to, const void* from, bool) = delete;  // it would be read as one byte or none

// All of them, or with `keep` false zeros, without reading.
template <int BYTES>
__device__ __forceinline__ void copy_async_if(uint32_t to, const void* from, bool keep) {
  copy_async<BYTES>(to, from, keep ? BYTES : 0);
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the PENDING latest groups are there, for this thread; others need a barrier too.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace mvk
