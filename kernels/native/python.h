// References to Python's objects, and the global interpreter lock (GIL). Every function needs the GIL.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <utility>

namespace clr {

// A reference that is given back when the Ref ends. May hold null.
class Ref {
public:
    Ref() = default;
    static Ref to(PyObject* borrowed) { return Ref(Py_XNewRef(borrowed)); }
    // Takes over a new reference, which most functions of the C API return.
    explicit Ref(PyObject* owned) : object_(owned) {}
    Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Ref& operator=(Ref&& other) noexcept {
        Ref old(std::exchange(object_, std::exchange(other.object_, nullptr)));
        return *this;
    }
    ~Ref() { Py_XDECREF(object_); }

    PyObject* get() const { return object_; }
    explicit operator bool() const { return object_; }
    PyObject* release() { return std::exchange(object_, nullptr); }
    // Whether both are the same object.
    bool is(PyObject* other) const { return object_ == other; }

private:
    PyObject* object_ = nullptr;
};

inline PyObject* type_of(PyObject* object) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object));
}

// A list or a tuple.
class Items {
public:
    explicit Items(PyObject* object)
        : object_(object), is_tuple_(PyTuple_Check(object)),
          size_(is_tuple_               ? PyTuple_Size(object)
                : PyList_Check(object) ? PyList_Size(object)
                                       : -1) {}
    Py_ssize_t size() const { return size_; }  // -1 for any other object
    // Borrowed.
    PyObject* get(Py_ssize_t i) const {
        return is_tuple_ ? PyTuple_GetItem(object_, i) : PyList_GetItem(object_, i);
    }

private:
    PyObject* object_;
    bool is_tuple_;
    Py_ssize_t size_;
};

// Clears an exception of Python code that was asked for an answer. Returns false for Ctrl-C and its
// like, which stay set.
inline bool clear_exception() {
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception)) return false;
    PyErr_Clear();
    return true;
}

// Keeps the garbage collector off: finalizers may run any Python code.
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

// Gives the GIL away during a long computation. A short one keeps the GIL, since a thread that
// gives it away may wait for milliseconds to get it back.
class WithoutGil {
public:
    explicit WithoutGil(bool is_long) : state_(is_long ? PyEval_SaveThread() : nullptr) {}
    WithoutGil(const WithoutGil&) = delete;
    ~WithoutGil() {
        if (state_) PyEval_RestoreThread(state_);
    }

private:
    PyThreadState* state_;
};

}  // namespace clr
