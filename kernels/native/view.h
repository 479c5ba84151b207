// The structures that Python fills and the scan reads, and the answers of a scan.
//
// clr_optim/plan/structures.py declares the same names in the same order. A test compares the two
// files; every field has 8 bytes. Row is in kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpython.h"
#include "kernels.h"

namespace clr {

// What the rows of one bucket were built from.
struct Scan {
    PyObject* params;   // list of tensors, one per row
    PyObject* dicts;    // list of optimizer.state[p], one per row; empty if the rule keeps no state
    PyObject* keys;     // list of the names in these: state slots, step counter, scalar state
    PyObject* tensors;  // list of the tensors in these: len(keys) per row
    PyObject* grad;     // the name "grad"
    PyObject* none;
    PyObject* capsule;  // of DLPack's exchange API
    PyObject* tensor;   // the class torch.Tensor
    PyObject* parameter;  // the class torch.nn.Parameter
    PyObject* is_neg;   // the name "is_neg"
    PyObject* no;       // False
    // For DTensors, else null: the class; a list of the specs of each row's parameter and slots,
    // which tell how a DTensor is divided over ranks; and the names of attributes.
    PyObject* dtensor;
    PyObject* specs;
    PyObject* local;
    PyObject* spec;
    PyObject* placements;
    PyObject* mesh;
    PyObject* grads;  // list of the gradients that the rows point to, or None, one per row
    PyObject* nones;  // list of as many Nones
    const int64_t* layout;  // number of dimensions, sizes, strides; one after the other, per row
    int64_t slots;          // how many of the keys are state slots
    int64_t code;           // DLPack's name for the dtype of parameters, gradients and slots
    int64_t bits;
    int64_t counter_bits;  // the width of the step counters, which are floats
    int64_t scalar_bits;   // the same of the scalar states
    int64_t device_type;   // DLPack's name for the device of all tensors
    int64_t device_id;
    // Places in torch's objects, see clr_optim/plan/words.py.
    int64_t impl;       // which word of a tensor's object points to its implementation
    int64_t storage;    // which word of that points to its storage; 0: do not look ahead
    int64_t key_set;    // which word of the implementation holds the dispatch keys
    uint64_t negative;  // the bit of a lazy negation in these; 0: ask torch
};
static_assert(sizeof(Scan) == 31 * 8, "a field of Scan has other than 8 bytes");

// The gradient of a tensor without elements, whose data may be null. No kernel reads the address,
// which is a multiple of 16 like those of aligned gradients.
const void* const NO_DATA = reinterpret_cast<const void*>(16);

// The header of a bucket.
struct Bucket {
    const Scan* scan;
    const Row* rows;
    // Addresses of the gradients, one per row; null for a row without a gradient, which no kernel
    // touches. Written by the scan.
    const void** gradients;
    int64_t count;
    int64_t active;  // how many rows have a gradient: written by the scan
    int64_t kernel;  // by number
    int64_t dtype;   // by number
    int64_t wide_counter;  // 1 if step counters are double
    int64_t wide_scalar;   // the same of the scalar states
    int64_t held;    // 1 if scan->grads holds gradients
};
static_assert(sizeof(Bucket) == 10 * 8, "a field of Bucket has other than 8 bytes");

// What a whole plan was built from.
struct View {
    PyObject* groups;    // list or tuple of the groups' dictionaries
    PyObject* members;   // list of lists: the parameters of each group
    PyObject* keys;      // list of lists: the names of each group's settings
    PyObject* settings;  // list of lists: the settings
    PyObject* state;     // optimizer.state
    PyObject* dicts;     // list of its values
    PyObject* idle;      // list of tensors without a gradient, in no bucket
    PyObject* params;    // the name "params"
    PyObject* grad;      // the name "grad"
    PyObject* none;
    PyObject* has_mode;  // asks whether a torch function mode is active
    PyObject* no;        // False
    Bucket* buckets;
    int64_t count;
    int64_t* tally;  // the number of kernel calls, and of those that count as steps
    int64_t busy;    // the thread whose scan or step uses the rows, or 0
    int64_t ready;   // 1 if a scan has found the rows right, and no step has used them since
    int64_t bucket;  // where the last scan stopped, if it stopped at a row
    int64_t row;
};
static_assert(sizeof(View) == 19 * 8, "a field of View has other than 8 bytes");

enum Answer {
    ALL_ACTIVE = 0,
    SETTINGS_CHANGED = 1,
    SOME_IDLE = 2,  // nothing has changed, but some rows have no gradient
    CHANGED = -1,  // a row has changed: see View::bucket and View::row
    BUSY = -2,  // another thread uses the rows
    GROUPS_CHANGED = -3,
    STATE_CHANGED = -4,
    WOKEN = -5,  // an idle parameter has a gradient
    NESTED = -6,  // this thread uses the rows, and has called itself through a finalizer
};

// Keeps every other scan and step away from the rows. Made and ended with the GIL.
class Hold {
public:
    explicit Hold(View& view) : view_(view), has_(!view.busy) {
        if (has_) view.busy = this_thread();
    }
    Hold(const Hold&) = delete;
    ~Hold() {
        if (has_) view_.busy = 0;
    }
    explicit operator bool() const { return has_; }  // false if another Hold has the rows
    bool is_nested() const { return !has_ && view_.busy == this_thread(); }

private:
    static int64_t this_thread() { return int64_t(PyThread_get_thread_ident()); }

    View& view_;
    bool has_;
};

}  // namespace clr
