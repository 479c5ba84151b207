// A plan: everything that one optimizer's steps read, and the step itself.
#pragma once

#include <cmath>
#include <cstdint>

#include "backward.h"
#include "course.h"
#include "launches.h"
#include "multi_tensor.h"
#include "objects.h"
#include "scan.h"
#include "sets.h"
#include "unusual.h"

namespace clr {

// The scalars of each group, a row each: the memory of an array that Python fills.
class Scalars {
public:
    Scalars() = default;
    Scalars(const Scalars&) = delete;
    ~Scalars() { leave(); }

    bool take(PyObject* array) {
        Py_buffer buffer;
        if (PyObject_GetBuffer(array, &buffer, PyBUF_FORMAT | PyBUF_STRIDES | PyBUF_WRITABLE))
            return false;
        if (buffer.ndim != 2 || buffer.itemsize != 8 || *buffer.format != 'd' ||
            buffer.strides[1] != 8 || buffer.strides[0] != 8 * buffer.shape[1]) {
            PyBuffer_Release(&buffer);
            PyErr_SetString(PyExc_ValueError, "scalars must be a contiguous array of float64");
            return false;
        }
        leave();
        buffer_ = buffer, has_ = true;
        return true;
    }
    void leave() {
        if (has_) PyBuffer_Release(&buffer_);
        has_ = false;
    }
    int64_t groups() const { return has_ ? buffer_.shape[0] : 0; }
    int64_t width() const { return has_ ? buffer_.shape[1] : 0; }
    double* data() const { return static_cast<double*>(has_ ? buffer_.buf : nullptr); }
    double* row(size_t group) const { return data() + int64_t(group) * width(); }

    int visit(visitproc visit, void* arg) const {
        if (has_) Py_VISIT(buffer_.obj);
        return 0;
    }

private:
    Py_buffer buffer_ = {};
    bool has_ = false;
};

// Sets an exception aside, and raises it again at the end of the scope.
class Raised {
public:
    Raised() { PyErr_Fetch(&type_, &value_, &trace_); }
    Raised(const Raised&) = delete;
    ~Raised() {
        if (type_) PyErr_Restore(type_, value_, trace_);
    }
    explicit operator bool() const { return type_; }

private:
    PyObject *type_, *value_, *trace_;
};

// The gate of the host: the largest norm of a step that happens. Python keeps the statistics.
struct Gate {
    double threshold = 0;
    bool is_wide = false;  // whether norms are float64, and not float32
    Ref judge;  // takes the norm of a step in, and returns the next threshold; null without a gate

    explicit operator bool() const { return bool(judge); }
    double rounded(double norm) const { return is_wide ? norm : double(float(norm)); }
    // A norm of 0 tells nothing. NaN closes the gate.
    bool closes(double norm) const { return rounded(norm) != 0 && !(rounded(norm) <= threshold); }

    // Called after a step or a skip, since Python code may change any tensor. Returns false with an exception
    // set on failure.
    bool take(double norm) {
        const Ref number(PyFloat_FromDouble(rounded(norm)));
        const Ref judging = Ref::to(judge.get());
        const Ref next(number ? PyObject_CallFunctionObjArgs(judging.get(), number.get(), nullptr)
                              : nullptr);
        if (next) threshold = PyFloat_AsDouble(next.get());
        return next && !PyErr_Occurred();
    }
};

// How a call of step() ended. Nothing has changed unless the step was taken; a skip changes what the
// gate knows, and the norm.
enum Outcome {
    TAKEN = 0,
    OUT_OF_VALUES = 1,  // the course has no values for another step
    OBSERVED = 2,       // hooks, a profiler or a GradScaler need the general way
    REPLACED = 3,       // other code replaced the optimizer's step, groups or state
    WRITTEN = 4,        // other code wrote into the groups
    OUTDATED = 5,       // a scan found a change
    IN_USE = 6,         // a finalizer or a signal handler has called a step within a step
    UNSERVED = 7,       // no launches are bound, or they cannot serve this step
    SKIPPED = 8,        // the gate has closed: the step is done, without an update
};

class Plan {
public:
    Sources sources;
    std::vector<Ref> buckets;  // the Python objects of sources.buckets
    Ref params;                // list of the parameters of all buckets
    Scalars scalars;
    Course course;
    Ref optimizer, own_step;   // the wrapped optimizer, and its class's step()
    Gate gate;                 // of the host
    double max_norm = -1;      // the largest norm of all gradients; negative: do not clip
    double norm = 0;           // of all gradients in the last step, if Python has not taken it
    bool has_norm = false;
    int64_t calls = 0, steps = 0;  // kernel calls, and those that advanced the position
    bool busy = false;
    // The Launches that a step makes in place of calls of the CPU's kernels, or null. They describe
    // one state of the device, so they end with whatever they were made from.
    Ref launches;
    Pass pass;
    Ref hook;  // the Hook that calls update_one(), or null
    bool needs_launches = false;  // whether a device runs the kernels, so that no CPU kernel serves

    // ---- the parts of a step. Each returns false with an exception set on failure.

    bool look(Answer& answer) {
        if (busy) return answer = NESTED, true;
        const Use use(*this);
        return find_changes(answer);
    }

    // Updates all rows with a gradient, unless a scan finds a change.
    // `weights`: of the averages, see clr::update().
    bool update(const std::vector<double>& rates, double factor, bool moves,
                const std::vector<double>& weights, Answer& answer) {
        if (busy) return answer = NESTED, true;
        const Use use(*this);
        if (!find_changes(answer)) return false;
        if (!is_current(answer)) return true;
        const size_t groups = std::min(rates.size(), size_t(scalars.groups()));
        for (size_t i = 0; i < groups; ++i) scalars.row(i)[0] = rates[i];
        const bool ran = run(factor, weights, answer, moves, false);
        const Raised raised;
        release();
        return ran;
    }

    // Finds the sum of squares of each bucket's gradients, unless a scan finds a change.
    bool squares(std::vector<double>& sums, Answer& answer) {
        if (busy) return answer = NESTED, true;
        const Use use(*this);
        if (!find_changes(answer)) return false;
        if (is_current(answer)) sums = sums_of_squares();
        return true;
    }

    // ---- the updates of a backward pass

    // Whether a backward pass has updated a parameter, and no step has followed.
    bool in_pass() const { return pass.steps == steps && !pass.done.empty(); }
    bool is_done(PyObject* param) const {
        return pass.steps == steps && pass.done.find(param) != pass.done.end();
    }

    // Opens a pass, or a pass again that a change has closed. The plan must be up to date. There is a
    // rate for each group, and a weight, or no weights.
    void open_pass(const std::vector<double>& rates, std::vector<double>&& weights, Ref&& launch) {
        for (size_t i = 0; i < rates.size(); ++i) scalars.row(i)[0] = rates[i];
        pass.place(sources.buckets);
        std::swap(pass.weights, weights);
        std::swap(pass.launch, launch);
        pass.is_open = true;
        if (pass.steps != steps) drop_done();
    }
    void drop_done() {
        const auto old = std::exchange(pass.done, {});
        pass.steps = steps;
    }

    // Updates one parameter by its gradient, which the call frees; or changes nothing. `drafts`: the
    // optimizer need not have the row's state yet.
    bool update_one(PyObject* param, Updated& answer, bool drafts) {
        if (busy) return answer = WITHIN_STEP, true;
        Ref grad(PyObject_GetAttr(param, names().grad.get()));
        if (!grad) return false;
        if (grad.is(Py_None)) return answer = WITHOUT_GRADIENT, true;
        if (is_done(param)) return answer = SECOND_GRADIENT, true;
        answer = NO_ROW;
        const Pass::Place* const found = pass.find(param, sources.buckets);
        if (!pass.is_open || pass.steps != steps || !found) return true;
        const Pass::Place place = *found;
        Bucket& bucket = *sources.buckets[place.bucket];
        const Use use(*this);
        if ((!drafts && has_other_state(optimizer.get(), sources, bucket, place.row)) ||
            !is_same(bucket, place.row, grad.get())) {
            return clear_exception();
        }
        // Memory is taken before anything changes.
        const auto note = pass.done.emplace(param, Ref::to(param)).first;
        bool is_served = true;
        const bool ran = run_one(bucket, place, is_served);
        if (!ran || !is_served) return pass.done.erase(note), ran;
        answer = UPDATED;
        const Ref list(PyList_New(0));
        const bool counted = list && !PyList_Append(list.get(), param) && count_versions(list.get());
        return !PyObject_SetAttr(param, names().grad.get(), Py_None) && counted;
    }

    // ---- the whole of an ordinary step

    // Takes the next step of the course: scans, checks the groups, updates, and writes the next
    // values into the groups. Before anything has changed, anything unusual ends the call.
    // `attributes` is the dictionary of the wrapping optimizer.
    bool step(PyObject* attributes, Outcome& outcome) {
        if (busy) return outcome = IN_USE, true;
        const Use use(*this);
        const Signals signals(attributes);
        Answer answer = ALL_ACTIVE;
        if (!is_ordinary(attributes, signals, outcome, answer)) {
            const Raised raised;
            release();
            return !raised;
        }
        double factor = 1;
        const bool judges = gate && !launches;
        if (!launches && (max_norm >= 0 || judges)) factor = clip();
        if (judges && gate.closes(norm)) {
            outcome = SKIPPED;
            release();
            return gate.take(norm);
        }
        for (size_t i = 0; i < course.records.size(); ++i)
            scalars.row(i)[0] = course.records[i].rate;
        const bool ran = launches ? launch(answer)
                                  : run(factor, course.weights(), answer, true,
                                        course.has_tensors());
        {
            const Raised raised;
            // Write the next values even if run() has failed after it has changed the parameters.
            if (ran || !launches || bound()->has_begun()) {
                course.write();
                take_settings();
            }
            if (!ran) unbind();
            release();
        }
        return ran && (!judges || gate.take(norm));
    }

    // ---- the launches of a GPU's step

    Launches* bound() const { return launches ? &Object<Launches>::of(launches.get()) : nullptr; }

    // The old launches go last, since their end may run Python code.
    void unbind() { const Ref old = std::move(launches); }

    // Lets go of the gradients outside of a step. Their finalizers may call a step, which must not
    // change the buckets meanwhile.
    void let_go() {
        if (busy) return;
        const Use use(*this);
        release();
    }

    int visit(visitproc visit, void* arg) const {
        for (const Ref* each :
             {&sources.groups, &sources.members, &sources.keys, &sources.settings, &sources.state,
              &sources.dicts, &sources.idle, &params, &optimizer, &own_step, &gate.judge, &launches})
            Py_VISIT(each->get());
        for (const Ref& bucket : buckets) Py_VISIT(bucket.get());
        Py_VISIT(hook.get());
        if (const int stop = pass.visit(visit, arg)) return stop;
        if (const int stop = scalars.visit(visit, arg)) return stop;
        return course.visit(visit, arg);
    }
    void clear() {
        if (hook) HookObject::of(hook.get()).plan = nullptr;
        const Ref old_hook = std::move(hook);
        pass.close();
        drop_done();
        course.end();
        const Sources old = std::exchange(sources, Sources());
        const std::vector<Ref> old_buckets = std::exchange(buckets, {});
        const Ref old_params = std::move(params), old_optimizer = std::move(optimizer),
                  old_step = std::move(own_step), old_judge = std::move(gate.judge),
                  old_launches = std::move(launches);
        scalars.leave();
    }

private:
    void release() {
        for (Bucket* bucket : sources.buckets) bucket->release();
    }

    // Keeps every other scan and step away, also those of finalizers.
    class Use {
    public:
        explicit Use(Plan& plan) : plan_(plan) { plan.busy = true; }
        Use(const Use&) = delete;
        ~Use() { plan_.busy = false; }

    private:
        Plan& plan_;
    };

    // Scans. An exception of Python code counts as a change, but Ctrl-C fails.
    bool find_changes(Answer& answer, bool averages = true) {
        answer = GROUPS_CHANGED;
        if (!sources.groups) return true;
        for (const Bucket* bucket : sources.buckets)
            if (bucket->groups > scalars.groups()) return true;
        answer = scan(sources, averages);
        return clear_exception();
    }

    // Returns whether a row still describes its tensors; takes in the gradient's address. An exception
    // counts as a change.
    bool is_same(Bucket& bucket, int64_t row, PyObject* grad) const {
        bucket.reads_averages = bucket.averages() && !pass.weights.empty();
        if (needs_asking(bucket, row) && !is_fit(bucket, row, grad)) return false;
        const NoCollection no_collection;
        return same_row(bucket, row, grad);
    }

    // Runs the kernel of one row; `is_served` is false if only a pass that is opened again can. Returns
    // false with an exception set on failure.
    bool run_one(const Bucket& bucket, const Pass::Place& place, bool& is_served) {
        if (pass.launch) {
            const Ref launch = Ref::to(pass.launch.get());
            const Ref found(PyObject_CallFunction(launch.get(), "nL", Py_ssize_t(place.bucket),
                                                  static_cast<long long>(place.row)));
            is_served = !found.is(Py_False);
            return bool(found);
        }
        pass.row.take(bucket, place.row);
        const int64_t numel = pass.row.rows[0].numel;
        const int threads = threads_for(numel);
        const WithoutGil without_gil(numel >= PARALLEL);
        clr::update(*kernels, pass.row, scalars.data(), scalars.width(), 1, pass.weights, threads);
        return true;
    }

    // Notes which rows a backward pass has updated, if a step would move their averages again.
    void note_done(bool averages) {
        for (Bucket* bucket : sources.buckets) {
            bucket->done.clear();
            for (int64_t i = 0; averages && in_pass() && i < bucket->count(); ++i)
                bucket->done.push_back(is_done(bucket->params[size_t(i)].get()));
        }
    }

    // Returns whether the next step is an ordinary one, and makes ready for it. If not, `outcome`
    // tells why, or an exception is set.
    bool is_ordinary(PyObject* attributes, const Signals& signals, Outcome& outcome,
                     Answer& answer) {
        outcome = why_not(attributes, signals);
        if (!clear_exception()) return false;
        // A device decides itself whether an average falls due.
        const bool averages = needs_launches || !course.weights().empty();
        if (outcome != TAKEN || !find_changes(answer, averages)) return false;
        // After the scan, which may run Python code.
        if (!is_current(answer)) outcome = OUTDATED;
        else if (!course.is_untouched(sources.groups.get())) outcome = WRITTEN;
        else if (launches && (bound()->clips != (max_norm >= 0) || !bound()->is_ready(signals)))
            outcome = UNSERVED;
        return clear_exception() && outcome == TAKEN && course.prepare();
    }

    // Returns the number of values that have a gradient, and of those whose averages alone may move.
    int64_t size(bool averages = false) const {
        int64_t total = 0;
        for (const Bucket* bucket : sources.buckets)
            total += bucket->values + (averages && bucket->averages() ? bucket->idle_values : 0);
        return total;
    }

    // Asks torch only if the answer matters.
    static int threads_for(int64_t size) {
        if (size < 2 * GRAIN) return 1;
        const Ref count(PyObject_CallNoArgs(torch().num_threads.get()));
        const long number = count ? PyLong_AsLong(count.get()) : 1;
        if (PyErr_Occurred()) PyErr_Clear();
        return int(std::max(number, 1L));
    }

    // Sums without the GIL if that takes long.
    std::vector<double> sums_of_squares() const {
        const int threads = threads_for(size());
        const WithoutGil without_gil(size() >= PARALLEL);
        std::vector<double> sums;
        for (const Bucket* bucket : sources.buckets)
            sums.push_back(sum_of_squares(*kernels, *bucket, threads));
        return sums;
    }

    // Finds the norm of all gradients, and returns by what factor a step clips them.
    double clip() {
        Sum sum;
        for (const double square : sums_of_squares()) sum.add(square);
        norm = std::sqrt(sum.value()), has_norm = true;
        if (max_norm < 0) return 1;
        const double factor = max_norm / (norm + 1e-6);
        return factor > 1 ? 1 : factor;  // a NaN must stay NaN, as in clip_grad_norm_
    }

    // Runs the CPU's kernels, and counts the call.
    bool run(double factor, const std::vector<double>& weights, Answer answer, bool moves,
             bool fills_rates) {
        const int64_t values = size(!weights.empty());
        const int threads = threads_for(values);
        note_done(!weights.empty());
        {
            // A shorter step takes less time than giving the GIL away and getting it back.
            const WithoutGil without_gil(values >= PARALLEL);
            for (const Bucket* bucket : sources.buckets)
                if (bucket->active || bucket->averages())
                    clr::update(*kernels, *bucket, scalars.data(), scalars.width(), factor,
                                weights, threads);
        }
        calls += 1, steps += moves;
        return count_up(answer, fills_rates);
    }

    // Makes the launches of a GPU's step, and counts the call.
    bool launch(Answer answer) {
        const bool ran = bound()->run();
        if (!ran && !bound()->has_begun()) return false;
        calls += 1, steps += 1;
        return ran && count_up(answer, course.has_tensors());
    }

    // Counts up the versions of the tensors that a step has changed.
    bool count_up(Answer answer, bool fills_rates) const {
        // As after any in-place update: a backward pass through an older graph must raise.
        Ref changed = Ref::to(params.get());
        if (answer != ALL_ACTIVE || fills_rates) {
            changed = Ref(PyList_New(0));
            const auto add = [&changed](PyObject* tensor) {
                return changed && !PyList_Append(changed.get(), tensor);
            };
            for (const Bucket* bucket : sources.buckets)
                for (size_t i = 0; i < bucket->rows.size(); ++i)
                    if (bucket->gradients[i] && !add(bucket->params[i].get())) return false;
            for (const Record& record : course.records)
                if (fills_rates && record.fills && !add(record.lr.get())) return false;
        }
        return changed && count_versions(changed.get());
    }
    static bool count_versions(PyObject* tensors) {
        return bool(Ref(PyObject_CallFunctionObjArgs(torch().increment_version.get(), tensors, nullptr)));
    }

    // Notes the settings that the course has just written, so that the next scan finds no change.
    void take_settings() {
        const Items all(sources.settings.get());
        for (size_t i = 0; i < course.records.size() && Py_ssize_t(i) < all.size(); ++i) {
            const Record& record = course.records[i];
            const double* number = course.numbers_of(course.row, record);
            for (const Setting& setting : record.settings) {
                if (setting.place >= 0 &&
                    PyList_SetItem(all.get(Py_ssize_t(i)), Py_ssize_t(setting.place),
                                   Py_NewRef(setting.object.get())))
                    PyErr_Clear();
                for (const int64_t column : setting.columns) {
                    if (column >= 0 && column < scalars.width()) scalars.row(i)[column] = *number;
                    ++number;
                }
            }
        }
    }

    // Returns why the general way must take the step; TAKEN if nothing speaks against one call.
    Outcome why_not(PyObject* attributes, const Signals& signals) const {
        if (is_observed(attributes) || (signals && !needs_launches)) return OBSERVED;
        const bool has_hooks = !is_empty(item(attributes, names().cycle_end_hooks));
        // The host must know whether the step happens.
        if (has_hooks && (signals.found_inf || (gate && needs_launches))) return OBSERVED;
        if (!optimizer || is_replaced(optimizer.get(), own_step, sources)) return REPLACED;
        if (launches ? !bound()->is_unobserved() || !bound()->take(signals) : needs_launches)
            return UNSERVED;
        if (course.is_over()) return OUT_OF_VALUES;
        if (has_hooks && (course.ends.empty() || course.ends[course.row])) return OBSERVED;
        if (scalars.groups() != int64_t(course.records.size())) return OUTDATED;
        return TAKEN;
    }
};

}  // namespace clr
