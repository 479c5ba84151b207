// What the extension needs of torch and of clr_optim's Python: classes, functions, names of keys.
//
// Python hands all of it over once, see `connect` in module.cpp. The module keeps it for good.
#pragma once

#include <cstdint>

#include "dlpack.h"
#include "python.h"

namespace clr {

struct Torch {
    Ref tensor, parameter;  // classes
    Ref dtensor;            // the class DTensor
    const ExchangeApi* api = nullptr;
    Ref has_mode;           // asks whether a torch function mode is active
    Ref increment_version;  // counts up the versions of a list of tensors
    Ref num_threads;        // asks for the number of threads
    Ref current_stream;     // asks for the stream of a GPU, by the GPU's index
    Ref global_pre_hooks, global_post_hooks;  // of all optimizers' steps
    Ref profiler;                             // the dictionary of torch.autograd.profiler
    Ref position_key;                         // the key of a group that holds the position
};

// Names of attributes and keys.
struct Names {
    Ref grad, is_neg, local, spec, placements, mesh, params, lr, capturable, state,
        param_groups, own_step, pre_hooks, post_hooks, cycle_end_hooks, grad_scale, found_inf,
        profiles;

    // Returns false with an exception set if memory has run out.
    bool make() {
        bool is_whole = true;
        const auto name = [&is_whole](const char* text) {
            Ref made(PyUnicode_InternFromString(text));
            is_whole = is_whole && made;
            return made;
        };
        grad = name("grad"), is_neg = name("is_neg");
        local = name("_local_tensor"), spec = name("_spec");
        placements = name("placements"), mesh = name("mesh");
        params = name("params"), lr = name("lr");
        capturable = name("capturable");
        state = name("state"), param_groups = name("param_groups"), own_step = name("step");
        pre_hooks = name("_optimizer_step_pre_hooks");
        post_hooks = name("_optimizer_step_post_hooks");
        cycle_end_hooks = name("_cycle_end_hooks");
        grad_scale = name("grad_scale"), found_inf = name("found_inf");
        profiles = name("_is_profiler_enabled");
        return is_whole;
    }
};

inline Torch& torch() {
    static Torch* const torch = new Torch;  // never ended: at exit, Python may end first
    return *torch;
}
inline Names& names() {
    static Names* const names = new Names;
    return *names;
}

// Reads a tensor; returns false with an exception set if DLPack cannot tell its memory.
inline bool view(PyObject* tensor, DLTensor& out) { return !torch().api->view(tensor, &out); }

// Returns the tensor itself, or a DTensor's part of this rank; null with an exception set on failure.
inline Ref local_part(PyObject* tensor, bool is_divided) {
    return is_divided ? Ref(PyObject_GetAttr(tensor, names().local.get())) : Ref::to(tensor);
}

// Places in torch's objects, see clr_optim/plan/words.py.
struct Words {
    int64_t impl = 0;       // which word of a tensor's object points to its implementation
    int64_t storage = 0;    // which word of that points to its storage; 0: do not look ahead
    int64_t key_set = 0;    // which word of the implementation holds the dispatch keys
    uint64_t negative = 0;  // the bit of a lazy negation in these; 0: ask torch
};

// Reads the bit of a lazy negation. False if its place is unknown; torch was asked then.
inline bool is_negated(const Words& words, PyObject* tensor) {
    if (!words.negative) return false;
    const auto* impl = reinterpret_cast<const uint64_t* const*>(tensor)[words.impl];
    return (impl[words.key_set] & words.negative) != 0;
}

inline bool is_float(const DLTensor& t, int64_t bits) {
    return t.code == 2 && t.bits == bits && t.lanes == 1;
}

}  // namespace clr
