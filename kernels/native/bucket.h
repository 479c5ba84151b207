// A bucket: tensors that one kernel updates, a row for each, with references to what they came from.
#pragma once

#include <cstdint>
#include <vector>

#include "multi_tensor.h"
#include "torch.h"

namespace clr {

// The fields of Row by name, for Python and the GPU's kernels; null after the last.
inline const char* const ROW_COLUMNS[] = {"param",   "state0", "state1", "state2", "state3", "state4",
                                          "counter", "scalar", "numel",  "group",  "first",  nullptr};
static_assert(sizeof(Row) == 8 * (sizeof ROW_COLUMNS / sizeof *ROW_COLUMNS - 1),
              "a field of Row has no name, or other than 8 bytes");

class Bucket : public Rows {
public:
    // ---- what all rows have in common
    int64_t device_type = 0, device_id = 0;     // as DLPack names them
    bool divides = false;                       // whether the parameters are DTensors
    Words words;
    std::vector<Ref> keys;  // names in the dictionaries: state slots, step counter, scalar state

    // ---- one per row
    std::vector<Ref> params;
    std::vector<Ref> dicts;    // optimizer.state[p]; empty if the rule keeps no state
    std::vector<Ref> tensors;  // the tensors in these, keys.size() per row
    std::vector<Ref> specs;    // of DTensors: how the parameter and each slot are divided
    std::vector<Ref> grads;    // the gradients, kept alive from a scan to the end of the step
    std::vector<size_t> begins;  // where the row's layout begins
    std::vector<int64_t> layout;  // number of dimensions, sizes, strides; one after the other

    // Whether the next step may move averages, so that a scan must look at them.
    bool reads_averages = false;
    // How many rows have a gradient, and the numbers of values in these and in the others. Written by
    // a scan.
    int64_t active = 0, values = 0, idle_values = 0;
    int64_t groups = 0;  // a number above those of the rows' groups
    bool holds = false;  // whether `grads` holds gradients
    int64_t edition = 0;  // how often rows were added or changed

    size_t width() const { return keys.size(); }
    // How many of the keys are state slots, rest and average included.
    int64_t slots() const { return int64_t(slot_dtypes.size()); }
    // The dtype of a slot, or of the parameter (-1).
    int64_t dtype_of(int64_t slot) const { return slot < 0 ? dtype : slot_dtypes[size_t(slot)]; }
    bool is_average(int64_t slot) const { return averages() && slot == average_slot; }
    // The number that DLPack has for the kind of a dtype.
    static int64_t code(int64_t dtype) { return dtype == BFLOAT16 ? 4 : 2; }
    PyObject* tensor(int64_t i, size_t k) const { return tensors[size_t(i) * width() + k].get(); }
    const int64_t* layout_of(int64_t i) const { return layout.data() + begins[size_t(i)]; }

    // Adds a row, or replaces row i of the same number of dimensions and elements. Returns false with
    // an exception set if a tensor cannot be read.
    bool put(int64_t i, PyObject* param, PyObject* entry, PyObject* tensors_of, int64_t group,
             bool first, PyObject* grad);

    // Returns whether row i has this number of dimensions and elements.
    bool fits(int64_t i, PyObject* param) const {
        const Ref part = local_part(param, divides);
        DLTensor t;
        if (!part || !view(part.get(), t)) return false;
        return t.ndim == *layout_of(i) && elements(t) == rows[size_t(i)].numel;
    }

    // Lets go of the gradients. May run Python code: finalizers.
    void release() {
        if (!holds) return;
        holds = false;
        // During the step they have left the caches. Fetch all of them before waiting for the first.
        for (const Ref& grad : grads) __builtin_prefetch(grad.get(), 1);
        for (Ref& grad : grads) grad = Ref();
    }

    int visit(visitproc visit, void* arg) const {
        for (const auto* list : {&params, &dicts, &tensors, &specs, &grads})
            for (const Ref& each : *list) Py_VISIT(each.get());
        return 0;
    }

    void clear() {
        const auto old_params = std::exchange(params, {}), old_dicts = std::exchange(dicts, {}),
                   old_tensors = std::exchange(tensors, {}), old_specs = std::exchange(specs, {}),
                   old_grads = std::exchange(grads, {});
        rows.clear(), gradients.clear(), begins.clear(), layout.clear();
        holds = false, ++edition;
    }

    static int64_t elements(const DLTensor& t) {
        int64_t count = 1;
        for (int d = 0; d < t.ndim; ++d) count *= t.shape[d];
        return count;
    }
};

inline bool Bucket::put(int64_t i, PyObject* param, PyObject* entry, PyObject* tensors_of,
                        int64_t group, bool first, PyObject* grad) {
    Row row = {};
    row.group = group, row.first = first;
    DLTensor t;
    const Ref part = local_part(param, divides);
    if (!part || !view(part.get(), t)) return false;
    row.param = t.data, row.numel = elements(t);
    std::vector<int64_t> of_row = {t.ndim};
    of_row.insert(of_row.end(), t.shape, t.shape + t.ndim);
    of_row.insert(of_row.end(), t.strides, t.strides + t.ndim);

    const Items given(tensors_of);
    if (given.size() != Py_ssize_t(width())) {
        PyErr_SetString(PyExc_ValueError, "a row has a tensor for each key");
        return false;
    }
    for (size_t k = 0; k < width(); ++k) {
        const bool is_slot = int64_t(k) < slots();
        const Ref state = local_part(given.get(Py_ssize_t(k)), divides && is_slot);
        if (!state || !view(state.get(), t)) return false;
        (is_slot ? row.state[k] : int64_t(k) == slots() ? row.counter : row.scalar) = t.data;
    }
    const void* gradient = nullptr;
    if (grad != Py_None) {
        const Ref of_grad = local_part(grad, divides);
        if (!of_grad || !view(of_grad.get(), t)) return false;
        gradient = row.numel ? t.data : NO_DATA;
    }
    std::vector<Ref> divisions;
    for (size_t k = 0; divides && k <= size_t(slots()); ++k) {
        PyObject* const of = k ? given.get(Py_ssize_t(k) - 1) : param;
        divisions.emplace_back(PyObject_GetAttr(of, names().spec.get()));
        if (!divisions.back()) return false;
    }

    const size_t at = size_t(i);
    const auto set = [](std::vector<Ref>& list, size_t place, PyObject* object) {
        if (place == list.size()) list.emplace_back();
        list[place] = Ref::to(object);
    };
    if (at == rows.size()) {
        rows.emplace_back(), gradients.emplace_back(), begins.push_back(layout.size());
        layout.resize(layout.size() + of_row.size());
    }
    rows[at] = row, gradients[at] = gradient;
    groups = std::max(groups, group + 1);
    for (size_t n = 0; n < of_row.size(); ++n) layout[begins[at] + n] = of_row[n];
    set(params, at, param);
    if (width()) set(dicts, at, entry);
    for (size_t k = 0; k < width(); ++k)
        set(tensors, at * width() + k, given.get(Py_ssize_t(k)));
    for (size_t k = 0; k < divisions.size(); ++k)
        set(specs, at * divisions.size() + k, divisions[k].get());
    set(grads, at, grad);
    holds = true, ++edition;
    return true;
}

}  // namespace clr
