// Python classes around C++ objects: making, ending, and the garbage collector's visits.
#pragma once

#include <new>

#include "python.h"

namespace clr {

// An object of a Python class that holds a Body. The Body has visit() and clear().
template <class Body> struct Object {
    PyObject_HEAD
    Body body;

    static Body& of(PyObject* self) { return reinterpret_cast<Object*>(self)->body; }

    static PyObject* make(PyTypeObject* type) {
        const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
        PyObject* const self = allocate(type, 0);
        if (self) new (&of(self)) Body;
        return self;
    }
    static int visit(PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(type_of(self));
        return of(self).visit(visit, arg);
    }
    static int clear(PyObject* self) {
        of(self).clear();
        return 0;
    }
    static void end(PyObject* self) {
        PyTypeObject* const type = Py_TYPE(self);
        PyObject_GC_UnTrack(self);
        of(self).clear();
        of(self).~Body();
        reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
        Py_DECREF(reinterpret_cast<PyObject*>(type));
    }
};

// A function that Python calls: no exception of C++ may reach Python.
template <auto Function> struct Guarded;
template <class... Arguments, PyObject* (*Function)(Arguments...)> struct Guarded<Function> {
    static PyObject* call(Arguments... arguments) {
        try {
            return Function(arguments...);
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        }
    }
};

// Returns a guarded function as the type that PyMethodDef holds.
template <auto Function> PyCFunction method() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(Guarded<Function>::call));
}

// For a class without methods, or without attributes: a slot must not be null.
inline PyMethodDef no_methods[] = {{nullptr, nullptr, 0, nullptr}};
inline PyGetSetDef no_attributes[] = {{nullptr, nullptr, nullptr, nullptr, nullptr}};

template <class Body>
PyObject* make_class(PyObject* module, const char* name, newfunc make, PyMethodDef* methods,
                    PyGetSetDef* attributes, ternaryfunc call = nullptr) {
    using Self = Object<Body>;
    PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                           {Py_tp_dealloc, reinterpret_cast<void*>(Self::end)},
                           {Py_tp_traverse, reinterpret_cast<void*>(Self::visit)},
                           {Py_tp_clear, reinterpret_cast<void*>(Self::clear)},
                           {Py_tp_methods, methods},
                           {Py_tp_getset, attributes},
                           {call ? Py_tp_call : 0, reinterpret_cast<void*>(call)},
                           {0, nullptr}};
    PyType_Spec spec = {name, int(sizeof(Self)), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, slots};
    return PyType_FromModuleAndSpec(module, &spec, nullptr);
}

}  // namespace clr
