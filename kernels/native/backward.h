// A pass: the updates that one backward pass makes before its step, parameter by parameter. And the hook
// that asks for each of them.
#pragma once

#include <unordered_map>
#include <vector>

#include "bucket.h"
#include "objects.h"

namespace clr {

// How an update of one parameter ended. Nothing has changed unless the parameter was updated.
enum Updated {
    UPDATED = 0,
    WITHOUT_GRADIENT = 1,
    SECOND_GRADIENT = 2,  // the pass has updated the parameter before
    NO_ROW = 3,        // no pass is open, or the parameter's row has changed: Python must mend it
    WITHIN_STEP = 4,      // a finalizer or a signal handler runs a backward pass within a step
};

struct Pass {
    // ---- while the pass is open
    bool is_open = false;
    std::vector<double> weights;  // of the averages, see clr::update()
    Ref launch;  // has a device update a row, by numbers of bucket and row; null: the CPU's kernels
    Rows row;    // the row of the present update

    // ---- until the step
    std::unordered_map<PyObject*, Ref> done;  // the updated parameters
    int64_t steps = -1;  // the plan's count of steps. After the next step, the pass is over.

    struct Place { size_t bucket = 0; int64_t row = 0; };

    // Takes in where the parameters of all buckets are.
    void place(const std::vector<Bucket*>& buckets) {
        if (knows(buckets)) return;
        forget_places();
        for (size_t b = 0; b < buckets.size(); ++b) {
            editions_.emplace_back(buckets[b], buckets[b]->edition);
            for (int64_t i = 0; i < buckets[b]->count(); ++i)
                places_[buckets[b]->params[size_t(i)].get()] = {b, i};
        }
    }
    // Returns the place of a parameter's row; null if no row of the buckets is certainly its own.
    const Place* find(PyObject* param, const std::vector<Bucket*>& buckets) const {
        const auto found = places_.find(param);
        if (found == places_.end() || editions_.size() != buckets.size()) return nullptr;
        const auto& [b, row] = found->second;
        const bool is_own = is_known(b, buckets) && buckets[b]->params[size_t(row)].is(param);
        return is_own ? &found->second : nullptr;
    }
    // Called when the plan gets other buckets, whose addresses may be those of the old ones.
    void forget_places() { places_.clear(), editions_.clear(); }

    void close() {
        const Ref old = std::move(launch);
        is_open = false;
    }
    int visit(visitproc visit, void* arg) const {
        Py_VISIT(launch.get());
        for (const auto& each : done) Py_VISIT(each.first);
        return 0;
    }

private:
    // Rows change with the edition of their bucket, so that no old place is ever used.
    bool is_known(size_t b, const std::vector<Bucket*>& buckets) const {
        return editions_[b].first == buckets[b] && editions_[b].second == buckets[b]->edition;
    }
    bool knows(const std::vector<Bucket*>& buckets) const {
        if (editions_.size() != buckets.size()) return false;
        for (size_t b = 0; b < buckets.size(); ++b)
            if (!is_known(b, buckets)) return false;
        return true;
    }

    std::unordered_map<PyObject*, Place> places_;
    std::vector<std::pair<const Bucket*, int64_t>> editions_;
};

// The body of the Python class Hook, see hook_class.h.
struct Hook {
    // Borrowed, and null once the plan has ended or has another hook: parameters hold the hook, and
    // must not keep the plan alive.
    PyObject* plan = nullptr;
    Ref mend;              // mend(param, is_second) makes ready for an update, or raises
    Ref acquire, release;  // of the optimizer's lock

    // Returns false with an exception set on failure.
    bool take(PyObject* lock) {
        acquire = Ref(PyObject_GetAttrString(lock, "acquire"));
        release = Ref(acquire ? PyObject_GetAttrString(lock, "release") : nullptr);
        return bool(release);
    }
    int visit(visitproc visit, void* arg) const {
        for (const Ref* each : {&mend, &acquire, &release}) Py_VISIT(each->get());
        return 0;
    }
    void clear() {
        plan = nullptr;
        const Ref old_mend = std::move(mend), old_acquire = std::move(acquire),
                  old_release = std::move(release);
    }
};

using HookObject = Object<Hook>;

}  // namespace clr
