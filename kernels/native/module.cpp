// The extension module clr_optim.kernels.native.module: its functions and classes for Python.
// module.pyi describes them.
//
// The limited API of CPython 3.11 serves every later CPython too.

#include "hook_class.h"

namespace {

using namespace clr;

// ---- functions

// The names of Dtype, in its order.
const char* const DTYPE_NAMES[] = {"float32", "float64", "bfloat16", "float16", nullptr};

const char* kernel_name(Py_ssize_t i) { return kernels->kernel(i, FLOAT32).name; }
const char* dtype_name(Py_ssize_t i) { return DTYPE_NAMES[i]; }
const char* set_name(Py_ssize_t i) { return kernel_sets[i] ? kernel_sets[i]->name : nullptr; }

PyObject* names_of_sets(PyObject*, PyObject*) { return tuple_of(set_name); }
PyObject* names_of_kernels(PyObject*, PyObject*) { return tuple_of(kernel_name); }
PyObject* names_of_dtypes(PyObject*, PyObject*) { return tuple_of(dtype_name); }
PyObject* kernel_set(PyObject*, PyObject*) { return PyUnicode_FromString(kernels->name); }

PyObject* use_set(PyObject*, PyObject* name) {
    const char* const text = PyUnicode_AsUTF8AndSize(name, nullptr);
    if (!text) return nullptr;
    if (!use(text)) return PyErr_Format(PyExc_ValueError, "no kernel set has the name %R", name);
    return none();
}

PyObject* can_read(PyObject*, PyObject* capsule) {
    const bool can = exchange_api(capsule) != nullptr;
    PyErr_Clear();
    return PyBool_FromLong(can);
}

// What connect() takes, by name. All but exchange_api.
const struct { const char* name; Ref Torch::*place; bool is_dict; } CONNECTIONS[] = {
    {"tensor", &Torch::tensor, false},
    {"parameter", &Torch::parameter, false},
    {"dtensor", &Torch::dtensor, false},
    {"has_mode", &Torch::has_mode, false},
    {"increment_version", &Torch::increment_version, false},
    {"num_threads", &Torch::num_threads, false},
    {"current_stream", &Torch::current_stream, false},
    {"global_pre_hooks", &Torch::global_pre_hooks, true},
    {"global_post_hooks", &Torch::global_post_hooks, true},
    {"profiler", &Torch::profiler, true},
    {"position_key", &Torch::position_key, false},
};

PyObject* connect(PyObject*, PyObject*, PyObject* given) {
    PyObject* const capsule = given ? PyDict_GetItemString(given, "exchange_api") : nullptr;
    const ExchangeApi* const api = capsule ? exchange_api(capsule) : nullptr;
    if (!api) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "connect() needs DLPack's C exchange API, version 1");
        return nullptr;
    }
    for (const auto& [name, place, is_dict] : CONNECTIONS) {
        PyObject* const value = PyDict_GetItemString(given, name);
        if (!value || (is_dict && !PyDict_Check(value)))
            return PyErr_Format(PyExc_TypeError, "connect() needs %s", name);
        torch().*place = Ref::to(value);
    }
    torch().api = api;
    return names().make() ? none() : nullptr;
}

PyObject* round_floats(PyObject*, PyObject* const* args, Py_ssize_t count) {
    int64_t dtype, many;
    if (!expects("round()", count, 4) || !read(args[0], dtype) || !read(args[3], many))
        return nullptr;
    const auto* source = static_cast<const float*>(PyLong_AsVoidPtr(args[1]));
    auto* target = static_cast<float*>(PyLong_AsVoidPtr(args[2]));
    if (PyErr_Occurred()) return nullptr;
    kernels->round(dtype, source, target, many);
    return none();
}

PyMethodDef functions[] = {
    {"kernel_sets", method<names_of_sets>(), METH_NOARGS, nullptr},
    {"kernel_set", method<kernel_set>(), METH_NOARGS, nullptr},
    {"use", method<use_set>(), METH_O, nullptr},
    {"kernel_names", method<names_of_kernels>(), METH_NOARGS, nullptr},
    {"dtype_names", method<names_of_dtypes>(), METH_NOARGS, nullptr},
    {"can_read", method<can_read>(), METH_O, nullptr},
    {"connect", method<connect>(), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"round", method<round_floats>(), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ---- the module

// The class of Hook objects.
PyTypeObject* hook_type = nullptr;

// Adds a class to the module. Code that empties sys.modules imports the extension a second time in
// one process: then the class is the first import's, so that objects of both serve each other.
template <class Body>
bool add_class(PyObject* module, PyTypeObject*& type, const char* name, newfunc make,
               PyMethodDef* methods, PyGetSetDef* attributes, ternaryfunc call = nullptr) {
    if (!type)
        type = reinterpret_cast<PyTypeObject*>(
            make_class<Body>(module, name, make, methods, attributes, call));
    return type && !PyModule_AddType(module, type);
}

int fill_module(PyObject* module) {
    if (!add_class<Bucket>(module, bucket_type, "clr_optim.kernels.native.module.Bucket",
                           Guarded<new_bucket>::call, bucket_methods, bucket_attributes) ||
        !add_class<Plan>(module, plan_type, "clr_optim.kernels.native.module.Plan",
                         Guarded<new_plan>::call, plan_methods, plan_attributes) ||
        !add_class<Launches>(module, launches_type, "clr_optim.kernels.native.module.Launches",
                             Guarded<new_launches>::call, launches_methods, no_attributes) ||
        !add_class<Hook>(module, hook_type, "clr_optim.kernels.native.module.Hook",
                         Guarded<new_hook>::call, no_methods, no_attributes,
                         Guarded<call_hook>::call))
        return -1;
    const Ref row(tuple_of([](Py_ssize_t i) { return ROW_COLUMNS[i]; }));
    if (!row || PyModule_AddObjectRef(module, "ROW", row.get())) return -1;
    const struct { const char* name; long value; } numbers[] = {
        {"ALL_ACTIVE", ALL_ACTIVE}, {"SOME_IDLE", SOME_IDLE}, {"CHANGED", CHANGED},
        {"GROUPS_CHANGED", GROUPS_CHANGED}, {"SETTINGS_CHANGED", SETTINGS_CHANGED},
        {"STATE_CHANGED", STATE_CHANGED}, {"WOKEN", WOKEN}, {"NESTED", NESTED},
        {"TAKEN", TAKEN}, {"OUT_OF_VALUES", OUT_OF_VALUES}, {"OBSERVED", OBSERVED},
        {"REPLACED", REPLACED}, {"WRITTEN", WRITTEN}, {"OUTDATED", OUTDATED}, {"IN_USE", IN_USE},
        {"UNSERVED", UNSERVED}, {"SKIPPED", SKIPPED}, {"NO_ROW", NO_ROW},
    };
    for (const auto& each : numbers)
        if (PyModule_AddIntConstant(module, each.name, each.value)) return -1;
    return 0;
}

PyModuleDef_Slot module_slots[] = {{Py_mod_exec, reinterpret_cast<void*>(fill_module)},
                                   {0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "clr_optim.kernels.native.module",
                          nullptr,
                          0,
                          functions,
                          module_slots,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_module() { return PyModuleDef_Init(&definition); }
