// The module mvkernels._C and the CPU implementations of torch.ops.mvkernels_cpp.
//
// Only torch's stable C interface and Python's limited API are used: one binary serves every torch >= 2.10 and
// Python >= 3.10. The schemas are defined in Python; kInterface guards against a build that does not match them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdlib>
#include <exception>

#include "build_info.h"
#include "torch_host.h"

// The ops, after their host.
#include "common/linear_attention_op.h"
#include "common/mobile_former_op.h"
#include "conv3x3/conv3x3_op.h"
#include "elementwise/elementwise_op.h"
#include "inverted_residual/inverted_residual_op.h"
#include "module_state.h"
#include "multiscale_linear_attention/multiscale_op.h"
#include "patch_attention/patch_attention_op.h"
#include "pointwise/pointwise_op.h"
#include "window_attention/window_attention_op.h"

namespace mvk {
namespace {

constexpr long kInterface = 14;  // with INTERFACE in mvkernels/dispatch/extension.py

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

constexpr long long kMostRounds = 1000000000;  // some seconds of multiply-adds, in which nothing can interrupt them

// How many a call does on all threads, and the mean of their results: one that nobody took would not have to be computed.
template <class Mean>
PyObject* measured(const char* what, long long rounds, int64_t of_a_round, const Mean& mean_of) {
  if (rounds < 0 || rounds > kMostRounds)
    return PyErr_Format(PyExc_ValueError, "%lld rounds of %s, want 0 to %lld", rounds, what, kMostRounds);
  PyThreadState* state = PyEval_SaveThread();
  std::vector<double> means;
  bool failed = false;
  try {
    means.resize(size_t(threads()));
    parallel(int64_t(means.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) means[size_t(i)] = mean_of(rounds);
    });
  } catch (const std::exception&) {
    failed = true;
  }
  PyEval_RestoreThread(state);
  if (failed) return PyErr_Format(PyExc_RuntimeError, "mvkernels: torch's threads cannot be used");
  double mean = 0;
  for (double one : means) mean += one / double(means.size());
  return Py_BuildValue("Ld", rounds * of_a_round * (long long)(means.size()), mean);
}

// Of the benchmark, which divides them by the time that they take.
PyObject* multiply_adds(PyObject*, PyObject* args) {
  long long rounds;
  int doubles;
  if (!PyArg_ParseTuple(args, "Lp", &rounds, &doubles)) return nullptr;
  const MultiplyAdds& kernel = doubles ? current->multiply_adds->doubles : current->multiply_adds->singles;
  return measured("multiply-adds", rounds, kernel.flops, [&](int64_t n) { return kernel.mean(n, -0.9, 1.9); });
}

PyObject* exponentials(PyObject*, PyObject* args) {
  long long rounds;
  if (!PyArg_ParseTuple(args, "L", &rounds)) return nullptr;
  const Exponentials& kernel = current->multiply_adds->exponentials;
  return measured("exponentials", rounds, kernel.count, [&](int64_t n) { return kernel.mean(n); });
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
    {"module_state", module_state, METH_VARARGS,
     "module_state(module, parts) -> (tuple, bytes, bytes): the attributes of a module and of its parts, their "
     "addresses, and the cache lines that has_module_state will read."},
    {"has_module_state", has_module_state, METH_VARARGS,
     "has_module_state(module, parts, addresses) -> bool: whether they are the same objects still."},
    {"prefetch", prefetch, METH_VARARGS, "prefetch(lines): read the cache lines at these addresses soon."},
    {"sampled", sampled, METH_VARARGS,
     "sampled(stretches) -> int: of bytes at some places of memory, given as pairs of address and size."},
    {"multiply_adds", multiply_adds, METH_VARARGS,
     "multiply_adds(rounds, doubles) -> tuple: does rounds of multiply-adds in registers on each of torch's threads; "
     "their FLOPs, and the mean of their results, which is near 1 after some hundred rounds."},
    {"exponentials", exponentials, METH_VARARGS,
     "exponentials(rounds) -> tuple: the same of exponentials, as softmax takes them; their count, and a mean near "
     "-0.64."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", "mvkernels' C++ kernels.", -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace mvk

STABLE_TORCH_LIBRARY_IMPL(mvkernels_cpp, CPU, m) {
  m.impl("patch_attention_forward", &mvk::patch_attention_forward);
  m.impl("patch_attention_backward", &mvk::patch_attention_backward);
  m.impl("window_attention_forward", &mvk::window_attention_forward);
  m.impl("window_attention_backward", &mvk::window_attention_backward);
  m.impl("mobile_to_former_forward", &mvk::mobile_to_former_forward);
  m.impl("mobile_to_former_backward", &mvk::mobile_to_former_backward);
  m.impl("former_to_mobile_forward", &mvk::former_to_mobile_forward);
  m.impl("former_to_mobile_backward", &mvk::former_to_mobile_backward);
  m.impl("relu_linear_attention", &mvk::relu_linear_attention_forward<false>);
  m.impl("relu_linear_attention_forward", &mvk::relu_linear_attention_forward<true>);
  m.impl("relu_linear_attention_backward", &mvk::relu_linear_attention_backward);
  m.impl("multiscale_linear_attention", &mvk::multiscale_linear_attention_forward<false>);
  m.impl("multiscale_linear_attention_forward", &mvk::multiscale_linear_attention_forward<true>);
  m.impl("multiscale_linear_attention_backward", &mvk::multiscale_linear_attention_backward);
  m.impl("inverted_residual", &mvk::inverted_residual);
  m.impl("inverted_residual_pack", &mvk::inverted_residual_pack);
  m.impl("conv3x3", &mvk::conv3x3);
  m.impl("conv3x3_pack", &mvk::conv3x3_pack);
  m.impl("pointwise", &mvk::pointwise);
  m.impl("pointwise_pack", &mvk::pointwise_pack);
  m.impl("norm_activation", &mvk::norm_activation);
  m.impl("norm_activation_", &mvk::norm_activation_);
  m.impl("pooled_difference", &mvk::pooled_difference);
  m.impl("picture_norm", &mvk::picture_norm);
}

PyMODINIT_FUNC PyInit__C() {
  if (!mvk::current) {
    PyErr_SetString(PyExc_ImportError, "built for no instruction set of this processor, build it again here");
    return nullptr;
  }
  if (!mvk::take_wanted_set()) {
    const char* wanted = std::getenv("MVKERNELS_CPU_ISA");
    return PyErr_Format(PyExc_ImportError, "MVKERNELS_CPU_ISA=%s is not built or not on this processor", wanted);
  }
  return PyModule_Create(&mvk::kModule);
}
