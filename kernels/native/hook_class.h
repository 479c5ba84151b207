// The Python class Hook: updates a parameter as soon as its gradient is complete. module.pyi
// describes it.
#pragma once

#include "plan_class.h"

namespace clr {

// Holds the optimizer's lock, so that no other thread steps meanwhile.
class Holding {
public:
    explicit Holding(const Hook& hook) : release_(Ref::to(hook.release.get())) {
        const Ref held(PyObject_CallNoArgs(hook.acquire.get()));
        holds_ = bool(held);
    }
    Holding(const Holding&) = delete;
    ~Holding() {
        if (!holds_) return;
        const Raised raised;
        const Ref none(PyObject_CallNoArgs(release_.get()));
        if (!none) PyErr_WriteUnraisable(release_.get());
    }
    explicit operator bool() const { return holds_; }

private:
    Ref release_;
    bool holds_;
};

// How often one gradient is tried, while other threads keep changing things.
constexpr int TRIES = 100;

inline PyObject* call_hook(PyObject* self, PyObject* args, PyObject*) {
    Hook& hook = HookObject::of(self);
    PyObject* param;
    if (!PyArg_ParseTuple(args, "O", &param)) return nullptr;
    if (!hook.plan) return none();
    const Holding holding(hook);
    if (!holding) return nullptr;
    for (int k = 0; k < TRIES; ++k) {
        const Ref plan = Ref::to(hook.plan);  // other code may drop the optimizer
        if (!plan) return none();
        Updated answer;
        if (!PlanObject::of(plan.get()).update_one(param, answer, false)) return nullptr;
        if (answer == UPDATED || answer == WITHOUT_GRADIENT) return none();
        if (answer == WITHIN_STEP) {
            PyErr_SetString(PyExc_RuntimeError,
                            "backward() was called within a step of the same optimizer, by a finalizer or "
                            "a signal handler: call it after that step");
            return nullptr;
        }
        const Ref mend = Ref::to(hook.mend.get());
        const Ref again(PyObject_CallFunctionObjArgs(
            mend.get(), param, answer == SECOND_GRADIENT ? Py_True : Py_False, nullptr));
        if (!again) return nullptr;
        if (!again.is(Py_True)) return none();
    }
    PyErr_Format(PyExc_RuntimeError,
                 "backward() gave up on a parameter after %d tries: other threads keep changing the "
                 "optimizer; have them wait for step()",
                 TRIES);
    return nullptr;
}

// Makes a hook of a plan, in place of the hook before: Hook(plan, mend, lock).
inline PyObject* new_hook(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *plan, *mend, *lock;
    if (!PyArg_ParseTuple(args, "O!OO", plan_type, &plan, &mend, &lock)) return nullptr;
    Ref self(HookObject::make(type));
    if (!self) return nullptr;
    Hook& hook = HookObject::of(self.get());
    if (!hook.take(lock)) return nullptr;
    hook.mend = Ref::to(mend);
    Plan& of = PlanObject::of(plan);
    const Ref old = std::move(of.hook);
    if (old) HookObject::of(old.get()).plan = nullptr;
    hook.plan = plan, of.hook = Ref::to(self.get());
    return self.release();
}

}  // namespace clr
