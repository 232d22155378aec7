// What the Python attributes of modules are, object by object, to find out in a microsecond whether one was exchanged.
#pragma once

#include <Python.h>

#include <vector>

namespace mvk {
namespace {

// see(object) for the class of a module, each name and value among its attributes, and each key and value of those of them
// that are dictionaries (parameters, buffers, children, hooks). False once see() is, or with a Python error.
template <class See>
bool see_module(PyObject* module, const See& see) {
  if (!see(reinterpret_cast<PyObject*>(Py_TYPE(module)))) return false;
  PyObject* attributes = PyObject_GenericGetDict(module, nullptr);
  if (!attributes) return false;
  PyObject *name, *value, *key, *item;
  Py_ssize_t at = 0;
  bool same = true;
  while (same && PyDict_Next(attributes, &at, &name, &value)) {
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

PyObject* module_state(PyObject*, PyObject* args) {
  PyObject *module, *parts;
  if (!PyArg_ParseTuple(args, "OO!", &module, &PyTuple_Type, &parts)) return nullptr;
  std::vector<PyObject*> seen;
  see_modules(module, parts, [&](PyObject* object) {
    seen.push_back(object);
    return true;
  });
  if (PyErr_Occurred()) return nullptr;
  PyObject* state = PyTuple_New(Py_ssize_t(seen.size()));
  for (size_t i = 0; state && i < seen.size(); ++i) {
    Py_INCREF(seen[i]);
    PyTuple_SetItem(state, Py_ssize_t(i), seen[i]);
  }
  return state;
}

PyObject* has_module_state(PyObject*, PyObject* args) {
  PyObject *module, *parts, *state;
  if (!PyArg_ParseTuple(args, "OO!O!", &module, &PyTuple_Type, &parts, &PyTuple_Type, &state)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(state);
  Py_ssize_t i = 0;
  const bool same =
      see_modules(module, parts, [&](PyObject* object) { return i < size && PyTuple_GetItem(state, i++) == object; });
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(same && i == size);
}

}  // namespace
}  // namespace mvk
