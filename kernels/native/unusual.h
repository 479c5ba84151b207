// Questions whether other code watches an optimizer's steps, or has replaced a part of it.
#pragma once

#include "signals.h"

namespace clr {

inline bool is_empty(PyObject* hooks) { return hooks && PyDict_Size(hooks) == 0; }

// Returns whether hooks or a profiler need the general way. `attributes` is the dictionary of the
// wrapping optimizer.
inline bool is_observed(PyObject* attributes) {
    const Names& n = names();
    const Torch& t = torch();
    return !is_empty(item(attributes, n.pre_hooks)) || !is_empty(item(attributes, n.post_hooks)) ||
           !is_empty(t.global_pre_hooks.get()) || !is_empty(t.global_post_hooks.get()) ||
           item(t.profiler.get(), n.profiles) != Py_False;
}

// Returns whether the wrapped optimizer has another step, state or list of groups than the plan
// knows, or hooks.
inline bool is_replaced(PyObject* optimizer, const Ref& own_step, const Sources& sources) {
    const Names& n = names();
    const Ref dict(PyObject_GenericGetDict(optimizer, nullptr));
    if (!dict || item(dict.get(), n.own_step) || !sources.state.is(item(dict.get(), n.state)) ||
        !sources.groups.is(item(dict.get(), n.param_groups)) ||
        !is_empty(item(dict.get(), n.pre_hooks)) || !is_empty(item(dict.get(), n.post_hooks)))
        return true;
    const Ref step(PyObject_GetAttr(type_of(optimizer), n.own_step.get()));
    return !step || !step.is(own_step.get());
}

// Returns whether the wrapped optimizer has another state for a row's parameter than the row. Runs Python
// code, the parameter's hash.
inline bool has_other_state(PyObject* optimizer, const Sources& sources, const Bucket& bucket, int64_t row) {
    const Ref dict(PyObject_GenericGetDict(optimizer, nullptr));
    if (!dict || !sources.state.is(item(dict.get(), names().state))) return true;
    if (!bucket.width()) return false;
    PyObject* const param = bucket.params[size_t(row)].get();
    return !bucket.dicts[size_t(row)].is(PyDict_GetItemWithError(sources.state.get(), param));
}

}  // namespace clr
