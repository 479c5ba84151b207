// The Python class Launches. module.pyi describes its methods.
#pragma once

#include <cstring>

#include "bucket_class.h"
#include "launches.h"

namespace clr {

using LaunchesObject = Object<Launches>;

// The class of Launches objects.
inline PyTypeObject* launches_type = nullptr;

// Reads the arguments of a function by name. `format` is that of PyArg_ParseTupleAndKeywords.
template <class... Targets>
bool read_named(PyObject* args, PyObject* named, const char* format, const char* const* names,
                Targets... targets) {
    return PyArg_ParseTupleAndKeywords(args, named, format, const_cast<char**>(names), targets...);
}

// Reads an object that must be empty, or a tuple: an object, the name of its attribute, perhaps the
// attribute's value.
inline bool read_watch(PyObject* item, std::vector<Watch>& watches) {
    if (!PyTuple_Check(item)) {
        watches.push_back({Ref::to(item), Ref(), Ref()});
        return true;
    }
    PyObject *object, *name, *value = nullptr;
    if (!PyArg_ParseTuple(item, "OU|O", &object, &name, &value)) return false;
    watches.push_back({Ref::to(object), Ref::to(name), Ref::to(value)});
    return true;
}

inline PyObject* new_launches(PyTypeObject* type, PyObject* args, PyObject* named) {
    static const char* const names[] = {"device", "watch", "clips", nullptr};
    PyObject *device, *watch;
    int clips = 0;
    if (!read_named(args, named, "O!O!|$p:Launches", names, &PyLong_Type, &device, &PyList_Type,
                    &watch, &clips))
        return nullptr;
    Ref self(LaunchesObject::make(type));
    if (!self) return nullptr;
    Launches& launches = LaunchesObject::of(self.get());
    launches.device = Ref::to(device);
    launches.clips = clips;
    const Items items(watch);
    for (Py_ssize_t i = 0; i < items.size(); ++i)
        if (!read_watch(items.get(i), launches.watches)) return nullptr;
    return launches.begin() ? self.release() : nullptr;
}

inline PyObject* launches_add_bucket(PyObject* self, PyObject* args, PyObject* named) {
    static const char* const names[] = {"bucket", "table", nullptr};
    Launches& launches = LaunchesObject::of(self);
    PyObject* object;
    unsigned long long table = 0;
    if (!read_named(args, named, "O|$K:add_bucket", names, &object, &table))
        return nullptr;
    const Bucket* const bucket = to_bucket(object);
    if (!bucket || !launches.can_grow()) return nullptr;
    if (launches.find(*bucket)) {
        PyErr_SetString(PyExc_ValueError, "the bucket was added before");
        return nullptr;
    }
    launches.add_table(object, *bucket, table);
    return none();
}

// Reads the bucket whose gradients' addresses are parameters, and where these begin.
inline bool read_addresses(Launches& launches, PyObject* pair, Launch& launch) {
    if (pair == Py_None) return true;
    PyObject* object;
    unsigned long long offset;
    if (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "OK", &object, &offset)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "gradients: a pair, or None");
        return false;
    }
    const Bucket* const bucket = to_bucket(object);
    if (!bucket) return false;
    const AddressTable* const table = launches.find(*bucket);
    const size_t bytes = table ? table->bytes() : 0;
    if (!table || table->content.size() > Launches::MOST_ADDRESSES || offset % 8 ||
        offset > launch.parameters.size() || bytes > launch.parameters.size() - offset) {
        PyErr_SetString(PyExc_ValueError, "gradients: up to eight addresses of a bucket that was "
                                          "added, within the parameters");
        return false;
    }
    launch.takes_addresses = true;
    launch.table = launches.index_of(*table), launch.begin = size_t(offset);
    return true;
}

// Reads where the parameters hold an address; leaves the place alone if there is none.
inline bool read_place(PyObject* offset, const Launch& launch, size_t& place) {
    if (offset == Py_None) return true;
    const size_t found = PyLong_AsSize_t(offset);
    if (PyErr_Occurred()) return false;
    const size_t size = launch.parameters.size();
    if (found % sizeof(void*) || size < sizeof(void*) || found > size - sizeof(void*)) {
        PyErr_SetString(PyExc_ValueError, "a signal's address lies within the parameters");
        return false;
    }
    place = found;
    return true;
}

// Lays out parameters as kernels expect them: each at a multiple of its size.
inline bool lay_out(const std::vector<size_t>& sizes, Launch& launch) {
    size_t end = 0;
    for (const size_t size : sizes) {
        if (size != 1 && size != 2 && size != 4 && size != 8) return false;
        launch.offsets.push_back((end + size - 1) / size * size);
        end = launch.offsets.back() + size;
    }
    return sizes.size() <= Launches::MOST_PARAMETERS && end == launch.parameters.size();
}

// Makes a launch of one row of a bucket of a launch of any: (bucket, the places of the row's number, of
// the address of its gradient and of its blocks per chunk, programs and blocks of each row).
inline bool read_rows(PyObject* given, Launch&& launch, RowLaunch& rows) {
    PyObject *object, *shapes;
    unsigned long long row, gradient, blocks;
    if (!PyArg_ParseTuple(given, "OKKKO!", &object, &row, &gradient, &blocks, &PyTuple_Type, &shapes))
        return false;
    const Bucket* const bucket = to_bucket(object);
    if (!bucket || !read_ints(shapes, rows.shapes)) return false;
    const size_t size = launch.parameters.size();
    if (size < 8 || row > size - 4 || blocks > size - 4 || gradient > size - 8 || gradient % 8 ||
        rows.shapes.size() != 2 * bucket->rows.size()) {
        PyErr_SetString(PyExc_ValueError, "rows: places within the parameters, and two numbers a row");
        return false;
    }
    static_cast<Launch&>(rows) = std::move(launch);
    rows.object = Ref::to(object), rows.bucket = bucket, rows.edition = bucket->edition;
    rows.row = size_t(row), rows.gradient = size_t(gradient), rows.blocks = size_t(blocks);
    return true;
}

inline PyObject* launches_add_launch(PyObject* self, PyObject* args, PyObject* named) {
    static const char* const names[] = {"function", "grid", "threads", "shared", "parameters",
                                        "sizes", "keep", "gradients", "grad_scale",
                                        "found_inf", "rows", nullptr};
    Launches& launches = LaunchesObject::of(self);
    unsigned long long function;
    const char* bytes;
    Py_ssize_t length;
    PyObject *sizes_given, *keep, *pair = Py_None, *grad_scale = Py_None, *found_inf = Py_None;
    PyObject* rows = Py_None;
    Launch launch;
    if (!read_named(args, named, "K(III)IIy#OO|$OOOO:add_launch", names, &function,
                    &launch.grid[0], &launch.grid[1], &launch.grid[2], &launch.threads,
                    &launch.shared, &bytes, &length, &sizes_given, &keep, &pair, &grad_scale,
                    &found_inf, &rows))
        return nullptr;
    std::vector<int64_t> numbers;
    if (!read_ints(sizes_given, numbers) || !launches.can_grow()) return nullptr;
    const std::vector<size_t> sizes(numbers.begin(), numbers.end());
    launch.function = reinterpret_cast<void*>(uintptr_t(function));
    launch.parameters.assign(bytes, bytes + length);
    launch.keep = Ref::to(keep);
    const uint64_t programs =
        uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2] * launch.threads;
    if (!function || !programs || !lay_out(sizes, launch)) {
        PyErr_SetString(PyExc_ValueError, "a launch has a function, programs and parameters of "
                                          "these sizes");
        return nullptr;
    }
    if (!read_addresses(launches, pair, launch) ||
        !read_place(grad_scale, launch, launch.grad_scale) ||
        !read_place(found_inf, launch, launch.found_inf))
        return nullptr;
    if (!launches.fits(launch, sizes)) {
        PyErr_SetString(PyExc_ValueError, "the driver expects other parameters");
        return nullptr;
    }
    if (rows == Py_None) return launches.add(std::move(launch)), none();
    RowLaunch of_rows;
    if (!read_rows(rows, std::move(launch), of_rows)) return nullptr;
    launches.add(std::move(of_rows));
    return none();
}

inline PyObject* launches_addresses(PyObject* self, PyObject* object) {
    const Bucket* const bucket = to_bucket(object);
    if (!bucket) return nullptr;
    const AddressTable* const table = LaunchesObject::of(self).find(*bucket);
    if (!table) return PyErr_SetString(PyExc_ValueError, "the bucket was not added"), nullptr;
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(table->content.data()),
                                     Py_ssize_t(table->bytes()));
}

inline PyObject* launches_run(PyObject* self, PyObject*) {
    Launches& launches = LaunchesObject::of(self);
    if (!launches.is_unobserved() || !launches.is_ready(Signals()))
        return PyErr_Occurred() ? nullptr : Py_NewRef(Py_False);
    return launches.run() ? Py_NewRef(Py_True) : nullptr;
}

inline PyObject* launches_run_row(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    int64_t place, row;
    if (!expects("run_row()", count, 2) || !read(args[0], place) || !read(args[1], row)) return nullptr;
    bool is_served;
    if (!LaunchesObject::of(self).run_row(size_t(place), row, is_served)) return nullptr;
    return PyBool_FromLong(is_served);
}
inline PyObject* launches_can_run(PyObject* self, PyObject*) {
    const Launches& launches = LaunchesObject::of(self);
    const bool can = launches.is_unobserved() && launches.is_on_stream();
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(can);
}

inline PyMethodDef launches_methods[] = {
    {"add_bucket", method<launches_add_bucket>(), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"add_launch", method<launches_add_launch>(), METH_VARARGS | METH_KEYWORDS, nullptr},
    {"addresses", method<launches_addresses>(), METH_O, nullptr},
    {"run", method<launches_run>(), METH_NOARGS, nullptr},
    {"run_row", method<launches_run_row>(), METH_FASTCALL, nullptr},
    {"can_run", method<launches_can_run>(), METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace clr
