// Fetches the objects of coming rows into the caches, some rows before the scan reads them.
//
// In a step on a thousand small tensors, the tensors' objects have mostly left the caches. Each
// tensor then costs three waits for memory: for the object, its implementation, and its storage.
// The fetches are hints only; no result depends on them. Where the places of implementation and
// storage are unknown, Words::storage is 0 and nothing is fetched. CLR_OPTIM_LOOK_AHEAD=0 does the same.
#pragma once

#include "bucket.h"

namespace clr {

class Ahead {
public:
    Ahead(const Bucket& bucket, int64_t count) : bucket_(bucket), count_(count) {
        for (int64_t i = -4 * STAGE; i < 0; ++i) look(i);
    }
    Ahead(const Ahead&) = delete;

    // Returns row i's gradient; null after an exception. Call it in order of i.
    Ref next_grad(int64_t i) {
        Ref grad = std::move(grads_[i % RING]);
        look(i);
        return grad;
    }

private:
    static constexpr int64_t STAGE = 4, RING = 2 * STAGE, LINE = 64;

    static void fetch(const void* at, int lines) {
        for (int i = 0; i < lines; ++i)
            __builtin_prefetch(static_cast<const char*>(at) + i * LINE);
    }
    static const void* word(const void* of, int64_t index) {
        return static_cast<const void* const*>(of)[index];
    }
    // A gradient may be any object, and its fetched words have a meaning in torch's own class alone.
    static bool is_plain_tensor(PyObject* grad) { return grad && torch().tensor.is(type_of(grad)); }
    void fetch_impl(PyObject* tensor) const { fetch(word(tensor, bucket_.words.impl), 4); }
    void fetch_storage(PyObject* tensor) const {
        fetch(word(word(tensor, bucket_.words.impl), bucket_.words.storage), 2);
    }

    // Takes one more row through each stage: objects, then implementations, then storages.
    void look(int64_t i) {
        const int64_t near = i + STAGE, middle = near + STAGE, far = middle + STAGE;
        const bool fetches = bucket_.words.storage;
        const size_t keys = bucket_.width();
        if (fetches && far + STAGE < count_) fetch(param(far + STAGE), 1);
        if (fetches && far >= 0 && far < count_) {
            fetch_impl(param(far));
            if (keys && was_active(far)) fetch(bucket_.dicts[size_t(far)].get(), 1);
            for (size_t k = 0; k < keys && was_active(far); ++k) fetch(bucket_.tensor(far, k), 1);
        }
        if (middle >= 0 && middle < count_) {
            if (fetches && was_active(middle)) {
                if (keys) fetch(word(bucket_.dicts[size_t(middle)].get(), 4), 3);  // its table
                for (size_t k = 0; k < keys; ++k) fetch_impl(bucket_.tensor(middle, k));
                fetch(bucket_.rows[size_t(middle)].counter, 1);
                fetch(bucket_.rows[size_t(middle)].scalar, 1);
            }
            Ref& grad = grads_[middle % RING];
            grad = Ref(PyObject_GetAttr(param(middle), names().grad.get()));
            if (fetches && is_plain_tensor(grad.get())) fetch_impl(grad.get());
        }
        if (fetches && near >= 0 && near < count_ && was_active(near)) {
            fetch_storage(param(near));
            for (size_t k = 0; k < keys; ++k) fetch_storage(bucket_.tensor(near, k));
            PyObject* const grad = grads_[near % RING].get();
            if (is_plain_tensor(grad)) fetch_storage(grad);
        }
    }
    PyObject* param(int64_t i) const { return bucket_.params[size_t(i)].get(); }
    // In the last scan. The scan reads no more of a row without a gradient.
    bool was_active(int64_t i) const { return bucket_.gradients[size_t(i)]; }

    const Bucket& bucket_;
    int64_t count_;
    Ref grads_[RING];
};

}  // namespace clr
