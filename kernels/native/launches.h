// Launches: the kernels of one device's step, launched through the driver without Triton.
//
// After a step through Triton, Python hands over each kernel's function and packed parameters. Later
// steps launch the same kernels. Only the addresses of gradients change from step to step. They reach
// the kernels by a table on the device, which a step uploads if an address has changed, or by the
// parameters.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "bucket.h"
#include "ring.h"
#include "signals.h"

namespace clr {

// The addresses of a bucket's gradients, in a table on the device or in parameters.
struct AddressTable {
    Ref object;  // the Python object of the bucket
    const Bucket* bucket = nullptr;
    int64_t edition = 0;     // of the rows that the device has
    uint64_t place = 0;      // of the table on the device; 0: the addresses are parameters
    // The addresses that the device has, or that the last step wrote into parameters.
    std::vector<const void*> content;
    bool is_outdated = false;  // whether a scan has found other addresses

    size_t bytes() const { return content.size() * sizeof(void*); }
};

// A launch of a kernel.
struct Launch {
    void* function = nullptr;
    unsigned grid[3] = {1, 1, 1}, threads = 1, shared = 0;
    std::vector<unsigned char> parameters;  // packed, each at a multiple of its size
    std::vector<size_t> offsets;            // where each parameter begins
    Ref keep;                               // Python objects that the launch needs alive
    bool takes_addresses = false;           // whether some parameters are addresses of gradients
    size_t table = 0, begin = 0;            // their table by number, and where they begin
    // Where the addresses of a GradScaler's signals are among the parameters, if they are.
    static constexpr size_t NOWHERE = SIZE_MAX;
    size_t grad_scale = NOWHERE, found_inf = NOWHERE;
};

// A launch that updates one row of a bucket, any of them.
struct RowLaunch : Launch {
    Ref object;  // the Python object of the bucket
    const Bucket* bucket = nullptr;
    int64_t edition = 0;  // of the rows that the device has
    // Where the row's number, the address of its gradient and its blocks per chunk are among the
    // parameters.
    size_t row = 0, gradient = 0, blocks = 0;
    std::vector<int64_t> shapes;  // programs and blocks per chunk of each row
};

// A Python object that must be empty. With a name, the object's attribute must be empty; with a value,
// the attribute must be this value.
struct Watch {
    Ref object, name, value;

    // Reading an attribute may run Python code.
    bool is_unchanged() const {
        const Ref now(name ? PyObject_GetAttr(object.get(), name.get()) : Py_NewRef(object.get()));
        if (value) return now.is(value.get());
        return now && PyObject_Size(now.get()) == 0;
    }
};

class Launches {
public:
    // The largest numbers of parameters, and of addresses among them.
    static constexpr size_t MOST_PARAMETERS = 64, MOST_ADDRESSES = 8;

    Ref device;          // its index, for torch
    bool clips = false;  // whether the kernels clip the gradients
    std::vector<Watch> watches;

    // Binds to the current context. Returns false with an exception set if there is none.
    bool begin() {
        driver_ = driver();
        if (!driver_) {
            PyErr_SetString(PyExc_RuntimeError, "no driver of a GPU is loaded");
            return false;
        }
        void* context = nullptr;
        if (const int error = driver_->context(&context))
            return raise_driver_error(*driver_, "name its context", error), false;
        if (!context) {
            PyErr_SetString(PyExc_RuntimeError, "this thread uses no GPU");
            return false;
        }
        context_ = context, process_ = process_id();
        return current_stream(stream_);
    }

    // Refuses a change of launches that are complete.
    bool can_grow() const {
        if (!is_complete_ && context_) return true;
        PyErr_SetString(PyExc_RuntimeError, "launches cannot change after they were bound or run");
        return false;
    }

    // Adds the table of a bucket's gradients. The device has the addresses of the last scan.
    void add_table(PyObject* object, const Bucket& bucket, uint64_t place) {
        AddressTable table;
        table.object = Ref::to(object), table.bucket = &bucket;
        table.edition = bucket.edition, table.content = bucket.gradients;
        table.place = place;
        tables_.push_back(std::move(table));
    }
    AddressTable* find(const Bucket& bucket) {
        for (AddressTable& each : tables_)
            if (each.bucket == &bucket) return &each;
        return nullptr;
    }
    size_t index_of(const AddressTable& table) const { return size_t(&table - tables_.data()); }

    void add(Launch&& launch) {
        takes_grad_scale_ = takes_grad_scale_ || launch.grad_scale != Launch::NOWHERE;
        takes_found_inf_ = takes_found_inf_ || launch.found_inf != Launch::NOWHERE;
        launches_.push_back(std::move(launch));
    }

    void add(RowLaunch&& launch) { row_launches_.push_back(std::move(launch)); }

    // Returns whether the driver expects exactly the parameters of a launch, or cannot tell.
    bool fits(const Launch& launch, const std::vector<size_t>& sizes) const {
        if (!driver_->parameter) return true;
        size_t offset = 0, bytes = 0;
        for (size_t i = 0; i < sizes.size(); ++i)
            if (driver_->parameter(launch.function, i, &offset, &bytes) != SUCCESS ||
                offset != launch.offsets[i] || bytes != sizes[i])
                return false;
        return driver_->parameter(launch.function, sizes.size(), &offset, &bytes) != SUCCESS;
    }

    // Returns whether the launches have the tables of exactly these buckets.
    bool serve(const std::vector<Bucket*>& buckets) {
        for (const Bucket* bucket : buckets)
            if (!find(*bucket)) return false;
        return tables_.size() == buckets.size();
    }

    // Ends the making. Returns false with an exception set if memory for uploads is missing.
    bool complete() {
        is_complete_ = true;
        size_t bytes = 0;
        for (const AddressTable& each : tables_)
            if (each.place) bytes += each.bytes();
        if (!bytes || ring_) return true;
        int error = SUCCESS;
        std::unique_ptr<Ring> ring = Ring::take(*driver_, context_, bytes, error);
        if (!ring) return raise_driver_error(*driver_, "allocate pinned memory", error), false;
        // Another thread may have made the ring meanwhile: taking one gives the GIL away.
        if (ring_) Ring::give_back(std::move(ring));
        else ring_ = std::move(ring);
        return true;
    }

    // ---- a step

    // Returns whether no other code observes Triton's launches, in the process of the driver. Ask before
    // a scan: reading an attribute may run Python code. After false, Ctrl-C may be set as exception.
    bool is_unobserved() const {
        if (!context_ || is_broken_ || is_running_ || process_ != process_id()) return false;
        for (const Watch& each : watches)
            if (!each.is_unchanged()) return clear_exception(), false;
        return true;
    }

    // Returns whether the kernels read exactly the signals that a GradScaler has given. Ask before a
    // scan: torch, which is asked about the signals, gives the GIL away.
    bool take(const Signals& signals) const {
        return bool(signals.grad_scale) == takes_grad_scale_ &&
               bool(signals.found_inf) == takes_found_inf_ && is_plain(signals.grad_scale) &&
               is_plain(signals.found_inf);
    }

    // Returns whether the launches can serve, with the addresses that a scan has just found. They
    // serve one stream: torch's allocator must know every stream that reads the tables.
    bool is_ready(const Signals& signals) {
        grad_scale_ = found_inf_ = nullptr;
        if (signals && (tables_.empty() || !read_addresses(signals))) return false;
        for (AddressTable& each : tables_)
            if (!is_served(each)) return false;
        return is_on_stream();
    }

    // Returns whether context and stream are those of the making, and no capture is under way. After
    // false, Ctrl-C may be set as exception.
    bool is_on_stream() const {
        void* context = nullptr;
        if (driver_->context(&context) != SUCCESS || context != context_) return false;
        void* stream = nullptr;
        if (!current_stream(stream)) return clear_exception(), false;
        if (stream != stream_) return false;
        int status = NOT_CAPTURING;
        return driver_->capture_status(stream_, &status) == SUCCESS && status == NOT_CAPTURING;
    }

    // Uploads the addresses that have moved, and launches the kernels. The GIL is given away, since
    // a full queue of launches blocks. Returns false with an exception set on an error of the driver,
    // after which the launches serve no more.
    bool run() {
        has_begun_ = false;
        if (!complete()) return false;
        is_running_ = true;
        const char* failed = nullptr;
        int error = SUCCESS;
        {
            const WithoutGil without_gil(true);
            error = upload(failed);
            if (error == SUCCESS) error = launch(failed);
        }
        is_running_ = false;
        if (error == SUCCESS) return true;
        is_broken_ = true;
        raise_driver_error(*driver_, failed, error);
        return false;
    }

    // Updates a row of the bucket that was added in this place; `is_served` is false if the launches
    // cannot serve. Returns false with an exception set on an error of the driver.
    bool run_row(size_t place, int64_t row, bool& is_served) {
        is_served = false;
        if (!is_unobserved() || place >= row_launches_.size()) return !PyErr_Occurred();
        RowLaunch& each = row_launches_[place];
        const Bucket& bucket = *each.bucket;
        const size_t i = size_t(row);
        if (each.edition != bucket.edition || row < 0 || 2 * i >= each.shapes.size() || !is_on_stream())
            return !PyErr_Occurred();
        is_served = is_complete_ = is_running_ = true;
        const auto write = [&](size_t at, const void* from, size_t size) {
            std::memcpy(each.parameters.data() + at, from, size);
        };
        const int32_t number = int32_t(row), blocks = int32_t(each.shapes[2 * i + 1]);
        write(each.row, &number, sizeof number), write(each.blocks, &blocks, sizeof blocks);
        write(each.gradient, &bucket.gradients[i], sizeof(void*));
        each.grid[0] = unsigned(each.shapes[2 * i]);
        int error = SUCCESS;
        {
            const WithoutGil without_gil(true);
            error = launch(each);
        }
        is_running_ = false;
        if (error == SUCCESS) return true;
        is_broken_ = true;
        raise_driver_error(*driver_, "launch a kernel", error);
        return false;
    }

    // Whether the last run has launched a kernel.
    bool has_begun() const { return has_begun_; }

    int visit(visitproc visit, void* arg) const {
        Py_VISIT(device.get());
        for (const Watch& each : watches) {
            Py_VISIT(each.object.get());
            Py_VISIT(each.name.get());
            Py_VISIT(each.value.get());
        }
        for (const AddressTable& each : tables_) Py_VISIT(each.object.get());
        for (const Launch& each : launches_) Py_VISIT(each.keep.get());
        for (const RowLaunch& each : row_launches_) {
            Py_VISIT(each.keep.get());
            Py_VISIT(each.object.get());
        }
        return 0;
    }
    void clear() {
        context_ = nullptr;
        // A copy may be under way that no event records. Its memory stays for good.
        if (is_broken_) ring_.release();
        else if (ring_) Ring::give_back(std::move(ring_));
        const auto old_watches = std::exchange(watches, {});
        const auto old_tables = std::exchange(tables_, {});
        const auto old_launches = std::exchange(launches_, {});
        const auto old_row_launches = std::exchange(row_launches_, {});
        const Ref old_device = std::move(device);
    }

private:
    // Returns whether the kernels can read the gradients of a bucket; notes whether any has moved.
    bool is_served(AddressTable& table) const {
        const Bucket& bucket = *table.bucket;
        if (bucket.edition != table.edition || bucket.gradients.size() != table.content.size())
            return false;
        table.is_outdated = table.content != bucket.gradients;
        return true;
    }

    bool read_addresses(const Signals& signals) {
        const Bucket& bucket = *tables_.front().bucket;
        return (!signals.grad_scale || read_address(signals.grad_scale, bucket, grad_scale_)) &&
               (!signals.found_inf || read_address(signals.found_inf, bucket, found_inf_));
    }

    // Asks torch for the current stream of the device. Returns false with an exception set if torch
    // cannot tell.
    bool current_stream(void*& stream) const {
        if (!torch().current_stream || torch().current_stream.is(Py_None)) {
            PyErr_SetString(PyExc_RuntimeError, "this torch cannot name its current stream");
            return false;
        }
        const Ref found(PyObject_CallFunctionObjArgs(torch().current_stream.get(), device.get(),
                                                     nullptr));
        stream = found ? PyLong_AsVoidPtr(found.get()) : nullptr;
        return !PyErr_Occurred();
    }

    int upload(const char*& failed) {
        failed = "upload the addresses of gradients";
        unsigned char* memory = nullptr;
        size_t at = 0;
        for (AddressTable& each : tables_) {
            if (!each.is_outdated) continue;
            const auto& addresses = each.bucket->gradients;
            std::copy(addresses.begin(), addresses.end(), each.content.begin());
            if (!each.place || each.content.empty()) continue;
            if (!memory)
                if (const int error = ring_->next(memory)) return error;
            std::memcpy(memory + at, each.content.data(), each.bytes());
            if (const int error = driver_->upload(each.place, memory + at, each.bytes(), stream_))
                return error;
            at += each.bytes();
        }
        return memory ? ring_->record(stream_) : SUCCESS;
    }

    int launch(const char*& failed) {
        failed = "launch a kernel";
        for (Launch& each : launches_) {
            if (each.takes_addresses) {
                const AddressTable& table = tables_[each.table];
                std::memcpy(each.parameters.data() + each.begin, table.content.data(),
                            table.bytes());
            }
            write(grad_scale_, each.grad_scale, each);
            write(found_inf_, each.found_inf, each);
            if (const int error = launch(each)) return error;
            has_begun_ = true;
        }
        return SUCCESS;
    }

    int launch(Launch& each) {
        void* parameters[MOST_PARAMETERS];
        for (size_t i = 0; i < each.offsets.size(); ++i)
            parameters[i] = each.parameters.data() + each.offsets[i];
        return driver_->launch(each.function, each.grid[0], each.grid[1], each.grid[2], each.threads,
                               1, 1, each.shared, stream_, parameters, nullptr);
    }

    // Writes the address of a signal among the parameters. Without a signal they stay.
    static void write(const void* signal, size_t place, Launch& launch) {
        if (signal && place != Launch::NOWHERE)
            std::memcpy(launch.parameters.data() + place, &signal, sizeof signal);
    }

    const Driver* driver_ = nullptr;
    void* context_ = nullptr;  // null: the garbage collector has cleared the launches
    int64_t process_ = 0;
    std::vector<AddressTable> tables_;
    std::vector<Launch> launches_;
    std::vector<RowLaunch> row_launches_;
    std::unique_ptr<Ring> ring_;
    bool takes_grad_scale_ = false, takes_found_inf_ = false;  // whether any launch reads them
    const void *grad_scale_ = nullptr, *found_inf_ = nullptr;  // of the step under way
    void* stream_ = nullptr;  // the stream that was current when the launches were made
    bool is_complete_ = false, is_running_ = false, has_begun_ = false;
    bool is_broken_ = false;  // an error of the driver has ended a step midway
};

}  // namespace clr
