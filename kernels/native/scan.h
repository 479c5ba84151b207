// Has anything that a bucket's table points to changed since the last step?
//
// The one question a plan asks every step, of every tensor. Asked from Python it would cost more
// than updating a small tensor does; here a tensor is read through DLPack's C exchange API, which
// torch offers on the class torch.Tensor: pointer, dtype, sizes and strides in one call, and no
// header of torch. Of CPython's C API a dozen functions are needed, declared here so that no Python
// header is; they are found in the running interpreter. All of it runs with the GIL held.
//
// A step is long and gives the GIL away, and another thread may then drop the gradients that the
// kernel reads. So the scan holds every gradient that it took a pointer from until the step is over.
//
// A scan has two parts. Questions that may run Python code or give the GIL away come first (DTensors
// are compared in Python, and torch's is_neg() releases the GIL). Pointers are read after them, with
// the garbage collector off, so that no other thread runs between the first pointer and the last.
// While a scan or a step uses the rows, `busy` keeps every other scan and step out.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
typedef struct _object PyObject;
PyObject* PyObject_GetAttr(PyObject*, PyObject*);
PyObject* PyObject_CallMethodObjArgs(PyObject*, PyObject*, ...);
PyObject* PyObject_CallFunctionObjArgs(PyObject*, ...);
PyObject* PyObject_Type(PyObject*);
int PyObject_RichCompareBool(PyObject*, PyObject*, int);
PyObject* PyList_GetItem(PyObject*, ptrdiff_t);  // borrowed
int PyList_SetItem(PyObject*, ptrdiff_t, PyObject*);  // takes over the reference
int PyList_SetSlice(PyObject*, ptrdiff_t, ptrdiff_t, PyObject*);
ptrdiff_t PyList_Size(PyObject*);
PyObject* PyTuple_GetItem(PyObject*, ptrdiff_t);  // borrowed
ptrdiff_t PyTuple_Size(PyObject*);
unsigned long PyThread_get_thread_ident();
int PyGC_Disable();
int PyGC_Enable();
PyObject* PyDict_GetItemWithError(PyObject*, PyObject*);  // borrowed
int PyDict_Next(PyObject*, ptrdiff_t*, PyObject**, PyObject**);  // borrowed
void* PyCapsule_GetPointer(PyObject*, const char*);
void PyErr_Clear();
void Py_DecRef(PyObject*);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

namespace clr {

struct Bucket;

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
    PyObject *tensor, *parameter;  // the classes of torch that a gradient may be of
    PyObject *is_neg, *no;  // the name "is_neg", and False
    // For DTensors, else null: the class, a list of what says how each is divided over ranks (of the
    // parameter and of each slot, a row each), and the attributes' names.
    PyObject *dtensor, *specs, *local, *spec, *placements, *mesh;
    PyObject* grads;  // list of the gradients that the rows point to, None for those without
    PyObject* nones;  // list of as many Nones
    const int64_t* layout;  // a row each: ndim, sizes, strides
    int64_t slots;          // keys that are state slots
    int64_t code, bits;     // DLPack's names for the dtype of parameters, gradients and slots
    int64_t counter_bits;   // the step counters are floats of so many bits
    int64_t device_type, device_id;  // DLPack's names for the device of them all
    // Which word of a tensor's object points to its implementation, and which word of that to its
    // storage. `storage` is 0 where the scan must not look ahead.
    int64_t impl, storage;
    // Which word of the implementation holds torch's dispatch keys, and the bit of a lazy negation;
    // `negative` is 0 where torch must be asked.
    int64_t key_set;
    uint64_t negative;
};

// A tensor of a bucket. In step with _ROW in plan.py: ten 64-bit integers.
struct Row {
    void* param;
    const void* grad;
    void* state[3];
    void* step;      // torch's own counter of this parameter, or null
    int64_t numel;
    int64_t group;   // whose scalars
    int64_t first;   // its state holds nothing yet
    int64_t active;  // it has a gradient this time
};
static_assert(sizeof(Row) == 10 * sizeof(int64_t), "Row must match plan.py");

inline bool is_kind(const Scan& scan, const DLTensor& t, int64_t code, int64_t bits) {
    return t.code == code && t.bits == bits && t.lanes == 1 &&
           t.device_type == scan.device_type && t.device_id == scan.device_id;
}

// Sizes, and strides where they matter: any stride will do for a size of 1, and for no elements.
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

// What a whole plan was built from. In step with _View in plan.py.
struct View {
    PyObject* groups;    // list of the groups' dictionaries
    PyObject* members;   // list of lists: what was in their "params"
    PyObject* keys;      // list of lists: the names of their settings
    PyObject* settings;  // list of lists: the settings
    PyObject* state;     // optimizer.state
    PyObject* dicts;     // list of its values
    PyObject* idle;      // list of tensors that had no gradient and nothing to update
    PyObject *params, *grad, *none;  // the names "params" and "grad", and None
    PyObject *has_mode, *no;  // whether a torch function mode sees every `p.grad`: asks it; and False
    Bucket* buckets;
    int64_t count;
    int64_t* tally;  // kernel calls, and those of them that count as steps
    int64_t busy;    // the thread whose scan or step uses the rows, or 0
    int64_t ready;   // a scan has found the rows right, and no step has used them since
    int64_t bucket, row;  // where the last scan stopped, if at a row
};

// In step with _BUCKET in plan.py: eight 64-bit integers.
struct Bucket {
    const Scan* scan;
    Row* rows;
    int64_t count;
    int64_t active;  // rows with a gradient: written by clr_current
    int64_t kernel, dtype;  // by their numbers
    int64_t wide_counter;
    int64_t held;  // scan->grads holds gradients
};

// A list or a tuple.
class Items {
public:
    explicit Items(PyObject* object) : object_(object), size_(PyList_Size(object)) {
        if (size_ >= 0) return;
        PyErr_Clear();
        is_tuple_ = true;
        size_ = PyTuple_Size(object);
    }
    ptrdiff_t size() const { return size_; }  // -1 for anything else
    PyObject* get(ptrdiff_t i) const {
        return is_tuple_ ? PyTuple_GetItem(object_, i) : PyList_GetItem(object_, i);
    }

private:
    PyObject* object_;
    bool is_tuple_ = false;
    ptrdiff_t size_;
};

inline bool same_items(PyObject* a, PyObject* b) {
    const Items now(a), then(b);
    if (now.size() < 0 || now.size() != then.size()) return false;
    for (ptrdiff_t i = 0; i < now.size(); ++i)
        if (now.get(i) != then.get(i)) return false;
    return true;
}

// Another thread may have added a group since the plan was made: the user's list is the longer one.
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

// The very dictionaries, in their order: one that was replaced, added or taken away shows.
inline bool same_state(const View& view) {
    ptrdiff_t at = 0, i = 0;
    const ptrdiff_t count = PyList_Size(view.dicts);
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(view.state, &at, &key, &value))
        if (i >= count || value != PyList_GetItem(view.dicts, i++)) return false;
    return i == count;
}

// May run Python code: a parameter of the user's own class may have a `grad` of its own.
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

// A subclass may give its memory another meaning.
inline bool is_tensor(const Scan& scan, PyObject* object) {
    PyObject* type = PyObject_Type(object);
    Py_DecRef(type);
    return type == scan.tensor || type == scan.parameter;
}

// A reference, given back at the end.
class Ref {
public:
    explicit Ref(PyObject* object = nullptr) : object_(object) {}
    Ref(const Ref&) = delete;
    ~Ref() {
        if (object_) Py_DecRef(object_);
    }
    PyObject* get() const { return object_; }

private:
    PyObject* object_;
};

inline bool same_attribute(PyObject* a, PyObject* b, PyObject* name) {
    const Ref of_a(PyObject_GetAttr(a, name)), of_b(PyObject_GetAttr(b, name));
    return of_a.get() && of_b.get() &&
           PyObject_RichCompareBool(of_a.get(), of_b.get(), /*Py_EQ*/ 2) == 1;
}

// Whether a row's k-th DTensor (0: the parameter or its gradient, then the slots) is divided over the
// ranks as it was when the plan was made. Runs Python code.
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

// The bit of a lazy negation, which DLPack does not tell.
inline bool is_negated(const Scan& scan, PyObject* tensor) {
    if (!scan.negative) return false;  // torch was asked
    const auto* impl = static_cast<const uint64_t* const*>(static_cast<void*>(tensor))[scan.impl];
    return (impl[scan.key_set] & scan.negative) != 0;
}

// The same question to torch, which gives the GIL away.
inline bool is_negated_says_torch(const Scan& scan, PyObject* tensor) {
    const Ref negated(PyObject_CallMethodObjArgs(tensor, scan.is_neg, nullptr));
    return negated.get() != scan.no;
}

// Which rows need a question that may run Python code. Autograd itself hands over lazy negations of
// one element only (an imaginary part, whose strides fit no other layout): torch is asked of those.
inline bool needs_asking(const Scan& scan, const Row& row) {
    return scan.dtensor || row.numel == 1 || !scan.negative;
}

// Lets go of the gradients.
inline void release(Bucket& bucket) {
    const Scan& scan = *bucket.scan;
    if (!bucket.held) return;
    bucket.held = 0;
    // They have left the caches meanwhile, and would be waited for one by one.
    for (ptrdiff_t i = 0; i < bucket.count; ++i)
        __builtin_prefetch(PyList_GetItem(scan.grads, i), 1);
    PyList_SetSlice(scan.grads, 0, bucket.count, scan.nones);
}

// A torch function mode (torch.device as a context is one) runs Python code at every `p.grad`.
inline bool has_mode(const View& view) {
    const Ref answer(PyObject_CallFunctionObjArgs(view.has_mode, nullptr));
    return answer.get() != view.no;
}

// Asks all that may run Python code or give the GIL away, and holds the gradients it asked about:
// all of them if `every`. Returns the first row that is not as it was, or -1.
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
    }
    return -1;
}

// A thousand small tensors' objects have mostly left the caches by the time of a step, and to look
// at one is to wait for the memory three times: for the object, for its implementation, for its
// storage. So rows ahead are asked for early, a stage at a time. To the caches these are hints:
// nothing read here decides anything.
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

    // Row i's gradient, a new reference; null after an exception. To be asked for in order.
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
    // A gradient may be anything; an object's second word is its class.
    bool is_tensor(PyObject* grad) const { return grad && word(grad, 1) == scan_.tensor; }
    void fetch_impl(PyObject* tensor) const { fetch(word(tensor, scan_.impl), 4); }
    void fetch_storage(PyObject* tensor) const {
        fetch(word(word(tensor, scan_.impl), scan_.storage), 2);
    }

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
                fetch(rows_[middle].step, 1);
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
    // As of the last scan: of a row without a gradient nothing more is looked at.
    bool was_active(ptrdiff_t i) const { return rows_[i].active; }
    PyObject* held(ptrdiff_t i, ptrdiff_t k) const {
        return PyList_GetItem(scan_.tensors, i * keys_ + k);
    }

    const Scan& scan_;
    const Row* rows_;
    ptrdiff_t count_, keys_;
    PyObject* grads_[RING] = {};
};

// Whether row i still describes its tensors; takes in the gradient's pointer, which may move. No
// kernel touches a row without a gradient, so nothing of such a row is looked at.
inline bool same_row(const Scan& scan, const ExchangeApi& api, Row& row, ptrdiff_t i,
                     const int64_t* layout, PyObject* grad) {
    row.active = grad != scan.none;
    if (!row.active) return true;
    DLTensor t;
    // Looks at a tensor of the parameter's kind and layout; of a DTensor at this rank's part.
    const auto view = [&](PyObject* tensor) {
        const Ref part(scan.dtensor ? PyObject_GetAttr(tensor, scan.local) : nullptr);
        if (scan.dtensor) tensor = part.get();
        return tensor && !api.view(tensor, &t) && is_kind(scan, t, scan.code, scan.bits) &&
               has_layout(t, layout) && !is_negated(scan, tensor);
    };
    if (!view(PyList_GetItem(scan.params, i)) || t.data != row.param) return false;

    const ptrdiff_t keys = PyList_Size(scan.keys);
    PyObject* dict = keys ? PyList_GetItem(scan.dicts, i) : nullptr;
    for (ptrdiff_t k = 0; k < keys; ++k) {
        PyObject* held = PyDict_GetItemWithError(dict, PyList_GetItem(scan.keys, k));
        if (!held || held != PyList_GetItem(scan.tensors, i * keys + k)) return false;
        const bool same = k < scan.slots
                              ? view(held) && t.data == row.state[k]
                              : !api.view(held, &t) && t.data == row.step && t.ndim == 0 &&
                                    is_kind(scan, t, 2, scan.counter_bits) &&
                                    !is_negated(scan, held);
        if (!same) return false;
    }

    if (!scan.dtensor && !is_tensor(scan, grad)) return false;
    // No data: a tensor that stands for zeros, or a subclass that wraps others.
    if (!view(grad) || !(t.data || !row.numel)) return false;
    row.grad = t.data;
    return true;
}

// Returns the first row that has a gradient and does not describe its tensors any more, or -1;
// `every`: as asked.
inline ptrdiff_t other_row(Bucket& bucket, bool every) {
    const Scan& scan = *bucket.scan;
    const ExchangeApi* api = exchange_api(scan.capsule);
    if (!api) return 0;
    every = every || scan.dtensor;
    Ahead ahead(scan, bucket.rows, every ? 0 : bucket.count);
    const int64_t* layout = scan.layout;
    bucket.active = 0;
    for (ptrdiff_t i = 0; i < bucket.count; ++i) {
        Row& row = bucket.rows[i];
        PyObject* grad = every ? nullptr : ahead.next_grad(i);
        if (!every && !grad) return i;
        if (every || needs_asking(scan, row)) {
            if (grad) Py_DecRef(grad);
            grad = PyList_GetItem(scan.grads, i);  // the one that was asked about
        } else if (PyList_SetItem(scan.grads, i, grad)) {
            return i;
        }
        if (!same_row(scan, *api, row, i, layout, grad)) return i;
        bucket.active += row.active;
        layout += 1 + 2 * *layout;
    }
    return -1;
}

// Keeps finalizers, which may be any Python code, out of what happens while this lives.
class NoCollection {
public:
    NoCollection() : was_enabled_(PyGC_Disable()) {}
    NoCollection(const NoCollection&) = delete;
    ~NoCollection() {
        if (was_enabled_) PyGC_Enable();
    }

private:
    int was_enabled_;
};

// Keeps every other scan and step away from the rows while this lives; made and ended with the GIL.
class Hold {
public:
    explicit Hold(View& view) : view_(view), has_(!view.busy) {
        if (has_) view.busy = this_thread();
    }
    Hold(const Hold&) = delete;
    ~Hold() {
        if (has_) view_.busy = 0;
    }
    explicit operator bool() const { return has_; }  // false if another one has the rows
    bool is_nested() const { return !has_ && view_.busy == this_thread(); }

private:
    static int64_t this_thread() { return int64_t(PyThread_get_thread_ident()); }

    View& view_;
    bool has_;
};

// Gives the GIL away for as long as it lives, if that is to be long: a thread that gives it away
// may wait for milliseconds to get it back.
class Aside {
public:
    explicit Aside(bool is_long) : state_(is_long ? PyEval_SaveThread() : nullptr) {}
    Aside(const Aside&) = delete;
    ~Aside() {
        if (state_) PyEval_RestoreThread(state_);
    }

private:
    void* state_;
};

}  // namespace clr
