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

// An entry of a group that must be this object, as the bounds of the rate.
struct Entry { Ref key, object; };

// A setting of a group that follows a schedule: a number, or members of a tuple.
struct Setting {
    Ref key;                          // its name in the group
    Ref object;                       // the float or the tuple that the group holds
    std::vector<int64_t> members;     // places in the tuple; empty for a number
    std::vector<int64_t> columns;     // of the kernels' scalars, one per number; negative: none
    int64_t place = -1;               // among the group's settings that a scan compares, or -1

    size_t count() const { return columns.size(); }  // of its numbers
};

// One group, and the objects that we put there.
struct Record {
    Ref group;  // its dictionary
    Ref lr;     // a float, or the user's tensor
    std::vector<Entry> entries;
    std::vector<Setting> settings;
    size_t first = 0;    // where the numbers of its settings begin in a row of them
    double rate = 0;     // the number of `lr`
    bool fills = false;  // whether `lr` is a tensor
};

class Course {
public:
    std::vector<Record> records;
    // Rows of values: of the present position, then of the positions after it. A row has the rate of
    // each group, or the numbers of all settings of all groups.
    std::vector<std::vector<double>> rates, numbers;
    // For each step from a row to the next one: the weight of the average for each group; or nothing, if
    // no average falls due.
    std::vector<std::vector<double>> averages;
    std::vector<bool> ends;  // whether the step from a row to the next one completes a cycle
    int64_t position = 0;    // of the present row
    size_t row = 0;
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

    // Returns how many numbers the settings of all records have.
    size_t width() const {
        size_t count = 0;
        for (const Record& record : records)
            for (const Setting& setting : record.settings) count += setting.count();
        return count;
    }
    void add(Record&& record) {
        record.first = width();
        records.push_back(std::move(record));
    }

    // Begins at a position, whose values are the first row.
    bool begin(PyObject* number) {
        position = PyLong_AsLongLong(number);
        if (position == -1 && PyErr_Occurred()) return false;
        number_ = Ref::to(number), row = 0;
        for (size_t i = 0; i < records.size(); ++i) records[i].rate = rates[0][i];
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
                !holds(group, torch().position_key, number_))
                return false;
            for (const Entry& entry : record.entries)
                if (!holds(group, entry.key, entry.object)) return false;
            for (const Setting& setting : record.settings)
                if (!holds(group, setting.key, setting.object)) return false;
            PyObject* const capturable = PyDict_GetItemWithError(group, names().capturable.get());
            if (capturable && capturable != Py_False && capturable != Py_None) return false;
            DLTensor t;
            if (record.fills && (!reads(record, t) || value_of(t) != record.rate)) return false;
        }
        return true;
    }

    // The weights of the averages in the next step; none if no average falls due.
    const std::vector<double>& weights() const {
        static const std::vector<double> none;
        return row < averages.size() ? averages[row] : none;
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
            const double* number = is_whole ? numbers_of(row + 1, records[i]) : nullptr;
            for (const Setting& setting : records[i].settings) {
                if (!is_whole) break;
                next_[i].settings.push_back(made(setting, number));
                is_whole = bool(next_[i].settings.back());
                number += setting.count();
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
            for (size_t k = 0; k < record.settings.size(); ++k) {
                Setting& setting = record.settings[k];
                setting.object = std::move(next_[i].settings[k]);
                put(group, setting.key, setting.object);
            }
        }
        number_ = std::move(next_number_);
    }

    int visit(visitproc visit, void* arg) const {
        for (const Record& record : records) {
            Py_VISIT(record.group.get());
            Py_VISIT(record.lr.get());
            for (const Entry& entry : record.entries) Py_VISIT(entry.object.get());
            for (const Setting& setting : record.settings) Py_VISIT(setting.object.get());
        }
        Py_VISIT(number_.get());
        return 0;
    }

    PyObject* number() const { return number_.get(); }
    // The numbers of a record's settings in a row.
    const double* numbers_of(size_t row, const Record& record) const {
        return numbers.empty() ? nullptr : numbers[row].data() + record.first;
    }

private:
    static bool holds(PyObject* group, const Ref& key, const Ref& object) {
        return object.is(PyDict_GetItemWithError(group, key.get()));
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
    // Returns a setting's object with other numbers: a float, or a tuple with other members.
    static Ref made(const Setting& setting, const double* number) {
        if (setting.members.empty()) return Ref(PyFloat_FromDouble(*number));
        PyObject* const before = setting.object.get();
        Ref tuple(PyTuple_New(PyTuple_Size(before)));
        for (Py_ssize_t k = 0; tuple && k < PyTuple_Size(before); ++k)
            PyTuple_SetItem(tuple.get(), k, Py_NewRef(PyTuple_GetItem(before, k)));
        for (size_t k = 0; tuple && k < setting.members.size(); ++k) {
            PyObject* const made = PyFloat_FromDouble(number[k]);
            if (!made) return Ref();
            PyTuple_SetItem(tuple.get(), Py_ssize_t(setting.members[k]), made);
        }
        return tuple;
    }
    // Replaces the value of a key, or adds one that other code has taken away.
    static void put(PyObject* group, const Ref& key, const Ref& value) {
        if (PyDict_SetItem(group, key.get(), value.get())) PyErr_Clear();
    }

    // The objects that a group gets in the next step.
    struct Next {
        Ref lr;
        std::vector<Ref> settings;
    };

    Ref number_;  // the object that the groups hold as their position
    Ref next_number_;
    std::vector<Next> next_;
};

}  // namespace clr
