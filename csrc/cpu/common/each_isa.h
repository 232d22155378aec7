#pragma once

// Declares a table of kernels once in the namespace of each instruction set: every translation unit of an op is compiled
// for each of them, and defines the one of its own.
#define MVK_EACH_ISA(type, name) \
  namespace baseline {           \
  extern const type name;        \
  }                              \
  namespace avx2 {               \
  extern const type name;        \
  }                              \
  namespace avx512 {             \
  extern const type name;        \
  }                              \
  namespace neon {               \
  extern const type name;        \
  }
