// What measures the peak of a processor's arithmetic, shared by the registration and the kernels: plain data, no torch.
#pragma once

#include <cstdint>

#include "common/each_isa.h"

namespace mvk {

struct MultiplyAdds {
  // So many rounds of x = factor * x + addend on numbers that stay in registers, and the mean of these. With a factor below 1
  // in size they come near addend / (1 - factor), so however many the rounds are, none becomes an infinity or denormal.
  double (*mean)(int64_t rounds, double factor, double addend);
  int64_t flops;  // of a round
};

// The same of softmax's exponentials: x = -2^x, whose values come near -0.64.
struct Exponentials {
  double (*mean)(int64_t rounds);
  int64_t count;  // of a round
};

// One set for each instruction set.
struct MultiplyAddsKernels {
  MultiplyAdds singles, doubles;
  Exponentials exponentials;
};

MVK_EACH_ISA(MultiplyAddsKernels, multiply_adds_kernels)

}  // namespace mvk
