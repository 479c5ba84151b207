// Run every native kernel of a set on every dtype, without Python or torch: for valgrind, under which
// Python and torch take minutes to start, and for sanitizers, which need no preloading here. Commands:
// CONTRIBUTING.md. The first argument names the set of kernels.
//
// Each tensor is an allocation of exactly its size, so that an access beyond it is found. Lengths are
// around a vector, a unit of two 16-bit values, and a block. The driver checks that any number of
// threads gives the same bits, that rows without a gradient do not change, and that a first step does
// not depend on the memory of its momentum. (The kernel loads that memory without using it. valgrind
// would report this for memory that was never written.)
//
// With any other argument, the driver has a kernel reach beyond a tensor, which must be reported.

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "../../kernels/native/multi_tensor.cpp"
#include "../../kernels/native/storage.h"

using namespace clr;

// The driver's stand-ins for Python objects: lists, and objects that count their references.
struct _object {
    long references = 1;
    std::vector<PyObject*> items;
};

extern "C" {
[[noreturn]] static void never(const char* name) {
    std::fprintf(stderr, "%s: a step must not call this function\n", name);
    std::abort();
}
PyObject* PyObject_GetAttr(PyObject*, PyObject*) { never(__func__); }
PyObject* PyObject_CallMethodObjArgs(PyObject*, PyObject*, ...) { never(__func__); }
PyObject* PyObject_CallFunctionObjArgs(PyObject*, ...) { never(__func__); }
PyObject* PyObject_Type(PyObject*) { never(__func__); }
int PyObject_RichCompareBool(PyObject*, PyObject*, int) { never(__func__); }
int PyList_SetItem(PyObject*, ptrdiff_t, PyObject*) { never(__func__); }
ptrdiff_t PyList_Size(PyObject*) { never(__func__); }
PyObject* PyTuple_GetItem(PyObject*, ptrdiff_t) { never(__func__); }
ptrdiff_t PyTuple_Size(PyObject*) { never(__func__); }
unsigned long PyThread_get_thread_ident() { return 7; }
int PyGC_Disable() { never(__func__); }
int PyGC_Enable() { never(__func__); }
PyObject* PyDict_GetItemWithError(PyObject*, PyObject*) { never(__func__); }
int PyDict_Next(PyObject*, ptrdiff_t*, PyObject**, PyObject**) { never(__func__); }
void* PyCapsule_GetPointer(PyObject*, const char*) { never(__func__); }
void PyErr_Clear() { never(__func__); }
void Py_DecRef(PyObject* object) {
    if (!--object->references) delete object;
}
PyObject* PyList_GetItem(PyObject* list, ptrdiff_t i) { return list->items.at(size_t(i)); }
int PyList_SetSlice(PyObject* list, ptrdiff_t from, ptrdiff_t to, PyObject* with) {
    for (ptrdiff_t i = from; i < to; ++i) {
        PyObject* old = list->items.at(size_t(i));
        list->items[size_t(i)] = with->items.at(size_t(i - from));
        ++list->items[size_t(i)]->references;
        Py_DecRef(old);
    }
    return 0;
}
static bool has_gil = true;
void* PyEval_SaveThread() {
    has_gil = false;
    return &has_gil;
}
void PyEval_RestoreThread(void*) { has_gil = true; }
}

namespace {

const int64_t LENGTHS[] = {0,  1,  2,   3,   5,   15,  16,   17,   31,  32, 33,
                           63, 64, 65, 127, 511, 512, 513, 1023, 4095, 40001};
constexpr int64_t TENSORS = sizeof LENGTHS / sizeof *LENGTHS;
constexpr int64_t GROUPS = 2, WIDTH = 8;
constexpr size_t SIZES[] = {4, 8, 2, 2};

void require(bool holds, const char* what, int64_t kernel, int64_t dtype) {
    if (holds) return;
    std::fprintf(stderr, "kernel %d, dtype %d: %s\n", int(kernel), int(dtype), what);
    std::exit(1);
}

// From malloc: valgrind and ASan know its exact end, but of a vector only the end of its capacity.
using Bytes = std::unique_ptr<unsigned char, decltype(&std::free)>;

Bytes values(int64_t dtype, int64_t count, unsigned seed, bool positive) {
    const size_t size = SIZES[dtype];
    Bytes bytes(static_cast<unsigned char*>(std::malloc(size * size_t(count))), std::free);
    for (int64_t i = 0; i < count; ++i) {
        seed = seed * 1664525u + 1013904223u;
        double x = double(seed >> 8) / (1 << 24) - (positive ? 0 : 0.5);
        const float f = float(x);
        const uint16_t half = Float16::store(f), brain = Bfloat16::store(f);
        const void* from = dtype == FLOAT32   ? static_cast<const void*>(&f)
                           : dtype == FLOAT64 ? static_cast<const void*>(&x)
                           : dtype == FLOAT16 ? static_cast<const void*>(&half)
                                              : static_cast<const void*>(&brain);
        std::memcpy(bytes.get() + size * size_t(i), from, size);
    }
    return bytes;
}

struct Run {
    std::vector<Bytes> memory;
    std::vector<clr::Row> rows;
    std::vector<const void*> gradients;
    std::vector<unsigned char> result;  // of all active rows: parameters, state, counters

    void keep(const void* from, size_t size) {
        const auto* bytes = static_cast<const unsigned char*>(from);
        if (size) result.insert(result.end(), bytes, bytes + size);
    }
};

bool overrun = false;

int slots_of(int64_t kernel) { return kernel_set().kernel(kernel, FLOAT32).slots; }

int64_t kernels() {
    int64_t count = 0;
    while (kernel_set().kernel(count, FLOAT32).name) ++count;
    return count;
}

Run run(int64_t kernel, int64_t dtype, int64_t threads, bool wide) {
    Run run;
    const bool counts = kernel >= 2, has_scalar = kernel_set().kernel(kernel, FLOAT32).factor;
    PyObject none, grads, nones;
    for (int64_t i = 0; i < TENSORS; ++i) {
        const auto tensor = [&](unsigned seed, bool positive = false) -> void* {
            run.memory.push_back(values(dtype, LENGTHS[i], seed + unsigned(i), positive));
            return run.memory.back().get();
        };
        clr::Row row = {};
        row.param = tensor(1);
        row.numel = LENGTHS[i] + (overrun && i == TENSORS - 1);
        row.group = i % GROUPS;
        const bool active = i % 5 != 4;
        run.gradients.push_back(!active ? nullptr : LENGTHS[i] ? tensor(2) : NO_DATA);
        // A first step may find any bytes in its momentum, and must not use them.
        row.first = kernel == 1 && i % 3 == 0;
        for (int k = 0; k < slots_of(kernel); ++k) row.state[k] = tensor(3 + unsigned(k), true);
        if (row.first) {
            run.memory.emplace_back(
                static_cast<unsigned char*>(std::malloc(SIZES[dtype] * size_t(LENGTHS[i]))),
                std::free);
            row.state[0] = run.memory.back().get();
            // Different bytes for each number of threads; all ones are NaN.
            const size_t size = SIZES[dtype] * size_t(LENGTHS[i]);
            if (size) std::memset(row.state[0], threads == 1 ? 255 : 1, size);
        }
        for (void** number : {&row.counter, &row.scalar}) {
            if (!(number == &row.counter ? counts : has_scalar)) continue;
            run.memory.emplace_back(static_cast<unsigned char*>(std::calloc(1, wide ? 8 : 4)),
                                    std::free);
            *number = run.memory.back().get();
        }
        run.rows.push_back(row);
        grads.items.push_back(active ? new PyObject : &none);
        nones.items.push_back(&none);
        none.references += 2;
    }
    const std::vector<unsigned char> idle = [&] {
        Run copy;
        for (int64_t i = 4; i < TENSORS; i += 5)
            copy.keep(run.rows[size_t(i)].param, SIZES[dtype] * size_t(LENGTHS[i]));
        return copy.result;
    }();

    // Rate, weight decay, shrinking, sign; then the scalars of the rule, in (0, 1) for every rule.
    double scalars[GROUPS * WIDTH];
    for (int64_t g = 0; g < GROUPS; ++g) {
        const double own[WIDTH] = {0.01, g ? 0.1 : 0.0, g ? 0.0 : 0.1, g ? -1.0 : 1.0, 0.9, 0.99, 1e-8, 0};
        std::memcpy(scalars + g * WIDTH, own, sizeof own);
    }
    clr::Scan scan = {};
    scan.grads = &grads, scan.nones = &nones, scan.none = &none;
    clr::Bucket bucket = {&scan, run.rows.data(), run.gradients.data(), TENSORS, 0,
                          kernel, dtype, wide, wide, 1};
    for (const void* gradient : run.gradients) bucket.active += gradient != nullptr;
    int64_t tally[2] = {};
    clr::View view = {};
    view.buckets = &bucket, view.count = 1, view.tally = tally, view.ready = 1;

    double squares = -1;
    for (int step = 0; step < 3; ++step) {
        require(clr_sums_of_squares(&view, &squares, threads) == 0, "no sums", kernel, dtype);
        require(squares > 0, "sums of nothing", kernel, dtype);
        require(clr_step(&view, scalars, WIDTH, 0.5, threads, 1) == 0, "no step", kernel, dtype);
        require(has_gil && !view.busy && tally[0] == step + 1 && tally[1] == step + 1,
                "a step not ended", kernel, dtype);
        require(clr_step(&view, scalars, WIDTH, 0.5, threads, 1) == 2, "a step of nothing", kernel,
                dtype);
        require(tally[0] == step + 1, "a step that was none", kernel, dtype);
        // Do what a scan does between steps.
        for (int64_t i = 0; i < TENSORS; ++i) {
            require(grads.items[size_t(i)] == &none, "a gradient held", kernel, dtype);
            if (run.gradients[size_t(i)]) {
                grads.items[size_t(i)] = new PyObject;
                --none.references;
            }
            run.rows[size_t(i)].first = 0;
        }
        bucket.held = view.ready = 1;
    }
    view.busy = 1;
    require(clr_step(&view, scalars, WIDTH, 1, threads, 1) == 2, "two at once", kernel, dtype);
    require(clr_current(&view) == -2, "a scan within a step", kernel, dtype);
    view.busy = 7;
    require(clr_current(&view) == -6, "a scan within a step of this thread", kernel, dtype);
    view.busy = 0;
    clr::release(bucket);

    Run still;
    for (int64_t i = 0; i < TENSORS; ++i) {
        const clr::Row& row = run.rows[size_t(i)];
        const size_t size = SIZES[dtype] * size_t(row.numel);
        if (!run.gradients[size_t(i)]) {
            still.keep(row.param, size);
            continue;
        }
        run.keep(row.param, size);
        for (int k = 0; k < slots_of(kernel); ++k) run.keep(row.state[k], size);
        if (counts) run.keep(row.counter, wide ? 8 : 4);
        if (has_scalar) run.keep(row.scalar, wide ? 8 : 4);
    }
    require(still.result == idle, "a row without a gradient moved", kernel, dtype);
    return run;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2 || !use(argv[1])) {
        std::fprintf(stderr, "name a set of kernels\n");
        return 2;
    }
    overrun = argc > 2;
    int runs = 0;
    for (int64_t kernel = 0; kernel < kernels(); ++kernel)
        for (int64_t dtype = 0; dtype < 4; ++dtype)
            for (int wide = 0; wide < (kernel < 2 ? 1 : 2); ++wide) {
                const Run one = run(kernel, dtype, 1, wide), more = run(kernel, dtype, 3, wide);
                require(!one.result.empty(), "nothing done", kernel, dtype);
                require(one.result == more.result, "other bits on threads", kernel, dtype);
                runs += 2;
            }
    for (const int64_t kernel : {int64_t(-1), kernels()}) {
        clr::Bucket bucket = {nullptr, nullptr, nullptr, 0, 0, kernel, 0, 0, 0, 0};
        clr::View view = {};
        view.buckets = &bucket, view.count = 1;
        require(clr_step(&view, nullptr, 0, 1, 1, 1) == 1, "an unknown kernel", kernel, 0);
    }
    std::printf("%d runs\n", runs);
}
