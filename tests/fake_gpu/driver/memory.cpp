// Allocations and copies. Device memory and pinned memory are memory of the host.
#include "device.h"

#include <cstdlib>
#include <cstring>

namespace fake {
namespace {

struct Allocation {
    size_t size;
    Place place;
    int device;
};

constexpr size_t page = 4096;
// Values that no test expects: of new memory, and of freed memory.
constexpr int fresh_byte = 0xA5;
constexpr int freed_byte = 0xDD;

std::map<uintptr_t, Allocation>& allocations() {
    static auto* only = new std::map<uintptr_t, Allocation>;
    return *only;
}

// Returns the allocation that holds this address, or end().
std::map<uintptr_t, Allocation>::const_iterator find(uintptr_t address) {
    auto& all = allocations();
    auto found = all.upper_bound(address);
    if (found == all.begin()) return all.end();
    --found;
    return address < found->first + found->second.size ? found : all.end();
}

cudaError_t allocate(void** pointer, size_t size, Place place, const char* call) {
    Lock lock;
    if (forbidden(call)) return failed(cudaErrorStreamCaptureUnsupported);
    const size_t pages = (size + page - 1) / page * page;
    *pointer = std::aligned_alloc(page, pages);
    std::memset(*pointer, fresh_byte, pages);
    allocations()[uintptr_t(*pointer)] = {size, place, current_device};
    return cudaSuccess;
}

// Waits for all streams, as CUDA does, and frees.
cudaError_t release(void* pointer, const char* call) {
    if (pointer == nullptr) return cudaSuccess;
    Lock lock;
    if (forbidden(call)) return failed(cudaErrorStreamCaptureUnsupported);
    wait_for_everything();
    const auto found = allocations().find(uintptr_t(pointer));
    if (found == allocations().end()) return failed(cudaErrorInvalidValue);
    std::memset(pointer, freed_byte, found->second.size);
    allocations().erase(found);
    std::free(pointer);
    return cudaSuccess;
}

// Appends a copy. CUDA reads pageable memory before the call returns and waits after a write to
// pageable memory; the device reads and writes pinned memory when the stream reaches the copy.
cudaError_t copy(void* to, const void* from, size_t size, Stream* stream) {
    const bool reads_pageable = place_of(from) == Place::pageable;
    const bool writes_pageable = place_of(to) == Place::pageable;
    if (stream->capture && (reads_pageable || writes_pageable)) {
        violation("a captured copy of pageable memory");
    }
    Operation operation{"copy " + std::to_string(size), nullptr};
    if (reads_pageable && !stream->capture) {
        const auto* begin = static_cast<const char*>(from);
        auto bytes = std::make_shared<std::vector<char>>(begin, begin + size);
        operation.run = [=] { std::memcpy(to, bytes->data(), size); };
    } else {
        operation.run = [=] { std::memmove(to, from, size); };
    }
    append(stream, std::move(operation));
    if (writes_pageable && !stream->capture) wait_for(stream);
    return cudaSuccess;
}

}  // namespace

Place place_of(const void* pointer) {
    const auto found = find(uintptr_t(pointer));
    return found == allocations().end() ? Place::pageable : found->second.place;
}

int owner_of(const void* pointer) {
    const auto found = find(uintptr_t(pointer));
    const bool is_known = found != allocations().end() && found->second.place == Place::device;
    return is_known ? found->second.device : -1;
}

bool is_device_memory(uintptr_t begin, uintptr_t end) {
    const auto found = find(begin);
    if (found == allocations().end() || found->second.place != Place::device) return false;
    return end <= found->first + found->second.size;
}

}  // namespace fake

using namespace fake;

// ---- the runtime

cudaError_t cudaMalloc(void** pointer, size_t size) {
    return allocate(pointer, size, Place::device, "cudaMalloc");
}

cudaError_t cudaFree(void* pointer) { return release(pointer, "cudaFree"); }

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
    return allocate(pointer, size, Place::pinned, "cudaHostAlloc");
}

cudaError_t cudaFreeHost(void* pointer) { return release(pointer, "cudaFreeHost"); }

cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
    Lock lock;
    allocations()[uintptr_t(pointer)] = {size, Place::pinned, current_device};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
    Lock lock;
    wait_for_everything();
    allocations().erase(uintptr_t(pointer));
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    Lock lock;
    const Place place = place_of(pointer);
    *attributes = {};
    attributes->type = place == Place::device   ? cudaMemoryTypeDevice
                       : place == Place::pinned ? cudaMemoryTypeHost
                                                : cudaMemoryTypeUnregistered;
    attributes->device = std::max(owner_of(pointer), 0);
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream
) {
    Lock lock;
    return copy(to, from, size, stream_of(stream));
}

cudaError_t cudaMemcpyPeerAsync(
    void* to, int, const void* from, int, size_t size, cudaStream_t stream
) {
    Lock lock;
    return copy(to, from, size, stream_of(stream));
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    Lock lock;
    if (forbidden("cudaMemcpy")) return failed(cudaErrorStreamCaptureUnsupported);
    Stream* stream = stream_of(nullptr);
    copy(to, from, size, stream);
    wait_for(stream);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
    Lock lock;
    append(stream_of(stream), {"set " + std::to_string(size), [=] { std::memset(to, value, size); }});
    return cudaSuccess;
}

cudaError_t cudaMemset(void* to, int value, size_t size) {
    return cudaMemsetAsync(to, value, size, nullptr);
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
    *total = size_t(4) << 30;
    *available = size_t(3) << 30;
    return cudaSuccess;
}

// ---- the driver

CUresult cuMemHostAlloc(void** pointer, size_t size, unsigned) {
    return CUresult(allocate(pointer, size, Place::pinned, "cuMemHostAlloc"));
}

CUresult cuMemFreeHost(void* pointer) { return CUresult(release(pointer, "cuMemFreeHost")); }

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
    Lock lock;
    return CUresult(copy(reinterpret_cast<void*>(to), from, size, stream_of(stream)));
}

// Triton's launcher asks whether the device can reach a pointer.
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    Lock lock;
    if (place_of(reinterpret_cast<void*>(pointer)) == Place::pageable) return CUDA_ERROR_INVALID_VALUE;
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
    *static_cast<CUdeviceptr*>(value) = pointer;
    return CUDA_SUCCESS;
}
