// A GradScaler's signals: two numbers on the device, which it leaves on the wrapping optimizer.
#pragma once

#include "scan.h"

namespace clr {

inline PyObject* item(PyObject* dict, const Ref& key) {
    return dict ? PyDict_GetItemWithError(dict, key.get()) : nullptr;
}

// Tensors of one element; null for a signal that the GradScaler has not given.
struct Signals {
    Ref grad_scale;  // the factor that is still in the gradients
    Ref found_inf;   // nonzero if a gradient is infinite or NaN

    Signals() = default;
    // `attributes` is the dictionary of the wrapping optimizer.
    explicit Signals(PyObject* attributes)
        : grad_scale(given(attributes, names().grad_scale)),
          found_inf(given(attributes, names().found_inf)) {}

    explicit operator bool() const { return grad_scale || found_inf; }

private:
    static Ref given(PyObject* attributes, const Ref& name) {
        PyObject* const value = item(attributes, name);
        return value && value != Py_None ? Ref::to(value) : Ref();
    }
};

// Returns whether a signal is missing or a tensor that kernels can read. May run Python code.
inline bool is_plain(const Ref& signal) {
    return !signal || (is_tensor(signal.get()) && !is_negated_says_torch(signal.get()));
}

// Reads the address of a signal, which must be one float32 where a bucket's tensors lie.
inline bool read_address(const Ref& signal, const Bucket& bucket, const void*& address) {
    DLTensor t;
    if (!view(signal.get(), t) || !is_float(t, 32) || t.device_type != bucket.device_type ||
        t.device_id != bucket.device_id)
        return false;
    for (int32_t d = 0; d < t.ndim; ++d)
        if (t.shape[d] != 1) return false;
    return (address = t.data);
}

}  // namespace clr
