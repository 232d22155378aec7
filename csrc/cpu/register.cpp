// The module mvkernels._C and the CPU implementations of torch.ops.mvkernels_cpp.
//
// Only torch's stable C interface and Python's limited API are used: one binary serves every torch >= 2.10 and
// Python >= 3.10. The schemas are defined in Python; kInterface guards against a build that does not match them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "patch_attention.h"

namespace mvk {
namespace {

constexpr long kInterface = 2;  // with INTERFACE in mvkernels/extension.py
bool poison = false;

// ---- instruction sets ----

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const PatchAttentionKernels* patch_attention;
};

const InstructionSet kInstructionSets[] = {
// best first
#if defined(MVK_AVX512)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     },
     &avx512::patch_attention_kernels},
#endif
#if defined(MVK_AVX2)
    {"avx2",
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
     &avx2::patch_attention_kernels},
#endif
#if defined(MVK_NEON)
    {"neon", [] { return true; }, &neon::patch_attention_kernels},
#endif
#if defined(MVK_BASELINE)
    {"baseline", [] { return true; }, &baseline::patch_attention_kernels},
#endif
};

const InstructionSet* find(const char* name) {
  for (const InstructionSet& set : kInstructionSets)
    if (set.supported() && (!name || !std::strcmp(name, set.name))) return &set;
  return nullptr;
}

const InstructionSet* current = find(nullptr);

// ---- tensors through the stable C interface ----

void check(AOTITorchError error) {
  if (error) throw std::runtime_error("mvkernels: torch refused a call of its C interface");
}

// Owns a tensor handle.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  explicit operator bool() const { return handle_; }

  void* data() const {
    void* out;
    check(aoti_torch_get_data_ptr(handle_, &out));
    return out;
  }
  int64_t dim() const {
    int64_t out;
    check(aoti_torch_get_dim(handle_, &out));
    return out;
  }
  const int64_t* sizes() const {
    int64_t* out;
    check(aoti_torch_get_sizes(handle_, &out));
    return out;
  }
  const int64_t* strides() const {
    int64_t* out;
    check(aoti_torch_get_strides(handle_, &out));
    return out;
  }
  int32_t dtype() const {
    int32_t out;
    check(aoti_torch_get_dtype(handle_, &out));
    return out;
  }

 private:
  AtenTensorHandle handle_ = nullptr;
};

size_t item_size(int32_t dtype) {
  return dtype == aoti_torch_dtype_float64() ? 8 : dtype == aoti_torch_dtype_float32() ? 4 : 2;
}

Tensor empty(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  AtenTensorHandle out;
  check(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &out));
  Tensor tensor(out);
  if (poison) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    if (count) std::memset(tensor.data(), 0xff, size_t(count) * item_size(dtype));
  }
  return tensor;
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i--;) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes[i], 1);
  }
  return empty(sizes, strides, dtype);
}

// As mvkernels.checks.empty_map: dense, channels last if `like`'s stride over the dims is 1.
Tensor empty_map(const Tensor& like, int64_t dim) {
  const int64_t* n = like.sizes();
  const std::vector<int64_t> sizes{n[0], n[1], dim, n[3], n[4]};
  if (like.strides()[2] != 1) return empty(sizes, like.dtype());
  auto at_least_1 = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t x = at_least_1(n[1]) * at_least_1(dim), y = x * at_least_1(n[4]), b = y * at_least_1(n[3]);
  return empty(sizes, {b, at_least_1(dim), 1, y, x}, like.dtype());
}

Map map(const Tensor& t) {
  const int64_t* s = t.strides();
  return {t.data(), s[0], s[1], s[2], s[3], s[4]};
}

void require(bool fits, const char* what) {
  if (!fits) throw std::runtime_error(std::string("mvkernels: ") + what);
}

bool same_sizes(const Tensor& a, const Tensor& b, std::initializer_list<int> axes) {
  const int64_t *n = a.sizes(), *m = b.sizes();
  return std::all_of(axes.begin(), axes.end(), [&](int axis) { return n[axis] == m[axis]; });
}

Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
Tensor take_optional(StableIValue value) {
  auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
  return handle ? Tensor(*handle) : Tensor();
}
void give(StableIValue* to, Tensor& tensor) { *to = torch::stable::detail::from(tensor.release()); }

// ---- threads ----

template <class F>
void parallel(int64_t count, int64_t grain, const F& body) {
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  check(torch_parallel_for(0, count, grain, call, const_cast<void*>(static_cast<const void*>(&body))));
}

int64_t threads() {
  uint32_t out;
  check(torch_get_num_threads(&out));
  return out;
}

constexpr double kWorthAThread = 2e6;  // FLOPs: some 30 microseconds

// ---- patch attention ----

// What forward and backward have in common; checks again what indexing relies on, for callers of the raw operator.
PatchAttention describe(
    const Tensor& query, const Tensor& key, const Tensor& value, int64_t ph, int64_t pw, const Tensor& bias,
    double scale) {
  require(query.dim() == 5 && key.dim() == 5 && value.dim() == 5, "patch_attention: maps have 5 axes");
  require(
      same_sizes(query, key, {0, 1, 2, 3, 4}) && same_sizes(query, value, {0, 1, 3, 4}),
      "patch_attention: query, key and value do not fit");
  require(query.dtype() == key.dtype() && query.dtype() == value.dtype(), "patch_attention: mixed dtypes");
  require(ph >= 1 && pw >= 1, "patch_attention: patch_size is less than 1");
  PatchAttention a{};
  const int32_t dtype = query.dtype();
  if (dtype == aoti_torch_dtype_float32())
    a.dtype = DType::f32;
  else if (dtype == aoti_torch_dtype_float64())
    a.dtype = DType::f64;
  else if (dtype == aoti_torch_dtype_float16())
    a.dtype = DType::f16;
  else if (dtype == aoti_torch_dtype_bfloat16())
    a.dtype = DType::bf16;
  else
    throw std::runtime_error("mvkernels: patch_attention: dtype is not float16, bfloat16, float32 or float64");
  const int64_t* n = query.sizes();
  a.B = n[0], a.heads = n[1], a.D = n[2], a.H = n[3], a.W = n[4], a.Dv = value.sizes()[2];
  a.ph = ph, a.pw = pw, a.scale = scale;
  a.query = map(query), a.key = map(key), a.value = map(value);
  a.poison = poison;
  if (bias) {
    const int64_t *m = bias.sizes(), *s = bias.strides();
    require(
        bias.dim() == 3 && bias.dtype() == dtype && m[0] == a.heads && m[1] == a.tokens() && m[2] == a.tokens() &&
            a.H % ph == 0 && a.W % pw == 0,
        "patch_attention: bias does not fit");
    a.bias = bias.data();
    std::copy(s, s + 3, a.bias_stride);
  }
  a.slices = a.B * a.groups();
  a.chunks = 1;
  return a;
}

int32_t sums_dtype(const PatchAttention& a) {
  return a.dtype == DType::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// The fewest units that one thread should get.
int64_t grain(const PatchAttention& a, double flops_of_a_pair) {
  const double n = double(a.tokens()), flops = n * n * flops_of_a_pair / double(a.chunks);
  return std::max<int64_t>(1, int64_t(kWorthAThread / std::max(flops, 1.0)));
}

// Chunks that give every thread a unit, if the work is worth it.
int64_t chunks(const PatchAttention& a, double flops_of_a_pair, int64_t most) {
  const int64_t units = std::max<int64_t>(a.slices * a.heads, 1), wanted = threads();
  const double n = double(a.tokens()), flops = n * n * flops_of_a_pair;
  if (units >= wanted || flops < 2 * kWorthAThread) return 1;
  return std::clamp<int64_t>((wanted + units - 1) / units, 1, std::max<int64_t>(most, 1));
}

void patch_attention_forward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor query = take(stack[0]), key = take(stack[1]), value = take(stack[2]), bias = take_optional(stack[5]);
  PatchAttention a = describe(
      query, key, value, torch::stable::detail::to<int64_t>(stack[3]), torch::stable::detail::to<int64_t>(stack[4]),
      bias, torch::stable::detail::to<double>(stack[6]));
  Tensor out = empty_map(query, a.Dv), lse = empty({a.B, a.heads, a.H, a.W}, aoti_torch_dtype_float64());
  if (a.B && a.heads && a.Dv) {
    a.out = map(out), a.lse = static_cast<double*>(lse.data());
    const double pair = 2.0 * double(a.D + a.Dv);
    a.chunks = chunks(a, pair, a.tokens() / PatchAttention::kBlock);
    parallel(a.units(), grain(a, pair), [&](int64_t i, int64_t j) { current->patch_attention->forward(a, i, j); });
  }
  give(stack, out);
  give(stack + 1, lse);
}

void patch_attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Tensor grad = take(stack[0]), query = take(stack[1]), key = take(stack[2]), value = take(stack[3]);
  Tensor out = take(stack[4]), lse = take(stack[5]), bias = take_optional(stack[8]);
  const bool need_bias = torch::stable::detail::to<bool>(stack[10]);
  PatchAttention a = describe(
      query, key, value, torch::stable::detail::to<int64_t>(stack[6]), torch::stable::detail::to<int64_t>(stack[7]),
      bias, torch::stable::detail::to<double>(stack[9]));
  require(
      grad.dim() == 5 && out.dim() == 5 && same_sizes(grad, value, {0, 1, 2, 3, 4}) &&
          same_sizes(out, value, {0, 1, 2, 3, 4}) && grad.dtype() == query.dtype() && out.dtype() == query.dtype(),
      "patch_attention: grad or out does not fit");
  require(
      lse.dim() == 4 && lse.dtype() == aoti_torch_dtype_float64() && lse.sizes()[0] == a.B &&
          lse.sizes()[1] == a.heads && lse.sizes()[2] == a.H && lse.sizes()[3] == a.W,
      "patch_attention: lse does not fit");
  require(!need_bias || bias, "patch_attention: there is no bias to differentiate");
  a.out = map(out), a.grad = map(grad), a.lse = static_cast<double*>(lse.data());
  Tensor dquery = empty_map(query, a.D), dkey = empty_map(key, a.D), dvalue = empty_map(value, a.Dv);
  a.dquery = map(dquery), a.dkey = map(dkey), a.dvalue = map(dvalue);

  const int64_t N = a.tokens();
  const double pair = 2.0 * double(3 * a.D + 2 * a.Dv);
  Tensor dbias = need_bias ? empty({a.heads, N, N}, query.dtype()) : empty({0}, query.dtype());
  Tensor partial;
  if (need_bias) {
    a.slices = std::clamp<int64_t>(
        (threads() + a.heads - 1) / std::max<int64_t>(a.heads, 1), 1, std::max<int64_t>(a.slices, 1));
    a.dbias = dbias.data();
    if (a.B * a.groups() > 1) {
      partial = empty({a.slices, a.heads, N, a.padded()}, sums_dtype(a));
      a.dbias_partial = partial.data();
    } else if (!a.B && a.heads) {
      std::memset(a.dbias, 0, size_t(a.heads * N * N) * item_size(query.dtype()));
    }
  } else {
    a.chunks = chunks(a, pair, N / 64);
    if (a.chunks > 1) {
      partial = empty({a.units(), a.padded(), a.D}, sums_dtype(a));
      a.dquery_partial = partial.data();
    }
  }
  if (a.B && a.heads) {
    const PatchAttentionKernels& kernels = *current->patch_attention;
    parallel(a.units(), need_bias ? 1 : grain(a, pair), [&](int64_t i, int64_t j) { kernels.backward(a, i, j); });
    if (a.dquery_partial) parallel(a.slices * a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_dquery(a, i, j); });
    if (a.dbias_partial) parallel(a.heads, 1, [&](int64_t i, int64_t j) { kernels.sum_dbias(a, i, j); });
  }
  give(stack, dquery);
  give(stack + 1, dkey);
  give(stack + 2, dvalue);
  give(stack + 3, dbias);
}

// ---- the Python module ----

PyObject* interface(PyObject*, PyObject*) { return PyLong_FromLong(kInterface); }
PyObject* build_info(PyObject*, PyObject*) { return PyUnicode_FromString(MVK_BUILD_INFO); }
PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(current->name); }

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const InstructionSet& set : kInstructionSets) {
    if (!names || !set.supported()) continue;
    PyObject* name = PyUnicode_FromString(set.name);
    if (!name || PyList_Append(names, name) < 0) Py_CLEAR(names);
    Py_XDECREF(name);
  }
  return names;
}

PyObject* set_instruction_set(PyObject*, PyObject* argument) {
  PyObject* bytes = PyUnicode_AsUTF8String(argument);
  if (!bytes) return nullptr;
  const InstructionSet* set = find(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  if (!set) return PyErr_Format(PyExc_ValueError, "instruction set %R is not built or not on this processor", argument);
  const char* before = current->name;
  current = set;
  return PyUnicode_FromString(before);
}

PyObject* set_poison(PyObject*, PyObject* argument) {
  const int on = PyObject_IsTrue(argument);
  if (on < 0) return nullptr;
  const bool before = poison;
  poison = on;
  return PyBool_FromLong(before);
}

PyMethodDef kMethods[] = {
    {"interface", interface, METH_NOARGS, "interface() -> int: the contract with the Python package."},
    {"build_info", build_info, METH_NOARGS, "build_info() -> str: JSON of compiler, flags, torch, instruction sets."},
    {"instruction_set", instruction_set, METH_NOARGS, "instruction_set() -> str: the one in use."},
    {"instruction_sets", instruction_sets, METH_NOARGS,
     "instruction_sets() -> list: those built and supported, best first."},
    {"set_instruction_set", set_instruction_set, METH_O,
     "set_instruction_set(name) -> str: use another; returns the one before."},
    {"set_poison", set_poison, METH_O,
     "set_poison(on) -> bool: fill fresh buffers with NaN; returns the setting before."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", "mvkernels' C++ kernels.", -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mvk

STABLE_TORCH_LIBRARY_IMPL(mvkernels_cpp, CPU, m) {
  m.impl("patch_attention_forward", &mvk::patch_attention_forward);
  m.impl("patch_attention_backward", &mvk::patch_attention_backward);
}

PyMODINIT_FUNC PyInit__C() {
  if (const char* wanted = std::getenv("MVKERNELS_CPU_ISA")) {
    const mvk::InstructionSet* set = *wanted ? mvk::find(wanted) : mvk::current;
    if (!set) {
      PyErr_Format(PyExc_ImportError, "MVKERNELS_CPU_ISA=%s is not built or not on this processor", wanted);
      return nullptr;
    }
    mvk::current = set;
  }
  return PyModule_Create(&mvk::kModule);
}
