// The extension module clr_optim.kernels.native.module. Its functions are described in module.pyi.
//
// The limited API of CPython 3.11 serves every later CPython too.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "multi_tensor.h"

extern "C" int clr_can_scan(PyObject* capsule);

namespace {

// The names of Dtype, in its order.
const char* const DTYPE_NAMES[] = {"float32", "float64", "bfloat16", "float16", nullptr};

const char* kernel_name(int64_t i) { return clr::kernel_set().kernel(i, clr::FLOAT32).name; }
const char* dtype_name(int64_t i) { return DTYPE_NAMES[i]; }
const char* set_name(int64_t i) {
    return clr::kernel_sets[i] ? clr::kernel_sets[i]->name : nullptr;
}

// Returns a tuple of the names, up to the first that is null.
template <class Name> PyObject* tuple_of(const Name& name) {
    Py_ssize_t count = 0;
    while (name(count)) ++count;
    PyObject* names = PyTuple_New(count);
    for (Py_ssize_t i = 0; names && i < count; ++i) {
        PyObject* text = PyUnicode_FromString(name(i));
        if (!text || PyTuple_SetItem(names, i, text)) {
            Py_DecRef(names);
            return nullptr;
        }
    }
    return names;
}

PyObject* kernel_sets(PyObject*, PyObject*) { return tuple_of(set_name); }
PyObject* kernel_names(PyObject*, PyObject*) { return tuple_of(kernel_name); }
PyObject* dtype_names(PyObject*, PyObject*) { return tuple_of(dtype_name); }

PyObject* kernel_set(PyObject*, PyObject*) {
    return PyUnicode_FromString(clr::kernel_set().name);
}

PyObject* use(PyObject*, PyObject* name) {
    const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (!text) return nullptr;
    if (!clr::use(text))
        return PyErr_Format(PyExc_ValueError, "no kernel set has the name %R", name);
    return Py_NewRef(Py_None);
}

PyObject* can_read(PyObject*, PyObject* capsule) {
    return PyBool_FromLong(clr_can_scan(capsule));
}

PyObject* round(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "round() takes dtype, source, target and count");
        return nullptr;
    }
    const long dtype = PyLong_AsLong(args[0]);
    const auto* source = static_cast<const float*>(PyLong_AsVoidPtr(args[1]));
    auto* target = static_cast<float*>(PyLong_AsVoidPtr(args[2]));
    const long long many = PyLong_AsLongLong(args[3]);
    if (PyErr_Occurred()) return nullptr;
    clr::kernel_set().round(dtype, source, target, many);
    return Py_NewRef(Py_None);
}

PyMethodDef functions[] = {
    {"kernel_sets", kernel_sets, METH_NOARGS, nullptr},
    {"kernel_set", kernel_set, METH_NOARGS, nullptr},
    {"use", use, METH_O, nullptr},
    {"kernel_names", kernel_names, METH_NOARGS, nullptr},
    {"dtype_names", dtype_names, METH_NOARGS, nullptr},
    {"can_read", can_read, METH_O, nullptr},
    {"round", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(round)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "clr_optim.kernels.native.module",
                          nullptr,
                          0,
                          functions,
                          slots,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_module() { return PyModuleDef_Init(&definition); }
