// The functions of CPython's C API that the scan calls, declared here so that no header is needed.
//
// They are found in the running interpreter. Every call needs the GIL.
#pragma once

#include <cstddef>

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

// A reference that is given back at the end of the scope.
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

// A list or a tuple.
class Items {
public:
    explicit Items(PyObject* object) : object_(object), size_(PyList_Size(object)) {
        if (size_ >= 0) return;
        PyErr_Clear();
        is_tuple_ = true;
        size_ = PyTuple_Size(object);
    }
    ptrdiff_t size() const { return size_; }  // -1 for any other object
    PyObject* get(ptrdiff_t i) const {
        return is_tuple_ ? PyTuple_GetItem(object_, i) : PyList_GetItem(object_, i);
    }

private:
    PyObject* object_;
    bool is_tuple_ = false;
    ptrdiff_t size_;
};

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
    void* state_;
};

}  // namespace clr
