// The Python class Bucket. module.pyi describes its methods.
#pragma once

#include "arguments.h"
#include "bucket.h"
#include "objects.h"
#include "sets.h"

namespace clr {

using BucketObject = Object<Bucket>;

// The class of Bucket objects.
inline PyTypeObject* bucket_type = nullptr;

// Returns the bucket of an object; null with an exception set if the object is none.
inline Bucket* to_bucket(PyObject* object) {
    if (Py_TYPE(object) == bucket_type) return &BucketObject::of(object);
    PyErr_SetString(PyExc_TypeError, "expected a Bucket");
    return nullptr;
}

inline PyObject* new_bucket(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *keys, *slot_dtypes, *sizes, *device, *words;
    long long kernel, dtype;
    int masters, divides;
    if (!PyArg_ParseTuple(args, "LLO!O!pO!O!pO!", &kernel, &dtype, &PyTuple_Type, &keys,
                          &PyTuple_Type, &slot_dtypes, &masters, &PyTuple_Type, &sizes,
                          &PyTuple_Type, &device, &divides, &PyTuple_Type, &words))
        return nullptr;
    std::vector<int64_t> dtypes, bytes, place;
    if (!read_ints(slot_dtypes, dtypes) || !read_ints(sizes, bytes) || !read_ints(device, place))
        return nullptr;
    const int64_t format = masters ? MASTERS : dtype, of_rule = masters ? FLOAT32 : dtype;
    const Kernel found = kernels->kernel(kernel, format);
    const int64_t slots = int64_t(dtypes.size()), extras = slots - found.slots - masters;
    if (!found.update || bytes.size() != 2 || place.size() != 2 || extras < 0 || extras > 1 ||
        (found.factor && PyTuple_Size(keys) != slots + 2) || PyTuple_Size(keys) < slots || PyTuple_Size(keys) > slots + 2) {
        PyErr_SetString(PyExc_ValueError, "no kernel has this number, dtype or state");
        return nullptr;
    }
    bool fits = !masters || dtype == BFLOAT16;
    for (int k = 0; k < found.slots; ++k) fits = fits && dtypes[size_t(k)] == of_rule;
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "no kernel has state of these dtypes");
        return nullptr;
    }
    Ref self(BucketObject::make(type));
    if (!self) return nullptr;
    Bucket& bucket = BucketObject::of(self.get());
    bucket.kernel = kernel, bucket.dtype = dtype, bucket.divides = divides;
    bucket.slot_dtypes = dtypes, bucket.masters = masters;
    if (extras) bucket.average_slot = slots - 1;
    bucket.counter_bits = 8 * bytes[0], bucket.scalar_bits = 8 * bytes[1];
    bucket.device_type = place[0], bucket.device_id = place[1];
    Words& w = bucket.words;
    const Items four(words);
    w.impl = PyLong_AsLongLong(four.get(0)), w.storage = PyLong_AsLongLong(four.get(1));
    w.key_set = PyLong_AsLongLong(four.get(2)), w.negative = PyLong_AsUnsignedLongLong(four.get(3));
    if (PyErr_Occurred()) return nullptr;
    for (Py_ssize_t k = 0; k < PyTuple_Size(keys); ++k)
        bucket.keys.push_back(Ref::to(PyTuple_GetItem(keys, k)));
    return self.release();
}

inline bool put(Bucket& bucket, int64_t i, PyObject* const* args) {
    int64_t group, first;
    return read(args[3], group) && read(args[4], first) &&
           bucket.put(i, args[0], args[1], args[2], group, first, args[5]);
}

inline PyObject* bucket_append(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Bucket& bucket = BucketObject::of(self);
    if (!expects("append()", count, 6) || !put(bucket, bucket.count(), args)) return nullptr;
    return none();
}

// Reads the number of a row.
inline bool read_row(const Bucket& bucket, PyObject* object, int64_t& i) {
    if (!read(object, i)) return false;
    if (0 <= i && i < bucket.count()) return true;
    PyErr_SetString(PyExc_IndexError, "no row has this number");
    return false;
}

inline PyObject* bucket_replace(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Bucket& bucket = BucketObject::of(self);
    int64_t i;
    if (!expects("replace()", count, 7) || !read_row(bucket, args[0], i)) return nullptr;
    if (!bucket.fits(i, args[1])) return PyErr_Occurred() ? nullptr : Py_NewRef(Py_False);
    if (!put(bucket, i, args + 1)) return nullptr;
    return Py_NewRef(Py_True);
}

inline PyObject* bucket_note_filled(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Bucket& bucket = BucketObject::of(self);
    int64_t i;
    if (!expects("note_filled()", count, 2) || !read_row(bucket, args[0], i)) return nullptr;
    bucket.rows[size_t(i)].first = 0, ++bucket.edition;
    if (bucket.width()) bucket.dicts[size_t(i)] = Ref::to(args[1]);
    return none();
}

inline PyObject* bucket_entries(PyObject* self, PyObject*) {
    const NoCollection no_collection;  // a finalizer may take a step, which adds rows
    return list_of(BucketObject::of(self).dicts, [](const Ref& each) { return Py_NewRef(each.get()); });
}
inline PyObject* bucket_rows(PyObject* self, PyObject*) { return bytes_of(BucketObject::of(self).rows); }
inline PyObject* bucket_gradients(PyObject* self, PyObject*) {
    return bytes_of(BucketObject::of(self).gradients);
}
inline PyObject* bucket_looks_ahead(PyObject* self, void*) {
    return PyBool_FromLong(BucketObject::of(self).words.storage != 0);
}

inline PyMethodDef bucket_methods[] = {
    {"append", method<bucket_append>(), METH_FASTCALL, nullptr},
    {"replace", method<bucket_replace>(), METH_FASTCALL, nullptr},
    {"note_filled", method<bucket_note_filled>(), METH_FASTCALL, nullptr},
    {"entries", method<bucket_entries>(), METH_NOARGS, nullptr},
    {"rows", method<bucket_rows>(), METH_NOARGS, nullptr},
    {"gradients", method<bucket_gradients>(), METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
inline PyGetSetDef bucket_attributes[] = {
    {"looks_ahead", bucket_looks_ahead, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace clr
