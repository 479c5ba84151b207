// The course: records of the parameter groups, and the values that the coming steps write there.
//
// Python evaluates the schedule for a number of steps ahead. As long as other code leaves the groups
// alone, each step takes its rates from here, and writes the rates of the next step into the groups.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "torch.h"

namespace clr {

// One group, and the objects that we put there.
struct Record {
    Ref group;      // its dictionary
    Ref lr;         // a float, or the user's tensor
    Ref base, top;  // the bounds of the rate
    Ref momentum;   // a float, or the tuple of betas; null if momentum does not cycle
    Ref low, high;  // the bounds of the momentum
    double rate = 0, beta = 0;  // the numbers of `lr` and `momentum`
    bool fills = false;         // whether `lr` is a tensor
};

class Course {
public:
    std::vector<Record> records;
    // Rows of values: of the present position, then of the positions after it.
    std::vector<std::vector<double>> rates, momenta;
    std::vector<bool> ends;  // whether the step from a row to the next one completes a cycle
    int64_t position = 0;    // of the present row
    size_t row = 0;
    // Columns of the kernels' scalars and of each group's settings that hold the momentum, or -1.
    int64_t column = -1;
    std::vector<Py_ssize_t> places;
    Words words;

    Course() = default;
    Course(Course&&) = default;
    Course& operator=(Course&&) = default;

    bool is_over() const { return row + 1 >= rates.size(); }
    bool has_tensors() const {
        return std::any_of(records.begin(), records.end(),
                           [](const Record& record) { return record.fills; });
    }
    // The old objects go last, since a finalizer may run any code.
    void end() { const Course old = std::exchange(*this, Course()); }

    // Takes in a group's record from Python: (group, lr, base, top, momentum, low, high).
    bool add(PyObject* tuple) {
        PyObject *group, *lr, *base, *top, *momentum, *low, *high;
        if (!PyArg_ParseTuple(tuple, "O!OOOOOO", &PyDict_Type, &group, &lr, &base, &top, &momentum,
                              &low, &high))
            return false;
        Record record;
        record.group = Ref::to(group), record.lr = Ref::to(lr);
        record.base = Ref::to(base), record.top = Ref::to(top);
        if (momentum != Py_None) record.momentum = Ref::to(momentum);
        record.low = Ref::to(low), record.high = Ref::to(high);
        record.fills = !PyFloat_CheckExact(lr);
        records.push_back(std::move(record));
        return true;
    }

    // Begins at a position, whose values are the first row.
    bool begin(PyObject* number) {
        position = PyLong_AsLongLong(number);
        if (position == -1 && PyErr_Occurred()) return false;
        number_ = Ref::to(number), row = 0;
        for (size_t i = 0; i < records.size(); ++i) {
            records[i].rate = rates[0][i];
            if (records[i].momentum) records[i].beta = momenta[0][i];
        }
        return true;
    }

    // Returns whether these groups certainly hold what we wrote.
    bool is_untouched(PyObject* groups) const {
        const Items items(groups);
        if (items.size() != Py_ssize_t(records.size())) return false;
        for (size_t i = 0; i < records.size(); ++i) {
            const Record& record = records[i];
            PyObject* const group = record.group.get();
            if (items.get(Py_ssize_t(i)) != group || !holds(group, names().lr, record.lr) ||
                !holds(group, torch().position_key, number_) || !holds(group, torch().base_key, record.base) ||
                !holds(group, torch().top_key, record.top))
                return false;
            PyObject* const capturable = PyDict_GetItemWithError(group, names().capturable.get());
            if (capturable && capturable != Py_False && capturable != Py_None) return false;
            if (record.momentum &&
                (!holds(group, has_betas(group) ? names().betas : names().momentum,
                        record.momentum) ||
                 !holds(group, torch().low_key, record.low) || !holds(group, torch().high_key, record.high)))
                return false;
            DLTensor t;
            if (record.fills && (!reads(record, t) || value_of(t) != record.rate)) return false;
        }
        return true;
    }

    // Makes the objects of the next step, so that write() cannot fail. Returns false with an exception
    // set if memory has run out.
    bool prepare() {
        next_.clear();
        next_.resize(records.size());
        next_number_ = Ref(PyLong_FromLongLong(position + 1));
        bool is_whole = bool(next_number_);
        for (size_t i = 0; is_whole && i < records.size(); ++i) {
            if (!records[i].fills) {
                next_[i].lr = Ref(PyFloat_FromDouble(rates[row + 1][i]));
                is_whole = bool(next_[i].lr);
            }
            if (is_whole && records[i].momentum) {
                next_[i].momentum = momentum_of(records[i], momenta[row + 1][i]);
                is_whole = bool(next_[i].momentum);
            }
        }
        return is_whole;
    }

    // Writes the values of the next step into the groups. Other code's values are overwritten.
    void write() {
        ++row, ++position;
        for (size_t i = 0; i < records.size(); ++i) {
            Record& record = records[i];
            PyObject* const group = record.group.get();
            record.rate = rates[row][i];
            DLTensor t;
            if (!record.fills) record.lr = std::move(next_[i].lr);
            else if (reads(record, t)) record.rate = fill(t, record.rate);
            put(group, names().lr, record.lr);
            put(group, torch().position_key, next_number_);
            if (record.momentum) {
                record.momentum = std::move(next_[i].momentum), record.beta = momenta[row][i];
                put(group, has_betas(group) ? names().betas : names().momentum, record.momentum);
            }
        }
        number_ = std::move(next_number_);
    }

    int visit(visitproc visit, void* arg) const {
        for (const Record& record : records)
            for (const Ref* each : {&record.group, &record.lr, &record.base, &record.top,
                                    &record.momentum, &record.low, &record.high})
                Py_VISIT(each->get());
        Py_VISIT(number_.get());
        return 0;
    }

    PyObject* number() const { return number_.get(); }

private:
    static bool holds(PyObject* group, const Ref& key, const Ref& object) {
        return object.is(PyDict_GetItemWithError(group, key.get()));
    }
    static bool has_betas(PyObject* group) {
        PyObject* const betas = PyDict_GetItemWithError(group, names().betas.get());
        return betas && betas != Py_None;
    }
    // Reads a rate on the CPU, float32 or float64, of one element. No lazy negation, which DLPack
    // does not tell: if the place of its bit is unknown, the general way serves tensors.
    bool reads(const Record& record, DLTensor& t) const {
        if (!view(record.lr.get(), t)) return PyErr_Clear(), false;
        if (!words.negative || is_negated(words, record.lr.get())) return false;
        for (int d = 0; d < t.ndim; ++d)
            if (t.shape[d] != 1) return false;
        return t.device_type == ON_CPU && (is_float(t, 32) || is_float(t, 64));
    }
    static double value_of(const DLTensor& t) {
        return t.bits == 32 ? double(*static_cast<const float*>(t.data))
                            : *static_cast<const double*>(t.data);
    }
    // Writes at most the largest number of the tensor's dtype; returns what the tensor holds.
    static double fill(const DLTensor& t, double value) {
        if (t.bits == 64) return *static_cast<double*>(t.data) = value;
        const double largest = double(std::numeric_limits<float>::max());
        return *static_cast<float*>(t.data) = float(std::max(-largest, std::min(value, largest)));
    }
    // Returns the object that holds a momentum: a float, or a tuple of betas like the record's.
    static Ref momentum_of(const Record& record, double value) {
        Ref number(PyFloat_FromDouble(value));
        PyObject* const before = record.momentum.get();
        if (!number || !PyTuple_Check(before)) return number;
        Ref betas(PyTuple_New(PyTuple_Size(before)));
        if (!betas) return betas;
        PyTuple_SetItem(betas.get(), 0, number.release());
        for (Py_ssize_t k = 1; k < PyTuple_Size(before); ++k)
            PyTuple_SetItem(betas.get(), k, Py_NewRef(PyTuple_GetItem(before, k)));
        return betas;
    }
    // Replaces the value of a key, or adds one that other code has taken away.
    static void put(PyObject* group, const Ref& key, const Ref& value) {
        if (PyDict_SetItem(group, key.get(), value.get())) PyErr_Clear();
    }

    // The objects that a group gets in the next step.
    struct Next { Ref lr, momentum; };

    Ref number_;  // the object that the groups hold as their position
    Ref next_number_;
    std::vector<Next> next_;
};

}  // namespace clr
