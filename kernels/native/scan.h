// The scan: finds out whether anything that the rows point to changed since the plan was built.
//
// A plan asks this question at every step, about every tensor. Asked from Python, it would take
// longer than the update of a small tensor. Every function is called with the GIL.
//
// A long step gives the GIL away, and another thread may then drop the gradients that the kernel
// reads. So the scan keeps every gradient alive whose address it took, until the step is over.
//
// A scan has two parts. Questions that may run Python code or give the GIL away come first: DTensors
// are compared in Python, and torch's is_neg() releases the GIL. Addresses are read in the second
// part, with the garbage collector off, so that no other thread runs between the first address and
// the last.
#pragma once

#include "ahead.h"

namespace clr {

// What a plan was built from, beside its buckets. All of it belongs to the plan, see plan.h.
struct Sources {
    Ref groups;    // list or tuple of the groups' dictionaries
    Ref members;   // list of lists: the parameters of each group
    Ref keys;      // list of lists: the names of each group's settings
    Ref settings;  // list of lists: the settings
    Ref state;     // optimizer.state
    Ref dicts;     // its items, in a dictionary of ours
    Ref idle;      // list of tensors without a gradient, in no bucket
    std::vector<Bucket*> buckets;
    int64_t bucket = 0, row = 0;  // where the last scan stopped, if it stopped at a row
};

// The answers of a scan.
enum Answer {
    ALL_ACTIVE = 0,
    SOME_IDLE = 1,  // nothing has changed, but some rows have no gradient
    CHANGED = 2,    // a row has changed: see Sources::bucket and Sources::row
    GROUPS_CHANGED = 3,
    SETTINGS_CHANGED = 4,
    STATE_CHANGED = 5,
    WOKEN = 6,   // an idle parameter has a gradient
    NESTED = 7,  // the plan is in use: a finalizer or a signal handler has called it
};
inline bool is_current(Answer answer) { return answer <= SOME_IDLE; }

// ---- groups and state

inline bool same_items(PyObject* a, PyObject* b) {
    const Items now(a), then(b);
    if (now.size() < 0 || now.size() != then.size()) return false;
    for (Py_ssize_t i = 0; i < now.size(); ++i)
        if (now.get(i) != then.get(i)) return false;
    return true;
}

// Another thread may have added a group since the plan was built. The user's list is then longer.
inline bool same_groups(const Sources& sources) {
    const Items groups(sources.groups.get());
    if (groups.size() != PyList_Size(sources.members.get())) return false;
    for (Py_ssize_t i = 0; i < groups.size(); ++i) {
        PyObject* const params = PyDict_GetItemWithError(groups.get(i), names().params.get());
        if (!params || !same_items(params, PyList_GetItem(sources.members.get(), i))) return false;
    }
    return true;
}

inline bool same_settings(const Sources& sources) {
    const Items groups(sources.groups.get()), all_keys(sources.keys.get()),
        all_settings(sources.settings.get());
    if (groups.size() != all_keys.size() || groups.size() != all_settings.size()) return false;
    for (Py_ssize_t i = 0; i < groups.size(); ++i) {
        const Items keys(all_keys.get(i)), settings(all_settings.get(i));
        if (settings.size() != keys.size()) return false;
        for (Py_ssize_t k = 0; k < keys.size(); ++k) {
            PyObject* const now = PyDict_GetItemWithError(groups.get(i), keys.get(k));
            if (!now || now != settings.get(k)) return false;
        }
    }
    return true;
}

// Compares the items' identities and order, which shows any that was replaced, added or removed.
inline bool same_state(const Sources& sources) {
    PyObject* const dicts = sources.dicts.get();
    if (PyDict_Size(sources.state.get()) != PyDict_Size(dicts)) return false;
    Py_ssize_t at = 0, at_known = 0;
    PyObject *key = nullptr, *value = nullptr, *known_key = nullptr, *known = nullptr;
    while (PyDict_Next(sources.state.get(), &at, &key, &value))
        if (!PyDict_Next(dicts, &at_known, &known_key, &known) || key != known_key ||
            value != known)
            return false;
    return true;
}

// May run Python code: a parameter of a user's class may define `grad`.
inline bool still_idle(const Sources& sources) {
    const Py_ssize_t count = PyList_Size(sources.idle.get());
    for (Py_ssize_t i = 0; i < count && i < PyList_Size(sources.idle.get()); ++i) {
        const Ref param = Ref::to(PyList_GetItem(sources.idle.get(), i));
        const Ref grad(PyObject_GetAttr(param.get(), names().grad.get()));
        if (!grad.is(Py_None)) return false;
    }
    return true;
}

// A torch function mode (torch.device as a context is one) runs Python code at every `p.grad`.
inline bool has_mode() {
    const Ref answer(PyObject_CallNoArgs(torch().has_mode.get()));
    return !answer.is(Py_False);
}

// ---- the first part: questions that may run Python code

// A subclass may give its memory another meaning.
inline bool is_tensor(PyObject* object) {
    PyObject* const type = type_of(object);
    return torch().tensor.is(type) || torch().parameter.is(type);
}

inline bool same_attribute(PyObject* a, PyObject* b, PyObject* name) {
    const Ref of_a(PyObject_GetAttr(a, name)), of_b(PyObject_GetAttr(b, name));
    return of_a && of_b && PyObject_RichCompareBool(of_a.get(), of_b.get(), Py_EQ) == 1;
}

// Returns whether a DTensor of row i is divided over the ranks as it was when the plan was built. k is 0 for
// the parameter and its gradient, 1 for the first slot.
inline bool same_spread(const Bucket& bucket, PyObject* tensor, int64_t i, int64_t k) {
    if (!torch().dtensor.is(type_of(tensor))) return false;
    const Ref was = Ref::to(bucket.specs[size_t(i * (1 + bucket.slots()) + k)].get());
    const Ref spec(PyObject_GetAttr(tensor, names().spec.get()));
    if (!spec) return false;
    return spec.is(was.get()) || (same_attribute(spec.get(), was.get(), names().placements.get()) &&
                                  same_attribute(spec.get(), was.get(), names().mesh.get()));
}

inline bool same_spreads(const Bucket& bucket, int64_t i) {
    if (!same_spread(bucket, bucket.params[size_t(i)].get(), i, 0)) return false;
    for (int64_t k = 0; k < bucket.slots(); ++k)
        if (!same_spread(bucket, bucket.tensor(i, size_t(k)), i, 1 + k)) return false;
    return true;
}

// Returns whether a tensor is a lazy negation, which DLPack does not tell. Asks torch, which gives the GIL
// away.
inline bool is_negated_says_torch(PyObject* tensor) {
    const Ref negated(PyObject_CallMethodObjArgs(tensor, names().is_neg.get(), nullptr));
    return !negated.is(Py_False);
}

// Asks torch about the parameter and the state of row i.
inline bool any_is_negated_says_torch(const Bucket& bucket, int64_t i) {
    const auto asks = [&bucket](PyObject* tensor) {
        const Ref part = local_part(tensor, bucket.divides);
        return !part || is_negated_says_torch(part.get());
    };
    if (asks(bucket.params[size_t(i)].get())) return true;
    for (size_t k = 0; k < bucket.width(); ++k) {
        PyObject* const held = bucket.tensor(i, k);
        if (int64_t(k) < bucket.slots() ? asks(held) : is_negated_says_torch(held)) return true;
    }
    return false;
}

// Returns whether kernels may touch a row: no kernel touches a row that has neither gradient nor average.
inline bool is_read(const Bucket& bucket, PyObject* grad) {
    return grad != Py_None || bucket.reads_averages;
}

// Returns whether row i needs a question that may run Python code. Torch is asked about tensors of
// one element even if the bit of a negation is known: autograd itself hands over lazy negations of one
// element (an imaginary part; with more elements its strides fit no other layout).
inline bool needs_asking(const Bucket& bucket, int64_t i) {
    return bucket.divides || bucket.rows[size_t(i)].numel == 1 || !bucket.words.negative;
}

// Asks the questions about row i and its gradient; returns whether kernels may still use both.
inline bool is_fit(const Bucket& bucket, int64_t i, PyObject* grad) {
    if (!is_read(bucket, grad)) return true;
    if (bucket.divides && !same_spreads(bucket, i)) return false;
    if (grad != Py_None) {
        const Ref part = local_part(grad, bucket.divides);
        if (!part) return false;
        if (bucket.divides && !same_spread(bucket, grad, i, 0)) return false;
        if (!is_tensor(part.get())) return false;
        const bool asks_torch = !bucket.words.negative || bucket.rows[size_t(i)].numel == 1;
        if (asks_torch && is_negated_says_torch(part.get())) return false;
    }
    return bucket.words.negative || !any_is_negated_says_torch(bucket, i);
}

// Asks the questions, and keeps alive the gradients of these rows, or of every row if `every`.
// Returns the first row that has changed, or -1.
inline int64_t ask(Bucket& bucket, bool every) {
    bucket.holds = true;
    for (int64_t i = 0; i < bucket.count(); ++i) {
        const bool asks = needs_asking(bucket, i);
        if (!asks && !every) continue;
        Ref grad(PyObject_GetAttr(bucket.params[size_t(i)].get(), names().grad.get()));
        if (!grad) return i;
        const Ref given = Ref::to(grad.get());
        bucket.grads[size_t(i)] = std::move(grad);
        if (asks && !is_fit(bucket, i, given.get())) return i;
    }
    return -1;
}

// ---- the second part: addresses

// Compares number of dimensions, sizes, and strides where they matter: a dimension of size 1 may
// have any stride, and so may a tensor without elements.
inline bool has_layout(const DLTensor& t, const int64_t* layout) {
    const int64_t ndim = *layout++;
    if (t.ndim != ndim) return false;
    bool same = true, empty = false;
    for (int64_t d = 0; d < ndim; ++d) {
        if (t.shape[d] != layout[d]) return false;
        empty = empty || layout[d] == 0;
        same = same && (layout[d] == 1 || t.strides[d] == layout[ndim + d]);
    }
    return same || empty;
}

// Returns whether two blocks of so many bytes share memory. A kernel writes a value of the parameter
// before it reads the next ones of the gradient.
inline bool overlap(const void* a, const void* b, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(a), second = reinterpret_cast<uintptr_t>(b);
    return (first < second ? second - first : first - second) < uintptr_t(bytes);
}

// Returns whether row i still describes its tensors. Takes in the address of the gradient, which may change.
inline bool same_row(Bucket& bucket, int64_t i, PyObject* grad) {
    const Row& row = bucket.rows[size_t(i)];
    bucket.gradients[size_t(i)] = nullptr;
    if (!is_read(bucket, grad)) return true;
    DLTensor t;
    const auto here = [&] {
        return t.device_type == bucket.device_type && t.device_id == bucket.device_id;
    };
    // Reads a tensor of the parameter's layout; of a DTensor the part of this rank. The dtype is the
    // parameter's, or a slot's.
    const auto reads = [&](PyObject* tensor, int64_t slot = -1) {
        const int64_t dtype = bucket.dtype_of(slot);
        const Ref part = local_part(tensor, bucket.divides);
        return part && is_tensor(part.get()) && view(part.get(), t) && here() && t.code == Bucket::code(dtype) &&
               t.bits == 8 * size_of(dtype) && t.lanes == 1 && has_layout(t, bucket.layout_of(i)) &&
               !is_negated(bucket.words, part.get());
    };
    const auto same_number = [&](PyObject* tensor, const void* data, int64_t bits) {
        return view(tensor, t) && t.data == data && t.ndim == 0 && is_float(t, bits) && here() &&
               !is_negated(bucket.words, tensor);
    };
    if (!reads(bucket.params[size_t(i)].get()) || t.data != row.param) return false;

    PyObject* const dict = bucket.width() ? bucket.dicts[size_t(i)].get() : nullptr;
    for (size_t k = 0; k < bucket.width(); ++k) {
        if (bucket.is_average(int64_t(k)) && !bucket.reads_averages) continue;
        PyObject* const held = PyDict_GetItemWithError(dict, bucket.keys[k].get());
        if (!held || held != bucket.tensor(i, k)) return false;
        const bool same = int64_t(k) < bucket.slots()    ? reads(held, int64_t(k)) && t.data == row.state[k]
                          : int64_t(k) == bucket.slots() ? same_number(held, row.counter, bucket.counter_bits)
                                                       : same_number(held, row.scalar, bucket.scalar_bits);
        if (!same) return false;
    }

    if (grad == Py_None) return true;
    // Without data: a tensor that represents zeros, or a subclass that wraps other tensors.
    if (!reads(grad) || !(t.data || !row.numel)) return false;
    if (overlap(t.data, row.param, row.numel * size_of(bucket.dtype))) return false;
    bucket.gradients[size_t(i)] = row.numel ? t.data : NO_DATA;
    return true;
}

// Returns the first row that has a gradient and no longer describes its tensors, or -1. `every`: the
// gradients of all rows were read in the first part.
inline int64_t changed_row(Bucket& bucket, bool every) {
    every = every || bucket.divides;
    Ahead ahead(bucket, every ? 0 : bucket.count());
    bucket.active = bucket.values = bucket.idle_values = 0;
    for (int64_t i = 0; i < bucket.count(); ++i) {
        Ref& held = bucket.grads[size_t(i)];
        if (!every) {
            Ref grad = ahead.next_grad(i);
            if (!grad) return i;
            // The first part has asked about the gradient of some rows: it stays.
            if (!needs_asking(bucket, i)) held = std::move(grad);
        }
        if (!same_row(bucket, i, held.get())) return i;
        const int64_t numel = bucket.rows[size_t(i)].numel;
        if (held.is(Py_None)) bucket.idle_values += numel;
        else bucket.active += 1, bucket.values += numel;
    }
    return -1;
}

// ---- both parts, for all buckets

// Answers whether anything has changed that the plan was built from. If not, the gradients'
// addresses are up to date. `averages` tells whether the step may move averages. An exception (a sparse gradient has no strides) counts as a change.
inline Answer scan(Sources& sources, bool averages) {
    for (Bucket* bucket : sources.buckets) {
        bucket->release();
        bucket->reads_averages = averages && bucket->averages();
    }
    if (!still_idle(sources)) return WOKEN;
    const bool every = has_mode();
    const auto stops = [&sources](size_t bucket, int64_t row) {
        sources.bucket = int64_t(bucket), sources.row = row;
        return row >= 0;
    };
    for (size_t b = 0; b < sources.buckets.size(); ++b)
        if (stops(b, ask(*sources.buckets[b], every))) return CHANGED;
    const NoCollection no_collection;
    if (!same_groups(sources)) return GROUPS_CHANGED;
    if (!same_settings(sources)) return SETTINGS_CHANGED;
    if (!same_state(sources)) return STATE_CHANGED;
    bool all = true;
    for (size_t b = 0; b < sources.buckets.size(); ++b) {
        Bucket& bucket = *sources.buckets[b];
        if (stops(b, changed_row(bucket, every))) return CHANGED;
        all = all && bucket.active == bucket.count();
    }
    return all ? ALL_ACTIVE : SOME_IDLE;
}

}  // namespace clr
