// The scan: finds out whether anything that a bucket's table points to changed since the last step.
//
// A plan asks this question at every step, about every tensor. Asked from Python, it would take
// longer than the update of a small tensor. All code here runs with the GIL.
//
// A long step gives the GIL away, and another thread may then drop the gradients that the kernel
// reads. So the scan keeps every gradient alive whose address it took, until the step is over.
//
// A scan has two parts. Questions that may run Python code or give the GIL away come first: DTensors
// are compared in Python, and torch's is_neg() releases the GIL. Addresses are read in the second
// part, with the garbage collector off, so that no other thread runs between the first address and
// the last. While a scan or a step uses the rows, View::busy keeps every other scan and step away.
#pragma once

#include "ahead.h"
#include "dlpack.h"
#include "view.h"

namespace clr {

// ---- groups and state

inline bool same_items(PyObject* a, PyObject* b) {
    const Items now(a), then(b);
    if (now.size() < 0 || now.size() != then.size()) return false;
    for (ptrdiff_t i = 0; i < now.size(); ++i)
        if (now.get(i) != then.get(i)) return false;
    return true;
}

// Another thread may have added a group since the plan was built. The user's list is then longer.
inline bool same_groups(const View& view) {
    const Items groups(view.groups);
    if (groups.size() != PyList_Size(view.members)) return false;
    for (ptrdiff_t i = 0; i < groups.size(); ++i) {
        PyObject* params = PyDict_GetItemWithError(groups.get(i), view.params);
        if (!params || !same_items(params, PyList_GetItem(view.members, i))) return false;
    }
    return true;
}

inline bool same_settings(const View& view) {
    const Items groups(view.groups);
    if (groups.size() != PyList_Size(view.keys) || groups.size() != PyList_Size(view.settings))
        return false;
    for (ptrdiff_t i = 0; i < groups.size(); ++i) {
        PyObject* group = groups.get(i);
        PyObject* keys = PyList_GetItem(view.keys, i);
        PyObject* settings = PyList_GetItem(view.settings, i);
        const ptrdiff_t count = PyList_Size(keys);
        if (PyList_Size(settings) != count) return false;
        for (ptrdiff_t k = 0; k < count; ++k) {
            PyObject* now = PyDict_GetItemWithError(group, PyList_GetItem(keys, k));
            if (!now || now != PyList_GetItem(settings, k)) return false;
        }
    }
    return true;
}

// Compares the dictionaries' identities and order, which shows any that was replaced, added or removed.
inline bool same_state(const View& view) {
    ptrdiff_t at = 0, i = 0;
    const ptrdiff_t count = PyList_Size(view.dicts);
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(view.state, &at, &key, &value))
        if (i >= count || value != PyList_GetItem(view.dicts, i++)) return false;
    return i == count;
}

// May run Python code: a parameter of a user's class may define `grad`.
inline bool still_idle(const View& view) {
    const ptrdiff_t count = PyList_Size(view.idle);
    for (ptrdiff_t i = 0; i < count; ++i) {
        PyObject* grad = PyObject_GetAttr(PyList_GetItem(view.idle, i), view.grad);
        if (!grad) return false;
        Py_DecRef(grad);
        if (grad != view.none) return false;
    }
    return true;
}

// A torch function mode (torch.device as a context is one) runs Python code at every `p.grad`.
inline bool has_mode(const View& view) {
    const Ref answer(PyObject_CallFunctionObjArgs(view.has_mode, nullptr));
    return answer.get() != view.no;
}

// ---- the first part: questions that may run Python code

// A subclass may give its memory another meaning.
inline bool is_tensor(const Scan& scan, PyObject* object) {
    PyObject* type = PyObject_Type(object);
    Py_DecRef(type);
    return type == scan.tensor || type == scan.parameter;
}

inline bool same_attribute(PyObject* a, PyObject* b, PyObject* name) {
    const Ref of_a(PyObject_GetAttr(a, name)), of_b(PyObject_GetAttr(b, name));
    return of_a.get() && of_b.get() &&
           PyObject_RichCompareBool(of_a.get(), of_b.get(), /*Py_EQ*/ 2) == 1;
}

// Whether a DTensor of row i is divided over the ranks as it was when the plan was built. k is 0 for
// the parameter and its gradient, 1 for the first slot.
inline bool same_spread(const Scan& scan, PyObject* tensor, ptrdiff_t i, ptrdiff_t k) {
    const Ref type(PyObject_Type(tensor));
    if (type.get() != scan.dtensor) return false;
    PyObject* was = PyList_GetItem(scan.specs, i * (1 + scan.slots) + k);
    const Ref spec(PyObject_GetAttr(tensor, scan.spec));
    if (!spec.get() || !was) return false;
    return spec.get() == was || (same_attribute(spec.get(), was, scan.placements) &&
                                 same_attribute(spec.get(), was, scan.mesh));
}

inline bool same_spreads(const Scan& scan, ptrdiff_t i) {
    if (!same_spread(scan, PyList_GetItem(scan.params, i), i, 0)) return false;
    const ptrdiff_t keys = PyList_Size(scan.keys);
    for (ptrdiff_t k = 0; k < scan.slots; ++k)
        if (!same_spread(scan, PyList_GetItem(scan.tensors, i * keys + k), i, 1 + k)) return false;
    return true;
}

// Whether a tensor is a lazy negation, which DLPack does not tell. Asks torch, which gives the GIL
// away.
inline bool is_negated_says_torch(const Scan& scan, PyObject* tensor) {
    const Ref negated(PyObject_CallMethodObjArgs(tensor, scan.is_neg, nullptr));
    return negated.get() != scan.no;
}

// Asks torch about the parameter and the state of row i.
inline bool any_is_negated_says_torch(const Scan& scan, ptrdiff_t i) {
    const auto asks = [&scan](PyObject* tensor) {
        const Ref part(scan.dtensor ? PyObject_GetAttr(tensor, scan.local) : nullptr);
        if (scan.dtensor) tensor = part.get();
        return !tensor || is_negated_says_torch(scan, tensor);
    };
    if (asks(PyList_GetItem(scan.params, i))) return true;
    const ptrdiff_t keys = PyList_Size(scan.keys);
    for (ptrdiff_t k = 0; k < keys; ++k) {
        PyObject* held = PyList_GetItem(scan.tensors, i * keys + k);
        if (k < scan.slots ? asks(held) : is_negated_says_torch(scan, held)) return true;
    }
    return false;
}

// Which rows need a question that may run Python code. Autograd itself hands over lazy negations of
// one element (an imaginary part; with more elements its strides fit no other layout), so torch is
// asked about these.
inline bool needs_asking(const Scan& scan, const Row& row) {
    return scan.dtensor || row.numel == 1 || !scan.negative;
}

// Asks the questions, and keeps alive the gradients of these rows, or of every row if `every`.
// Returns the first row that has changed, or -1.
inline ptrdiff_t ask(Bucket& bucket, bool every) {
    const Scan& scan = *bucket.scan;
    bucket.held = 1;
    for (ptrdiff_t i = 0; i < bucket.count; ++i) {
        const bool asks = needs_asking(scan, bucket.rows[i]);
        if (!asks && !every) continue;
        PyObject* grad = PyObject_GetAttr(PyList_GetItem(scan.params, i), scan.grad);
        if (!grad || PyList_SetItem(scan.grads, i, grad)) return i;
        if (grad == scan.none || !asks) continue;
        const Ref part(scan.dtensor ? PyObject_GetAttr(grad, scan.local) : nullptr);
        if (scan.dtensor && (!part.get() || !same_spreads(scan, i) || !same_spread(scan, grad, i, 0)))
            return i;
        PyObject* const plain = scan.dtensor ? part.get() : grad;
        if (!is_tensor(scan, plain)) return i;
        if ((!scan.negative || bucket.rows[i].numel == 1) && is_negated_says_torch(scan, plain))
            return i;
        if (!scan.negative && any_is_negated_says_torch(scan, i)) return i;
    }
    return -1;
}

// Lets go of the gradients.
inline void release(Bucket& bucket) {
    const Scan& scan = *bucket.scan;
    if (!bucket.held) return;
    bucket.held = 0;
    // During the step they have left the caches. Fetch all of them before waiting for the first one.
    for (ptrdiff_t i = 0; i < bucket.count; ++i)
        __builtin_prefetch(PyList_GetItem(scan.grads, i), 1);
    PyList_SetSlice(scan.grads, 0, bucket.count, scan.nones);
}

// ---- the second part: addresses

inline bool is_kind(const Scan& scan, const DLTensor& t, int64_t code, int64_t bits) {
    return t.code == code && t.bits == bits && t.lanes == 1 &&
           t.device_type == scan.device_type && t.device_id == scan.device_id;
}

// Reads the bit of a lazy negation. False if its place is unknown; torch was asked then.
inline bool is_negated(const Scan& scan, PyObject* tensor) {
    if (!scan.negative) return false;
    const auto* impl = static_cast<const uint64_t* const*>(static_cast<void*>(tensor))[scan.impl];
    return (impl[scan.key_set] & scan.negative) != 0;
}

// Whether row i still describes its tensors. Takes in the address of the gradient, which may change.
// Of a row without a gradient, which no kernel touches, nothing is read.
inline bool same_row(const Bucket& bucket, const ExchangeApi& api, ptrdiff_t i,
                     const int64_t* layout, PyObject* grad) {
    const Scan& scan = *bucket.scan;
    const Row& row = bucket.rows[i];
    bucket.gradients[i] = nullptr;
    if (grad == scan.none) return true;
    DLTensor t;
    // Reads a tensor of the parameter's kind and layout; of a DTensor the part of this rank.
    const auto view = [&](PyObject* tensor) {
        const Ref part(scan.dtensor ? PyObject_GetAttr(tensor, scan.local) : nullptr);
        if (scan.dtensor) tensor = part.get();
        return tensor && !api.view(tensor, &t) && is_kind(scan, t, scan.code, scan.bits) &&
               has_layout(t, layout) && !is_negated(scan, tensor);
    };
    const auto same_number = [&](PyObject* tensor, const void* data, int64_t bits) {
        return !api.view(tensor, &t) && t.data == data && t.ndim == 0 &&
               is_kind(scan, t, 2, bits) && !is_negated(scan, tensor);
    };
    if (!view(PyList_GetItem(scan.params, i)) || t.data != row.param) return false;

    const ptrdiff_t keys = PyList_Size(scan.keys);
    PyObject* dict = keys ? PyList_GetItem(scan.dicts, i) : nullptr;
    for (ptrdiff_t k = 0; k < keys; ++k) {
        PyObject* held = PyDict_GetItemWithError(dict, PyList_GetItem(scan.keys, k));
        if (!held || held != PyList_GetItem(scan.tensors, i * keys + k)) return false;
        const bool same = k < scan.slots    ? view(held) && t.data == row.state[k]
                          : k == scan.slots ? same_number(held, row.counter, scan.counter_bits)
                                            : same_number(held, row.scalar, scan.scalar_bits);
        if (!same) return false;
    }

    if (!scan.dtensor && !is_tensor(scan, grad)) return false;
    // Without data: a tensor that represents zeros, or a subclass that wraps other tensors.
    if (!view(grad) || !(t.data || !row.numel)) return false;
    bucket.gradients[i] = row.numel ? t.data : NO_DATA;
    return true;
}

// Returns the first row that has a gradient and no longer describes its tensors, or -1. `every`: the
// gradients of all rows were read in the first part.
inline ptrdiff_t changed_row(Bucket& bucket, bool every) {
    const Scan& scan = *bucket.scan;
    const ExchangeApi* api = exchange_api(scan.capsule);
    if (!api) return 0;
    every = every || scan.dtensor;
    Ahead ahead(bucket, every ? 0 : bucket.count);
    const int64_t* layout = scan.layout;
    bucket.active = 0;
    for (ptrdiff_t i = 0; i < bucket.count; ++i) {
        PyObject* grad = every ? nullptr : ahead.next_grad(i);
        if (!every && !grad) return i;
        if (every || needs_asking(scan, bucket.rows[i])) {
            if (grad) Py_DecRef(grad);
            grad = PyList_GetItem(scan.grads, i);  // the gradient that the first part asked about
        } else if (PyList_SetItem(scan.grads, i, grad)) {
            return i;
        }
        if (!same_row(bucket, *api, i, layout, grad)) return i;
        bucket.active += grad != scan.none;
        layout += 1 + 2 * *layout;
    }
    return -1;
}

// ---- both parts, for all buckets

inline Answer scan(View& view) {
    for (int64_t b = 0; b < view.count; ++b) release(view.buckets[b]);
    if (!still_idle(view)) return WOKEN;
    const bool every = has_mode(view);
    const auto stops = [&view](int64_t bucket, ptrdiff_t row) {
        view.bucket = bucket, view.row = row;
        return row >= 0;
    };
    for (int64_t b = 0; b < view.count; ++b)
        if (stops(b, ask(view.buckets[b], every))) return CHANGED;
    const NoCollection no_collection;
    if (!same_groups(view)) return GROUPS_CHANGED;
    if (!same_settings(view)) return SETTINGS_CHANGED;
    if (!same_state(view)) return STATE_CHANGED;
    bool all = true;
    for (int64_t b = 0; b < view.count; ++b) {
        Bucket& bucket = view.buckets[b];
        if (stops(b, changed_row(bucket, every))) return CHANGED;
        all = all && bucket.active == bucket.count;
    }
    return all ? ALL_ACTIVE : SOME_IDLE;
}

}  // namespace clr
