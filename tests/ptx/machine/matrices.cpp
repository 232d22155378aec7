// Products on the tensor cores: mma.sync of one warp, and wgmma, whose operands may lie in shared memory and which
// happens when it is waited for. Sums are exact to double and rounded once; hardware rounds more often.
#include <array>
#include <bit>
#include <vector>

#include "lanewise.h"

namespace ptx {
namespace {

// A product of one warp: 8 or 16 rows of A, N columns of B.
struct Operands {
  int rows, columns, depth;
  std::vector<double> a, b;                   // (rows, depth) and (columns, depth)
  std::vector<uint8_t> a_defined, b_defined;  // of a row, of a column
  Operands(int rows, int columns, int depth)
      : rows(rows),
        columns(columns),
        depth(depth),
        a(rows * depth),
        b(columns * depth),
        a_defined(rows, 1),
        b_defined(columns, 1) {}
  double product(int row, int column) const {
    double sum = 0;
    const double *x = &a[row * depth], *y = &b[column * depth];
    for (int k = 0; k < depth; k++) sum += x[k] * y[k];
    return sum;
  }
};

double tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000); }  // the low bits are not looked at
template <class H>
double half(uint16_t bits) {
  return static_cast<float>(std::bit_cast<H>(bits));
}

enum Type { BF16, F16, TF32, F64 };
int bytes_of(Type type) { return type == F64 ? 8 : type == TF32 ? 4 : 2; }

double element(Type type, const uint8_t* at) {
  uint64_t bits = 0;
  std::memcpy(&bits, at, bytes_of(type));
  return type == BF16   ? half<Bfloat>(static_cast<uint16_t>(bits))
         : type == F16  ? half<Half>(static_cast<uint16_t>(bits))
         : type == TF32 ? tf32(static_cast<uint32_t>(bits))
                        : std::bit_cast<double>(bits);
}

// A register of a fragment holds one element, or two halves that follow each other in k. Lane l has row (column of B)
// l / 4 and from k = l % 4 on, in steps of four registers' worth.
template <class Set>
void fragment(Warp& warp, const int64_t* registers, int count, int per_row, Type type, Set set) {
  const int halves = type == BF16 || type == F16 ? 2 : 1, bytes = bytes_of(type);
  for (int i = 0; i < count; i++) {
    const uint8_t* lanes = warp.lanes<uint8_t>(registers[i]);
    const Mask defined = warp.defined(registers[i]);
    for (int lane = 0; lane < LANES; lane++) {
      for (int h = 0; h < halves; h++) {
        const int row = lane / 4 + 8 * (i % per_row), k = (lane % 4 + 4 * (i / per_row)) * halves + h;
        set(row, k, element(type, lanes + (lane * halves + h) * bytes), defined >> lane & 1);
      }
    }
  }
}

void read_a(Warp& warp, const int64_t* registers, int count, Type type, Operands& into) {
  fragment(warp, registers, count, into.rows / 8, type, [&](int row, int k, double value, bool defined) {
    into.a[row * into.depth + k] = value;
    into.a_defined[row] &= defined;
  });
}

// Adds the product to the accumulators, or puts it in their place: two columns a lane, eight rows apart, and so on.
template <class T>
void finish(Warp& warp, const Operands& of, const int64_t* to, const int64_t* from) {
  const int per_tile = of.rows / 4;  // registers of eight columns
  for (int i = 0; i < of.columns / 8 * per_tile; i++) {
    T result[LANES];
    Mask defined = from ? warp.defined(from[i]) : ALL;
    for (int lane = 0; lane < LANES; lane++) {
      const int row = lane / 4 + 8 * (i % per_tile / 2), column = 8 * (i / per_tile) + 2 * (lane % 4) + i % 2;
      const double sum = of.product(row, column);
      result[lane] = static_cast<T>(from ? sum + warp.lanes<T>(from[i])[lane] : sum);
      if (!(of.a_defined[row] && of.b_defined[column])) defined &= ~(Mask{1} << lane);
    }
    warp.put(to[i], result, ALL, defined);
  }
}

void count(Warp& warp, const Operands& of) {
  warp.machine().counters.matrix_flops += 2ull * of.rows * of.columns * of.depth;
}

// mma.sync: d, a, b, c. Opcode's a: rows; b: depth.
template <Type TYPE, class Sum>
void multiply(Warp& warp, const Instruction& in, Mask active) {
  if (!warp.whole(active)) return;
  Operands of(in.a, 8, in.b);
  const int sums = of.rows / 4, b_count = of.depth * (TYPE == BF16 || TYPE == F16 ? 1 : 2) / 8,
            a_count = b_count * of.rows / 8;
  const int64_t *a = in.operand + sums, *b = a + a_count, *c = b + b_count;
  read_a(warp, a, a_count, TYPE, of);
  fragment(warp, b, b_count, 1, TYPE, [&](int column, int k, double value, bool defined) {
    of.b[column * of.depth + k] = value;
    of.b_defined[column] &= defined;
  });
  finish<Sum>(warp, of, in.operand, c);
  count(warp, of);
}

// A matrix in shared memory as a descriptor tells of it: PTX ISA, "Asynchronous warpgroup level matrix shared memory
// layout". Rows are of A, or columns of B; `along` says that they, and not k, lie side by side.
struct SharedMatrix {
  uint32_t start, leading, stride;
  int swizzle;  // bytes of a row that is swizzled, 0 for none
  bool along;
  int bytes;

  SharedMatrix(uint64_t descriptor, bool along, int bytes)
      : start((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4),
        swizzle(std::array{0, 128, 64, 32}[descriptor >> 62]),
        along(along),
        bytes(bytes) {}

  uint32_t address(int row, int k) const {
    // Eight rows of 16 bytes, or of the swizzled width, are the piece that everything is made of.
    const uint32_t inner = (along ? row : k) * bytes, outer = along ? k : row, width = swizzle ? swizzle : 16;
    uint32_t at = start + inner % width + outer % 8 * width;
    if (along)
      at += inner / width * (swizzle ? leading : stride) + outer / 8 * (swizzle ? stride : leading);
    else
      at += outer / 8 * stride + inner / width * (swizzle ? width : leading);
    return swizzle ? at ^ ((at >> 7 & (swizzle / 16 - 1)) << 4) : at;
  }
};

// wgmma: N / 2 sums, A (a descriptor, or four registers), descriptor of B, a predicate (add to the sums), then numbers:
// signs of A and B, and for half types whether their rows lie side by side. Opcode's a: N; b: bytes of k's step.
struct Wgmma {
  int columns, depth;
  bool a_in_registers, a_along = false, b_along = false, negative;
  const int64_t *sums, *a, *b, *add;
};

template <Type TYPE>
Wgmma read(const Instruction& in) {
  Wgmma found{};
  found.columns = in.a, found.depth = 32 / bytes_of(TYPE);
  const bool halves = TYPE != TF32;
  const int rest = in.count - in.a / 2;  // after the sums
  found.a_in_registers = rest == (halves ? 9 : 8);
  found.sums = in.operand, found.a = in.operand + in.a / 2;
  found.b = found.a + (found.a_in_registers ? 4 : 1), found.add = found.b + 1;
  const int64_t* numbers = found.add + 1;
  found.negative = numbers[0] != numbers[1];  // each is 1 or -1
  if (halves && !found.a_in_registers) found.a_along = numbers[2];
  if (halves) found.b_along = numbers[found.a_in_registers ? 2 : 3];
  return found;
}

template <Type TYPE, class Each>
void each_byte_range(Warp& warp, const Wgmma& of, const std::array<uint64_t, 2>& descriptors, Each each) {
  const int bytes = bytes_of(TYPE);
  if (!of.a_in_registers) {
    const SharedMatrix a(descriptors[0], of.a_along, bytes);
    for (int row = 0; row < 16; row++) {
      for (int k = 0; k < of.depth; k++) each(0, row, k, a.address(row + 16 * (warp.index % 4), k));
    }
  }
  const SharedMatrix b(descriptors[1], of.b_along, bytes);
  for (int column = 0; column < of.columns; column++) {
    for (int k = 0; k < of.depth; k++) each(1, column, k, b.address(column, k));
  }
}

template <Type TYPE>
void begin_product(Warp& warp, const Instruction& in, Mask active) {
  if (!warp.whole(active)) return;
  const Wgmma of = read<TYPE>(in);
  Product product{&in, {}, true};
  for (int i = 0; i < 2; i++) {
    if (i == 0 && of.a_in_registers) continue;
    const int64_t reg = i ? *of.b : *of.a;
    if (warp.defined(reg) != ALL) return warp.fault(UNDEFINED);
    product.descriptors[i] = warp.lanes<uint64_t>(reg)[0];
  }
  if (warp.defined(*of.add) != ALL) warp.fault(UNDEFINED);
  product.accumulate = warp.predicate(*of.add) & 1;
  // A fence comes first, and follows whatever but another product has written the registers.
  if (warp.fenced == 0) warp.fault(UNFENCED_REGISTER);
  for (int i = 0; i < of.columns / 2; i++) {
    Register& sum = warp.head(of.sums[i]);
    if (sum.in_flight == 0 && sum.written > warp.fenced) warp.fault(UNFENCED_REGISTER);
    if (sum.in_flight++ == 0) sum.held = sum.defined;
    sum.defined = 0;
  }
  for (int i = 0; of.a_in_registers && i < 4; i++) {
    if (warp.head(of.a[i]).written > warp.fenced) warp.fault(UNFENCED_REGISTER);
    warp.head(of.a[i]).wanted++;
  }
  warp.begun++;
  each_byte_range<TYPE>(warp, of, product.descriptors, [&](int, int, int, uint32_t address) {
    begin_read(warp, address, bytes_of(TYPE));
  });
  warp.products.groups.back().push_back(product);
}

template <Type TYPE>
void end_product(Warp& warp, const Product& product) {
  const Wgmma of = read<TYPE>(*product.instruction);
  Operands operands(16, of.columns, of.depth);
  if (of.a_in_registers) read_a(warp, of.a, 4, TYPE, operands);
  for (int i = 0; of.a_in_registers && i < 4; i++) warp.head(of.a[i]).wanted--;
  warp.finishing = true;
  each_byte_range<TYPE>(warp, of, product.descriptors, [&](int side, int row, int k, uint32_t address) {
    uint8_t value[8] = {};
    const bool defined = read_shared(warp, -1, address, bytes_of(TYPE), value);
    end_read(warp, address, bytes_of(TYPE));
    const double x = element(TYPE, value);
    (side ? operands.b : operands.a)[row * of.depth + k] = of.negative && side ? -x : x;
    (side ? operands.b_defined : operands.a_defined)[row] &= defined;
  });
  for (int i = 0; i < of.columns / 2; i++) warp.head(of.sums[i]).defined = warp.head(of.sums[i]).held;
  finish<float>(warp, operands, of.sums, product.accumulate ? of.sums : nullptr);
  for (int i = 0; i < of.columns / 2; i++) {
    Register& sum = warp.head(of.sums[i]);
    sum.held = sum.defined;
    // Written by a product, which no fence need follow.
    sum.written = 0;
    if (--sum.in_flight) sum.defined = 0;
  }
  warp.finishing = false;
  count(warp, operands);
}

void fence(Warp& warp, const Instruction&, Mask active) {
  if (warp.whole(active)) warp.fenced = warp.clock;
}

void commit(Warp& warp, const Instruction&, Mask active) {
  if (warp.whole(active)) warp.products.commit();
}

using Ending = void (*)(Warp&, const Product&);
std::unordered_map<Handler, Ending> endings;

void wait(Warp& warp, const Instruction& in, Mask active) {
  if (!warp.whole(active)) return;
  while (static_cast<int64_t>(warp.products.groups.size()) - 1 > in.operand[0]) {
    for (const Product& each : warp.products.groups.front()) endings.at(each.instruction->handler)(warp, each);
    warp.products.groups.pop_front();
  }
}

template <Type TYPE>
void add_wgmma(const std::string& type) {
  endings[begin_product<TYPE>] = end_product<TYPE>;
  for (int n = 8; n <= 256; n += 8) {
    const std::string shape = "m64n" + std::to_string(n) + "k" + std::to_string(32 / bytes_of(TYPE));
    opcodes()["wgmma.mma_async.sync.aligned." + shape + ".f32." + type + "." + type] = {begin_product<TYPE>, MATRIX, n};
  }
}

template <Type TYPE, class Sum>
void add_mma(const std::string& type, const std::string& sum, std::initializer_list<std::array<int, 2>> shapes) {
  for (const auto& [rows, depth] : shapes) {
    const std::string shape = "m" + std::to_string(rows) + "n8k" + std::to_string(depth);
    opcodes()["mma.sync.aligned." + shape + ".row.col." + sum + "." + type + "." + type + "." + sum] = {
        multiply<TYPE, Sum>, MATRIX, rows, depth};
  }
}

}  // namespace

void add_matrices() {
  add_mma<BF16, float>("bf16", "f32", {{16, 8}, {16, 16}}), add_mma<F16, float>("f16", "f32", {{16, 8}, {16, 16}});
  add_mma<TF32, float>("tf32", "f32", {{16, 4}, {16, 8}});
  add_mma<F64, double>("f64", "f64", {{8, 4}, {16, 4}, {16, 8}, {16, 16}});
  add_wgmma<BF16>("bf16"), add_wgmma<F16>("f16"), add_wgmma<TF32>("tf32");
  opcodes()["wgmma.fence.sync.aligned"] = {fence, MATRIX};
  opcodes()["wgmma.commit_group.sync.aligned"] = {commit, MATRIX};
  opcodes()["wgmma.wait_group.sync.aligned"] = {wait, MATRIX};
}

}  // namespace ptx
