// Fetches the objects of coming rows into the caches, some rows before the scan reads them.
//
// In a step on a thousand small tensors, the tensors' objects have mostly left the caches. Each
// tensor then costs three waits for memory: for the object, its implementation, and its storage.
// The fetches are hints only; no result depends on them. Where the places of implementation and
// storage are unknown, Scan::storage is 0 and nothing is fetched. CLR_OPTIM_LOOK_AHEAD=0 does the same.
#pragma once

#include "view.h"

namespace clr {

class Ahead {
public:
    Ahead(const Scan& scan, const Row* rows, ptrdiff_t count)
        : scan_(scan), rows_(rows), count_(count), keys_(PyList_Size(scan.keys)) {
        for (ptrdiff_t i = -4 * STAGE; i < 0; ++i) look(i);
    }
    Ahead(const Ahead&) = delete;
    ~Ahead() {
        for (PyObject* grad : grads_)
            if (grad) Py_DecRef(grad);
    }

    // Returns row i's gradient, a new reference; null after an exception. Call it in order of i.
    PyObject* next_grad(ptrdiff_t i) {
        PyObject* grad = grads_[i % RING];
        grads_[i % RING] = nullptr;
        look(i);
        return grad;
    }

private:
    static constexpr ptrdiff_t STAGE = 4, RING = 2 * STAGE, LINE = 64;

    static void fetch(const void* at, ptrdiff_t lines) {
        for (ptrdiff_t i = 0; i < lines; ++i)
            __builtin_prefetch(static_cast<const char*>(at) + i * LINE);
    }
    static const void* word(const void* of, int64_t index) {
        return static_cast<const void* const*>(of)[index];
    }
    // A gradient may be any object. The second word of an object is its class.
    bool is_tensor(PyObject* grad) const { return grad && word(grad, 1) == scan_.tensor; }
    void fetch_impl(PyObject* tensor) const { fetch(word(tensor, scan_.impl), 4); }
    void fetch_storage(PyObject* tensor) const {
        fetch(word(word(tensor, scan_.impl), scan_.storage), 2);
    }

    // Takes one more row through each stage: objects, then implementations, then storages.
    void look(ptrdiff_t i) {
        const ptrdiff_t near = i + STAGE, middle = near + STAGE, far = middle + STAGE;
        if (scan_.storage && far + STAGE < count_) fetch(PyList_GetItem(scan_.params, far + STAGE), 1);
        if (scan_.storage && far >= 0 && far < count_) {
            fetch_impl(PyList_GetItem(scan_.params, far));
            if (keys_ && was_active(far)) fetch(PyList_GetItem(scan_.dicts, far), 1);
            for (ptrdiff_t k = 0; k < keys_ && was_active(far); ++k) fetch(held(far, k), 1);
        }
        if (middle >= 0 && middle < count_) {
            PyObject* param = PyList_GetItem(scan_.params, middle);
            if (scan_.storage && was_active(middle)) {
                if (keys_) fetch(word(PyList_GetItem(scan_.dicts, middle), 4), 3);  // its table
                for (ptrdiff_t k = 0; k < keys_; ++k) fetch_impl(held(middle, k));
                fetch(rows_[middle].counter, 1);
                fetch(rows_[middle].scalar, 1);
            }
            PyObject* grad = grads_[middle % RING] = PyObject_GetAttr(param, scan_.grad);
            if (scan_.storage && is_tensor(grad)) fetch_impl(grad);
        }
        if (scan_.storage && near >= 0 && near < count_ && was_active(near)) {
            fetch_storage(PyList_GetItem(scan_.params, near));
            for (ptrdiff_t k = 0; k < keys_; ++k) fetch_storage(held(near, k));
            PyObject* grad = grads_[near % RING];
            if (is_tensor(grad)) fetch_storage(grad);
        }
    }
    // In the last scan. The scan reads no more of a row without a gradient.
    bool was_active(ptrdiff_t i) const { return rows_[i].active; }
    PyObject* held(ptrdiff_t i, ptrdiff_t k) const {
        return PyList_GetItem(scan_.tensors, i * keys_ + k);
    }

    const Scan& scan_;
    const Row* rows_;
    ptrdiff_t count_, keys_;
    PyObject* grads_[RING] = {};
};

}  // namespace clr
