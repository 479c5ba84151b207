// A ring of pinned memory: the host writes into a slot, and a copy to the GPU reads it later.
//
// An event after each copy tells when the slot is free again. The host waits if it is eight steps
// ahead of the GPU.
#pragma once

#include <memory>

#include "driver.h"

namespace clr {

class Ring {
public:
    static constexpr size_t SLOTS = 8;

    Ring(const Ring&) = delete;
    // No copy may read the memory any more.
    ~Ring() {
        for (const Slot& slot : slots_)
            if (slot.event) driver_.end_event(slot.event);
        if (memory_) driver_.free(memory_);
    }

    // Returns a ring for the current context, with slots of at least this size; null with an error
    // of the driver. Takes a ring that was given back, if one fits: allocating pinned memory is
    // slow, and freeing it waits for the GPU.
    static std::unique_ptr<Ring> take(const Driver& driver, void* context, size_t bytes,
                                      int& error) {
        size_t size = 4096;
        while (size < bytes) size *= 2;
        error = SUCCESS;
        for (std::unique_ptr<Ring>* spare = &first_spare(); *spare; spare = &(*spare)->next_spare_)
            if ((*spare)->fits(context, size)) {
                std::unique_ptr<Ring> ring = std::move(*spare);
                *spare = std::move(ring->next_spare_);
                return ring;
            }
        std::unique_ptr<Ring> ring(new Ring(driver, context, size));
        {
            const WithoutGil without_gil(true);
            error = ring->allocate();
        }
        return error == SUCCESS ? std::move(ring) : nullptr;
    }

    // Keeps the ring for a later user, who looks at the events before writing. So no end of a
    // ring calls the driver, which may be gone, wait for a copy, or lack a context in this thread.
    static void give_back(std::unique_ptr<Ring> ring) {
        ring->next_spare_ = std::move(first_spare());
        first_spare() = std::move(ring);
    }

    // Finds a slot that no copy reads, and waits for one if the GPU has yet to read all.
    int next(unsigned char*& memory) {
        const Relaxed relaxed(driver_);
        size_t oldest = 0;
        for (size_t i = 0; i < SLOTS; ++i) {
            const size_t at = (last_ + 1 + i) % SLOTS;
            Slot& slot = slots_[at];
            if (slot.use) {
                const int answer = driver_.query(slot.event);
                if (answer != SUCCESS && answer != NOT_READY) return answer;
                if (answer == SUCCESS) slot.use = 0;
            }
            if (!slot.use) return choose(at, memory);
            if (slot.use < slots_[oldest].use) oldest = at;
        }
        if (const int error = driver_.wait(slots_[oldest].event)) return error;
        return choose(oldest, memory);
    }

    // Records that copies of the chosen slot are under way.
    int record(void* stream) {
        Slot& slot = slots_[last_];
        slot.use = ++uses_;
        return driver_.record(slot.event, stream);
    }

private:
    struct Slot {
        void* event = nullptr;
        int64_t use = 0;  // the number of the use that may not be over; 0: the slot is free
    };

    Ring(const Driver& driver, void* context, size_t size)
        : driver_(driver), context_(context), size_(size) {}

    // The rings that wait for a user. Never freed: at exit the driver may end before the process.
    static std::unique_ptr<Ring>& first_spare() {
        static auto* const first = new std::unique_ptr<Ring>;
        return *first;
    }

    bool fits(void* context, size_t size) const {
        return context_ == context && size_ == size;
    }

    int allocate() {
        const Relaxed relaxed(driver_);
        void* memory = nullptr;
        if (const int error = driver_.allocate(&memory, SLOTS * size_, PORTABLE)) return error;
        memory_ = static_cast<unsigned char*>(memory);
        for (Slot& slot : slots_)
            if (const int error = driver_.make_event(&slot.event, SLEEPS | UNTIMED)) return error;
        return SUCCESS;
    }

    int choose(size_t slot, unsigned char*& memory) {
        last_ = slot;
        slots_[slot].use = 0;
        memory = memory_ + slot * size_;
        return SUCCESS;
    }

    const Driver& driver_;
    void* const context_;
    const size_t size_;  // of a slot
    unsigned char* memory_ = nullptr;
    Slot slots_[SLOTS];
    size_t last_ = SLOTS - 1;  // the slot chosen last
    int64_t uses_ = 0;
    std::unique_ptr<Ring> next_spare_;
};

}  // namespace clr
