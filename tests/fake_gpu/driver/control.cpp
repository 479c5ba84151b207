// The functions by which Python controls the fake device.
#include "control.h"

using namespace fake;

namespace {

using KernelRunner = void (*)(uint64_t, unsigned, unsigned, unsigned, const uint8_t*);
using OperationRunner = void (*)(uint64_t);

KernelRunner kernel_runner = nullptr;
OperationRunner operation_runner = nullptr;

// Keeps a text alive until the thread asks for the next.
const char* handed_out(std::string text) {
    static thread_local std::string kept;
    kept = std::move(text);
    return kept.c_str();
}

}  // namespace

void fake::run_kernel(CUfunction function, dim3 grid, const uint8_t* parameters) {
    if (kernel_runner == nullptr) return;
    kernel_runner(reinterpret_cast<uint64_t>(function), grid.x, grid.y, grid.z, parameters);
}

extern "C" {

// Sets the functions that run kernels and operations. Null ends the use of Python.
void fake_set_runners(KernelRunner kernels, OperationRunner operations) {
    Lock lock;
    if (kernels == nullptr) wait_for_everything();
    kernel_runner = kernels;
    operation_runner = operations;
}

void fake_set_order(int order, uint64_t seed) {
    Lock lock;
    set_order(Order(order), seed);
}

void fake_finish() {
    Lock lock;
    wait_for_everything();
}

void fake_finish_stream(uint64_t stream) {
    Lock lock;
    wait_for(stream_of(reinterpret_cast<cudaStream_t>(stream)));
}

// Appends an operation that Python runs by its number. Returns whether a capture has taken it.
int fake_append(uint64_t handle, uint64_t number, const char* name) {
    Lock lock;
    Stream* stream = stream_of(reinterpret_cast<cudaStream_t>(handle));
    append(stream, {name, [=] {
                        if (operation_runner != nullptr) operation_runner(number);
                    }});
    return stream->capture != nullptr;
}

int fake_is_device_memory(uint64_t begin, uint64_t end) {
    Lock lock;
    return is_device_memory(begin, end);
}

void fake_add_violation(const char* what) {
    Lock lock;
    violation(what);
}

const char* fake_take_violations() {
    Lock lock;
    return handed_out(take_violations());
}

const char* fake_last_graph() {
    Lock lock;
    return handed_out(last_graph());
}

}  // extern "C"
