// Has anything that a bucket's table points to changed since the last step?
//
// The one question a plan asks every step, of every tensor. Asked from Python it would cost more
// than updating a small tensor does; here a tensor is read through DLPack's C exchange API, which
// torch offers on the class torch.Tensor: pointer, dtype, sizes and strides in one call, and no
// header of torch. Of CPython's C API a dozen functions are needed, declared here so that no Python
// header is; they are found in the running interpreter. All of it runs with the GIL held.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
typedef struct _object PyObject;
PyObject* PyObject_GetAttr(PyObject*, PyObject*);
PyObject* PyList_GetItem(PyObject*, ptrdiff_t);  // borrowed
ptrdiff_t PyList_Size(PyObject*);
PyObject* PyDict_GetItemWithError(PyObject*, PyObject*);  // borrowed
void* PyCapsule_GetPointer(PyObject*, const char*);
PyObject* PyErr_Occurred();
void PyErr_Clear();
void Py_DecRef(PyObject*);
}

namespace clr {

// As in dlpack.h, version 1.
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*view)(void* object, DLTensor* out);
    void* current_work_stream;
};
constexpr uint32_t DLPACK_MAJOR = 1;
constexpr int32_t ON_CPU = 1;

inline const ExchangeApi* exchange_api(PyObject* capsule) {
    auto api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (api && api->major > DLPACK_MAJOR) api = api->previous;
    return api && api->major == DLPACK_MAJOR && api->view ? api : nullptr;
}

// What a bucket's rows were built from. In step with _Scan in plan.py.
struct Scan {
    PyObject* params;       // list of tensors, a row each
    PyObject* dicts;        // list of optimizer.state[p], a row each; empty if the rule keeps none
    PyObject* keys;         // list of the names in them: state slots, then "step" if there is one
    PyObject* tensors;      // list of what they held: len(keys) a row
    PyObject* grad;         // the attribute's name
    PyObject* none;
    PyObject* capsule;      // of the exchange API
    const int64_t* layout;  // a row each: ndim, sizes, strides
    int64_t slots;          // keys that are state slots
    int64_t code, bits;     // DLPack's names for the dtype of parameters, gradients and slots
    int64_t counter_bits;   // the step counters are floats of so many bits
};

inline bool is_dtype(const DLTensor& t, int64_t code, int64_t bits) {
    return t.code == code && t.bits == bits && t.lanes == 1 && t.device_type == ON_CPU;
}

// Sizes, and strides where they matter: any stride will do for a size of 1.
inline bool has_layout(const DLTensor& t, const int64_t* layout) {
    const int64_t ndim = *layout++;
    if (t.ndim != ndim) return false;
    for (int64_t d = 0; d < ndim; ++d) {
        if (t.shape[d] != layout[d]) return false;
        if (layout[d] != 1 && t.strides[d] != layout[ndim + d]) return false;
    }
    return true;
}

// Whether row i still describes its tensors; takes in the gradient's pointer, which may move.
template <class Row>
bool same_row(const Scan& scan, const ExchangeApi& api, Row& row, ptrdiff_t i,
              const int64_t* layout) {
    DLTensor t;
    PyObject* param = PyList_GetItem(scan.params, i);
    if (api.view(param, &t) || t.data != row.param || !is_dtype(t, scan.code, scan.bits) ||
        !has_layout(t, layout))
        return false;

    const ptrdiff_t keys = PyList_Size(scan.keys);
    PyObject* dict = keys ? PyList_GetItem(scan.dicts, i) : nullptr;
    for (ptrdiff_t k = 0; k < keys; ++k) {
        PyObject* held = PyDict_GetItemWithError(dict, PyList_GetItem(scan.keys, k));
        if (!held || held != PyList_GetItem(scan.tensors, i * keys + k) || api.view(held, &t))
            return false;
        const bool same = k < scan.slots
                              ? t.data == row.state[k] && is_dtype(t, scan.code, scan.bits) &&
                                    has_layout(t, layout)
                              : t.data == row.step && is_dtype(t, 2, scan.counter_bits) &&
                                    t.ndim == 0;
        if (!same) return false;
    }

    PyObject* grad = PyObject_GetAttr(param, scan.grad);
    if (!grad) return false;
    bool same = true;
    row.active = grad != scan.none;
    if (row.active) {
        same = !api.view(grad, &t) && is_dtype(t, scan.code, scan.bits) && has_layout(t, layout);
        row.grad = t.data;
    }
    Py_DecRef(grad);
    return same;
}

}  // namespace clr
