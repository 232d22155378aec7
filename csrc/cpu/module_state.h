// What the Python attributes of modules are, object by object, and samples of what is in memory: to find out in microseconds whether
// something was exchanged or written.
#pragma once

#include <Python.h>

#include <cstdint>
#include <cstring>
#include <unordered_set>
#include <vector>

namespace mvk {
namespace {

// Whether an attribute has no say in what a call of the module computes: hooks of its state_dict, and which of the hooks of a call
// have some property, since the hooks themselves are looked at. A third of a module's memory need not be read so.
class OfNoCall {
 public:
  OfNoCall() {
    const char* const names[] = {
        "_non_persistent_buffers_set", "_forward_hooks_with_kwargs",  "_forward_hooks_always_called",
        "_state_dict_hooks",           "_state_dict_pre_hooks",       "_forward_pre_hooks_with_kwargs",
        "_load_state_dict_pre_hooks",  "_load_state_dict_post_hooks",
    };
    for (const char* name : names) {
      names_.push_back(PyUnicode_InternFromString(name));
      bits_ |= bit(names_.back());
    }
  }
  bool operator()(PyObject* name) const {
    if (!(bits_ & bit(name))) return false;
    for (PyObject* one : names_)
      if (name == one) return true;
    return false;
  }

 private:
  static uint64_t bit(PyObject* name) { return uint64_t(1) << (reinterpret_cast<uintptr_t>(name) / 16 % 64); }
  std::vector<PyObject*> names_;
  uint64_t bits_ = 0;  // of most names one look says that they are none of these
};

// see(object) for the class of a module, each name and value among its attributes, and each key and value of those of them
// that are dictionaries (parameters, buffers, children, hooks). False once see() is, or with a Python error.
template <class See>
bool see_module(PyObject* module, const See& see) {
  if (!see(reinterpret_cast<PyObject*>(Py_TYPE(module)))) return false;
  PyObject* attributes = PyObject_GenericGetDict(module, nullptr);
  if (!attributes) return false;
  static const OfNoCall of_no_call;
  PyObject *name, *value, *key, *item;
  Py_ssize_t at = 0;
  bool same = true;
  while (same && PyDict_Next(attributes, &at, &name, &value)) {
    if (of_no_call(name)) continue;
    same = see(name) && see(value);
    Py_ssize_t inner = 0;
    while (same && PyDict_Check(value) && PyDict_Next(value, &inner, &key, &item)) same = see(key) && see(item);
  }
  Py_DECREF(attributes);  // the module has it
  return same;
}

// see_module() for `module` and for those of the tuple `parts`.
template <class See>
bool see_modules(PyObject* module, PyObject* parts, const See& see) {
  if (!see_module(module, see)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_Size(parts); ++i)
    if (!see_module(PyTuple_GetItem(parts, i), see)) return false;
  return true;
}

// Memory that a look at modules reads, in cache lines, in the order in which they are read: thousands of them, from L3 mostly once the
// kernels have had the other caches, and one after the other unless they are prefetched. Only hints come of it. So it may guess how
// dictionaries lie, and that nothing has moved since.
class Lines {
 public:
  void add(const void* from, size_t bytes) {
    constexpr uintptr_t kLine = 64;
    const auto first = reinterpret_cast<uintptr_t>(from) / kLine * kLine,
               end = reinterpret_cast<uintptr_t>(from) + bytes;
    for (uintptr_t line = first; line < end; line += kLine)
      if (known_.insert(line).second) found_.push_back(line);
  }
  // What lies before it belongs to it since CPython 3.11; so do, in a dictionary, pointers to keys with entries, and to values.
  void add_object(PyObject* object) {
    add(reinterpret_cast<const char*>(object) - 32, 80);
    if (!PyDict_Check(object)) return;
    const auto entries = size_t(PyDict_Size(object));
    void* tables[2];
    std::memcpy(tables, reinterpret_cast<const char*>(object) + 32, sizeof tables);
    if (entries) add(tables[0], 96 + 24 * entries);
    if (entries && tables[1]) add(tables[1], 8 * (entries + 1));
  }
  const std::vector<uintptr_t>& found() const { return found_; }

 private:
  std::unordered_set<uintptr_t> known_;
  std::vector<uintptr_t> found_;
};

PyObject* module_state(PyObject*, PyObject* args) {
  PyObject *module, *parts;
  if (!PyArg_ParseTuple(args, "OO!", &module, &PyTuple_Type, &parts)) return nullptr;
  std::vector<PyObject*> seen;
  Lines lines;
  auto see = [&](PyObject* object) {
    seen.push_back(object);
    if (!PyType_Check(object) && !PyUnicode_Check(object)) lines.add_object(object);
    return true;
  };
  for (Py_ssize_t i = -1; i < PyTuple_Size(parts); ++i) {
    PyObject* one = i < 0 ? module : PyTuple_GetItem(parts, i);
    lines.add_object(one);
    PyObject* attributes = PyObject_GenericGetDict(one, nullptr);
    if (attributes) lines.add_object(attributes);
    Py_XDECREF(attributes);
    if (!attributes || !see_module(one, see)) break;
  }
  if (PyErr_Occurred()) return nullptr;
  PyObject* objects = PyTuple_New(Py_ssize_t(seen.size()));
  for (size_t i = 0; objects && i < seen.size(); ++i) {
    Py_INCREF(seen[i]);
    PyTuple_SetItem(objects, Py_ssize_t(i), seen[i]);
  }
  if (!objects) return nullptr;
  return Py_BuildValue(
      "Ny#y#", objects, reinterpret_cast<const char*>(seen.data()), Py_ssize_t(seen.size() * sizeof(PyObject*)),
      reinterpret_cast<const char*>(lines.found().data()), Py_ssize_t(lines.found().size() * sizeof(uintptr_t)));
}

PyObject* prefetch(PyObject*, PyObject* args) {
  const char* given;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "y#", &given, &size)) return nullptr;
  for (Py_ssize_t at = 0; at + Py_ssize_t(sizeof(uintptr_t)) <= size; at += sizeof(uintptr_t)) {
    uintptr_t line;
    std::memcpy(&line, given + at, sizeof line);
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }
  Py_RETURN_NONE;
}

PyObject* has_module_state(PyObject*, PyObject* args) {
  PyObject *module, *parts;
  const char* addresses;
  Py_ssize_t bytes;
  if (!PyArg_ParseTuple(args, "OO!y#", &module, &PyTuple_Type, &parts, &addresses, &bytes)) return nullptr;
  const char* const end = addresses + bytes;
  const bool same = see_modules(module, parts, [&](PyObject* object) {
    if (addresses == end || std::memcmp(addresses, &object, sizeof object)) return false;
    addresses += sizeof object;
    return true;
  });
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(same && addresses == end);
}

// A stretch of memory, as Python packs it: two numbers of 64 bits.
struct Sampled {
  const char* data;
  int64_t bytes;
};

// A number that depends on 8 bytes at each of up to 8 places of every stretch, the first and the last among them.
PyObject* sampled(PyObject*, PyObject* args) {
  const char* given;
  Py_ssize_t size;
  if (!PyArg_ParseTuple(args, "y#", &given, &size)) return nullptr;
  uint64_t sum = 0xcbf29ce484222325;
  for (Py_ssize_t at = 0; at + Py_ssize_t(sizeof(Sampled)) <= size; at += sizeof(Sampled)) {
    Sampled s;
    std::memcpy(&s, given + at, sizeof s);
    const int64_t words = s.bytes / 8, places = words < 8 ? words : 8;
    auto mix = [&](int64_t from, int64_t count) {
      uint64_t word = 0;
      std::memcpy(&word, s.data + from, size_t(count));
      sum = (sum ^ word) * 0x9e3779b97f4a7c15;
      sum ^= sum >> 29;
    };
    for (int64_t i = 0; i < places; ++i) mix((places > 1 ? i * (words - 1) / (places - 1) : 0) * 8, 8);
    if (s.bytes % 8) mix(words * 8, s.bytes % 8);
  }
  return PyLong_FromUnsignedLongLong(sum);
}

}  // namespace
}  // namespace mvk
