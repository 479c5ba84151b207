// The Python class Plan. module.pyi describes its methods.
#pragma once

#include "bucket_class.h"
#include "launches_class.h"
#include "plan.h"

namespace clr {

using PlanObject = Object<Plan>;

// The class of Plan objects.
inline PyTypeObject* plan_type = nullptr;

inline PyObject* new_plan(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *optimizer, *own_step;
    int needs_launches;
    if (!PyArg_ParseTuple(args, "OOp", &optimizer, &own_step, &needs_launches)) return nullptr;
    PyObject* const self = PlanObject::make(type);
    if (!self) return nullptr;
    Plan& plan = PlanObject::of(self);
    plan.optimizer = Ref::to(optimizer), plan.own_step = Ref::to(own_step);
    plan.needs_launches = needs_launches;
    return self;
}

// Refuses a change of the plan within a step or a scan.
inline bool is_free(const Plan& plan) {
    if (!plan.busy) return true;
    PyErr_SetString(PyExc_RuntimeError, "a plan cannot change within a step");
    return false;
}

inline PyObject* plan_set_sources(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Plan& plan = PlanObject::of(self);
    if (!expects("set_sources()", count, 7) || !is_free(plan)) return nullptr;
    if (Items(args[0]).size() < 0 || !PyDict_Check(args[4]) || !PyDict_Check(args[5])) {
        PyErr_SetString(PyExc_TypeError, "groups must be a list or a tuple, state and dicts a dict");
        return nullptr;
    }
    plan.course.end();
    plan.unbind();
    plan.pass.close();
    Sources sources;
    Ref* const fields[] = {&sources.groups, &sources.members, &sources.keys, &sources.settings,
                           &sources.state,  &sources.dicts,   &sources.idle};
    for (size_t k = 0; k < 7; ++k) *fields[k] = Ref::to(args[k]);
    sources.buckets = plan.sources.buckets;
    const Sources old = std::exchange(plan.sources, std::move(sources));
    return none();
}

inline PyObject* plan_set_buckets(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Plan& plan = PlanObject::of(self);
    if (!expects("set_buckets()", count, 2) || !is_free(plan)) return nullptr;
    const Items given(args[0]);
    std::vector<Ref> buckets;
    bool are_buckets = given.size() >= 0;
    for (Py_ssize_t i = 0; are_buckets && i < given.size(); ++i) {
        are_buckets = Py_TYPE(given.get(i)) == bucket_type;
        buckets.push_back(Ref::to(given.get(i)));
    }
    if (!are_buckets) {
        PyErr_SetString(PyExc_TypeError, "expected a list of Bucket");
        return nullptr;
    }
    plan.unbind();
    plan.pass.close();
    plan.pass.forget_places();
    plan.sources.buckets.clear();
    for (const Ref& each : buckets) plan.sources.buckets.push_back(&BucketObject::of(each.get()));
    const std::vector<Ref> old = std::exchange(plan.buckets, std::move(buckets));
    const Ref params = std::exchange(plan.params, Ref::to(args[1]));
    return none();
}

inline PyObject* plan_set_scalars(PyObject* self, PyObject* array) {
    Plan& plan = PlanObject::of(self);
    if (!is_free(plan) || !plan.scalars.take(array)) return nullptr;
    plan.unbind();
    plan.pass.close();
    return none();
}

inline PyObject* plan_scan(PyObject* self, PyObject*) {
    Answer answer;
    return PlanObject::of(self).look(answer) ? PyLong_FromLong(answer) : nullptr;
}

inline PyObject* plan_update(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!expects("update()", count, 4)) return nullptr;
    const double factor = PyFloat_AsDouble(args[1]);
    const int moves = PyObject_IsTrue(args[2]);
    std::vector<double> rates, weights;
    Answer answer;
    if (PyErr_Occurred() || !read_floats(args[0], rates) || !read_floats(args[3], weights))
        return nullptr;
    Plan& plan = PlanObject::of(self);
    if (!weights.empty() && int64_t(weights.size()) < plan.scalars.groups()) {
        PyErr_SetString(PyExc_ValueError, "averages need a weight for each group");
        return nullptr;
    }
    if (!plan.update(rates, factor, moves != 0, weights, answer))
        return nullptr;
    return PyLong_FromLong(answer);
}

inline PyObject* plan_squares(PyObject* self, PyObject*) {
    std::vector<double> sums;
    Answer answer;
    if (!PlanObject::of(self).squares(sums, answer)) return nullptr;
    const Ref list(list_of(sums, PyFloat_FromDouble));
    return list ? Py_BuildValue("iO", int(answer), list.get()) : nullptr;
}

// Reads an entry of a group: (key, object).
inline bool read_entry(PyObject* item, Record& record) {
    PyObject *key, *object;
    if (!PyArg_ParseTuple(item, "UO", &key, &object)) return false;
    record.entries.push_back({Ref::to(key), Ref::to(object)});
    return true;
}

// Reads a setting of a group: (key, object, members, columns, place).
inline bool read_setting(PyObject* item, Record& record) {
    PyObject *key, *object, *members, *columns;
    long long place;
    Setting setting;
    if (!PyArg_ParseTuple(item, "UOOOL", &key, &object, &members, &columns, &place) ||
        !read_ints(members, setting.members) || !read_ints(columns, setting.columns))
        return false;
    setting.key = Ref::to(key), setting.object = Ref::to(object), setting.place = place;
    const bool is_tuple = PyTuple_Check(object);
    bool fits = is_tuple ? setting.members.size() == setting.count()
                         : setting.members.empty() && setting.count() == 1;
    for (const int64_t member : setting.members)
        fits = fits && 0 <= member && member < PyTuple_Size(object);
    if (!fits || !setting.count()) {
        PyErr_SetString(PyExc_ValueError, "a setting has a column per number, in a tuple or alone");
        return false;
    }
    record.settings.push_back(std::move(setting));
    return true;
}

// Reads a group's record: (group, lr, entries, settings).
inline bool read_record(PyObject* tuple, Course& course) {
    PyObject *group, *lr, *entries, *settings;
    if (!PyArg_ParseTuple(tuple, "O!OOO", &PyDict_Type, &group, &lr, &entries, &settings))
        return false;
    Record record;
    record.group = Ref::to(group), record.lr = Ref::to(lr);
    record.fills = !PyFloat_CheckExact(lr);
    const Items all_entries(entries), all_settings(settings);
    for (Py_ssize_t i = 0; i < all_entries.size(); ++i)
        if (!read_entry(all_entries.get(i), record)) return false;
    for (Py_ssize_t i = 0; i < all_settings.size(); ++i)
        if (!read_setting(all_settings.get(i), record)) return false;
    course.add(std::move(record));
    return true;
}

// Returns whether a course has values for each group and each setting, at each step.
inline bool is_complete(const Course& course) {
    const auto fits = [&](const std::vector<std::vector<double>>& rows, size_t width) {
        for (const auto& row : rows)
            if (row.size() != width) return false;
        return rows.size() == course.rates.size();
    };
    const size_t width = course.width();
    for (const auto& weights : course.averages)
        if (!weights.empty() && weights.size() != course.records.size()) return false;
    return !course.rates.empty() && fits(course.rates, course.records.size()) &&
           (width || !course.numbers.empty() ? fits(course.numbers, width) : true) &&
           (course.ends.empty() || course.ends.size() + 1 == course.rates.size()) &&
           (course.averages.empty() || course.averages.size() + 1 == course.rates.size());
}

// Reads the gate: (threshold, is_wide, judge).
inline bool read_gate(PyObject* tuple, Gate& gate) {
    PyObject* judge;
    int is_wide;
    if (!PyArg_ParseTuple(tuple, "dpO", &gate.threshold, &is_wide, &judge)) return false;
    gate.is_wide = is_wide, gate.judge = Ref::to(judge);
    return true;
}

inline PyObject* plan_begin_course(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Plan& plan = PlanObject::of(self);
    if (!expects("begin_course()", count, 8) || !is_free(plan)) return nullptr;
    Course course;
    const Items records(args[0]);
    std::vector<int64_t> ends;
    bool is_read = records.size() >= 0 && read_rows(args[2], course.rates) &&
                   read_rows(args[3], course.numbers) && read_ints(args[4], ends) &&
                   read_rows(args[7], course.averages);
    for (Py_ssize_t i = 0; is_read && i < records.size(); ++i)
        is_read = read_record(records.get(i), course);
    course.ends.assign(ends.begin(), ends.end());
    const double max_norm = args[5] == Py_None ? -1 : PyFloat_AsDouble(args[5]);
    Gate gate;
    if (args[6] != Py_None && !read_gate(args[6], gate)) return nullptr;
    if (PyErr_Occurred()) return nullptr;
    if (!is_read || !is_complete(course)) {
        PyErr_SetString(PyExc_ValueError, "a course has values for each group and step");
        return nullptr;
    }
    if (!course.begin(args[1])) return nullptr;
    if (!is_free(plan)) return nullptr;  // reading numbers may have run Python code
    if (!plan.sources.buckets.empty()) course.words = plan.sources.buckets.front()->words;
    plan.max_norm = max_norm;
    std::swap(plan.gate, gate);
    std::swap(plan.course, course);
    return none();
}

inline PyObject* plan_end_course(PyObject* self, PyObject*) {
    Plan& plan = PlanObject::of(self);
    if (plan.busy) return none();
    plan.course.end();
    plan.unbind();
    return none();
}

inline PyObject* plan_bind(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Plan& plan = PlanObject::of(self);
    int64_t calls = plan.calls;
    if (!is_free(plan) || (count == 2 ? !read(args[1], calls) : !expects("bind()", count, 1)))
        return nullptr;
    PyObject* const object = args[0];
    if (object != Py_None) {
        if (Py_TYPE(object) != launches_type) {
            PyErr_SetString(PyExc_TypeError, "bind() takes Launches, or None");
            return nullptr;
        }
        Launches& launches = LaunchesObject::of(object);
        if (!launches.serve(plan.sources.buckets)) {
            PyErr_SetString(PyExc_ValueError, "launches must have the buckets of the plan");
            return nullptr;
        }
        if (!launches.complete() || !is_free(plan)) return nullptr;
        // Another thread may have taken a step or changed the plan: complete() gives the GIL away.
        if (calls != plan.calls || !launches.serve(plan.sources.buckets)) Py_RETURN_FALSE;
        plan.needs_launches = true;
    }
    const Ref old = std::exchange(plan.launches, Ref::to(object == Py_None ? nullptr : object));
    Py_RETURN_TRUE;
}

inline PyObject* plan_course(PyObject* self, PyObject*) {
    const NoCollection no_collection;  // a finalizer may take a step, which changes the records
    const Course& course = PlanObject::of(self).course;
    const Ref position(PyLong_FromLongLong(course.position));
    const Ref lrs(list_of(course.records, [](const Record& r) { return Py_NewRef(r.lr.get()); }));
    const Ref settings(list_of(course.records, [](const Record& r) {
        return list_of(r.settings, [](const Setting& s) { return Py_NewRef(s.object.get()); });
    }));
    const Ref rates(
        list_of(course.records, [](const Record& r) { return PyFloat_FromDouble(r.rate); }));
    const std::vector<double> none;
    const Ref numbers(list_of(course.numbers.empty() ? none : course.numbers[course.row],
                              PyFloat_FromDouble));
    if (!position || !lrs || !settings || !rates || !numbers) return nullptr;
    return PyTuple_Pack(5, course.number() ? course.number() : position.get(), lrs.get(),
                        settings.get(), rates.get(), numbers.get());
}

inline PyObject* plan_step(PyObject* self, PyObject* attributes) {
    if (!PyDict_Check(attributes)) {
        PyErr_SetString(PyExc_TypeError, "step() takes the attributes of the optimizer, a dict");
        return nullptr;
    }
    Outcome outcome;
    if (!PlanObject::of(self).step(attributes, outcome)) return nullptr;
    return PyLong_FromLong(outcome);
}

// ---- the updates of a backward pass

inline PyObject* plan_open_pass(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    Plan& plan = PlanObject::of(self);
    std::vector<double> rates, weights;
    if (!expects("open_pass()", count, 3) || !read_floats(args[0], rates) ||
        !read_floats(args[1], weights) || !is_free(plan))
        return nullptr;
    const size_t groups = size_t(plan.scalars.groups());
    if (rates.size() != groups || (!weights.empty() && weights.size() != groups)) {
        PyErr_SetString(PyExc_ValueError, "a pass needs a rate for each group, and weights likewise");
        return nullptr;
    }
    plan.open_pass(rates, std::move(weights), Ref::to(args[2] == Py_None ? nullptr : args[2]));
    return none();
}
inline PyObject* plan_close_pass(PyObject* self, PyObject*) {
    Plan& plan = PlanObject::of(self);
    if (!plan.busy) plan.pass.close();
    return none();
}
inline PyObject* plan_drop_pass(PyObject* self, PyObject*) {
    Plan& plan = PlanObject::of(self);
    if (!is_free(plan)) return nullptr;
    plan.pass.close();
    plan.drop_done();
    return none();
}
inline PyObject* plan_has_row(PyObject* self, PyObject* param) {
    const Plan& plan = PlanObject::of(self);
    return PyBool_FromLong(plan.pass.find(param, plan.sources.buckets) != nullptr);
}
inline PyObject* plan_is_done(PyObject* self, PyObject* param) {
    return PyBool_FromLong(PlanObject::of(self).is_done(param));
}
inline PyObject* plan_update_one(PyObject* self, PyObject* param) {
    Updated answer;
    if (!PlanObject::of(self).update_one(param, answer, true)) return nullptr;
    return PyLong_FromLong(answer);
}
inline PyObject* get_in_pass(PyObject* self, void*) {
    return PyBool_FromLong(PlanObject::of(self).in_pass());
}

inline PyObject* plan_after_fork(PyObject* self, PyObject* lock) {
    Plan& plan = PlanObject::of(self);
    plan.busy = false;
    return !plan.hook || HookObject::of(plan.hook.get()).take(lock) ? none() : nullptr;
}

inline PyObject* plan_release(PyObject* self, PyObject*) {
    PlanObject::of(self).let_go();
    return none();
}

inline PyObject* get_number(PyObject* self, void* which) {
    Plan& plan = PlanObject::of(self);
    return PyLong_FromLongLong(which ? plan.steps : plan.calls);
}
inline int set_number(PyObject* self, PyObject* value, void* which) {
    Plan& plan = PlanObject::of(self);
    if (!value) {
        PyErr_SetString(PyExc_AttributeError, "a plan counts its calls and steps");
        return -1;
    }
    return read(value, which ? plan.steps : plan.calls) ? 0 : -1;
}
inline PyObject* plan_take_norm(PyObject* self, PyObject*) {
    Plan& plan = PlanObject::of(self);
    const bool has_norm = std::exchange(plan.has_norm, false);
    return has_norm ? PyFloat_FromDouble(plan.norm) : none();
}
inline PyObject* get_busy(PyObject* self, void*) { return PyBool_FromLong(PlanObject::of(self).busy); }
inline PyObject* get_launches(PyObject* self, void*) {
    const Plan& plan = PlanObject::of(self);
    return Py_NewRef(plan.launches ? plan.launches.get() : Py_None);
}
inline PyObject* get_place(PyObject* self, void*) {
    const Sources& sources = PlanObject::of(self).sources;
    return Py_BuildValue("LL", static_cast<long long>(sources.bucket),
                         static_cast<long long>(sources.row));
}
inline int set_groups(PyObject* self, PyObject* groups, void*) {
    Plan& plan = PlanObject::of(self);
    if (!groups || Items(groups).size() < 0 || !is_free(plan)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "groups must be a list or a tuple");
        return -1;
    }
    plan.sources.groups = Ref::to(groups);
    return 0;
}

inline char second;  // tells which of two fields an attribute has
inline PyGetSetDef plan_attributes[] = {
    {"calls", get_number, set_number, nullptr, nullptr},
    {"steps", get_number, set_number, nullptr, &second},
    {"in_pass", get_in_pass, nullptr, nullptr, nullptr},
    {"busy", get_busy, nullptr, nullptr, nullptr},
    {"launches", get_launches, nullptr, nullptr, nullptr},
    {"place", get_place, nullptr, nullptr, nullptr},
    {"groups", nullptr, set_groups, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
inline PyMethodDef plan_methods[] = {
    {"set_sources", method<plan_set_sources>(), METH_FASTCALL, nullptr},
    {"set_buckets", method<plan_set_buckets>(), METH_FASTCALL, nullptr},
    {"set_scalars", method<plan_set_scalars>(), METH_O, nullptr},
    {"scan", method<plan_scan>(), METH_NOARGS, nullptr},
    {"update", method<plan_update>(), METH_FASTCALL, nullptr},
    {"squares", method<plan_squares>(), METH_NOARGS, nullptr},
    {"begin_course", method<plan_begin_course>(), METH_FASTCALL, nullptr},
    {"end_course", method<plan_end_course>(), METH_NOARGS, nullptr},
    {"course", method<plan_course>(), METH_NOARGS, nullptr},
    {"bind", method<plan_bind>(), METH_FASTCALL, nullptr},
    {"step", method<plan_step>(), METH_O, nullptr},
    {"take_norm", method<plan_take_norm>(), METH_NOARGS, nullptr},
    {"release", method<plan_release>(), METH_NOARGS, nullptr},
    {"open_pass", method<plan_open_pass>(), METH_FASTCALL, nullptr},
    {"close_pass", method<plan_close_pass>(), METH_NOARGS, nullptr},
    {"drop_pass", method<plan_drop_pass>(), METH_NOARGS, nullptr},
    {"has_row", method<plan_has_row>(), METH_O, nullptr},
    {"is_done", method<plan_is_done>(), METH_O, nullptr},
    {"update_one", method<plan_update_one>(), METH_O, nullptr},
    {"after_fork", method<plan_after_fork>(), METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace clr
