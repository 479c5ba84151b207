// What the functions of the extension share: reading arguments, making results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "python.h"

namespace clr {

inline PyObject* none() { return Py_NewRef(Py_None); }

inline bool expects(const char* what, Py_ssize_t count, Py_ssize_t expected) {
    if (count == expected) return true;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", what, expected, count);
    return false;
}

inline bool read(PyObject* object, int64_t& number) {
    number = PyLong_AsLongLong(object);
    return number != -1 || !PyErr_Occurred();
}

// Reads a sequence of numbers.
template <class Number, class Read>
inline bool read_all(PyObject* object, std::vector<Number>& numbers, const Read& read) {
    const Items items(object);
    if (items.size() < 0) {
        PyErr_SetString(PyExc_TypeError, "expected a list or a tuple of numbers");
        return false;
    }
    numbers.clear();
    for (Py_ssize_t i = 0; i < items.size(); ++i) {
        numbers.push_back(Number(read(items.get(i))));
        if (PyErr_Occurred()) return false;
    }
    return true;
}
inline bool read_floats(PyObject* object, std::vector<double>& numbers) {
    return read_all(object, numbers, PyFloat_AsDouble);
}
inline bool read_ints(PyObject* object, std::vector<int64_t>& numbers) {
    return read_all(object, numbers, PyLong_AsLongLong);
}
inline bool read_rows(PyObject* object, std::vector<std::vector<double>>& rows) {
    const Items items(object);
    if (items.size() < 0) {
        PyErr_SetString(PyExc_TypeError, "expected a list or a tuple of rows");
        return false;
    }
    rows.assign(size_t(items.size()), {});
    for (Py_ssize_t i = 0; i < items.size(); ++i)
        if (!read_floats(items.get(i), rows[size_t(i)])) return false;
    return true;
}

template <class Item> PyObject* bytes_of(const std::vector<Item>& items) {
    return PyByteArray_FromStringAndSize(reinterpret_cast<const char*>(items.data()),
                                         Py_ssize_t(items.size() * sizeof(Item)));
}

// Returns a list of function(item) of each item; the function returns new references.
template <class List, class Function>
inline PyObject* list_of(const List& items, const Function& function) {
    Ref list(PyList_New(Py_ssize_t(items.size())));
    for (size_t i = 0; list && i < items.size(); ++i) {
        PyObject* const object = function(items[i]);
        if (!object || PyList_SetItem(list.get(), Py_ssize_t(i), object)) return nullptr;
    }
    return list.release();
}

// Returns a tuple of the names, up to the first that is null.
template <class Name> PyObject* tuple_of(const Name& name) {
    Ref list(PyList_New(0));
    for (Py_ssize_t i = 0; list && name(i); ++i) {
        const Ref text(PyUnicode_FromString(name(i)));
        if (!text || PyList_Append(list.get(), text.get())) return nullptr;
    }
    return list ? PyList_AsTuple(list.get()) : nullptr;
}

}  // namespace clr
