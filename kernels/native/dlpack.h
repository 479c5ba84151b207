// DLPack's C exchange API, version 1: how to read a tensor's address, dtype, sizes and strides.
//
// torch offers the API as a capsule on the class torch.Tensor, so that no header of torch is needed.
#pragma once

#include <cstdint>

#include "python.h"

namespace clr {

struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*view)(void* object, DLTensor* out);
    void* current_work_stream;
};
constexpr uint32_t DLPACK_MAJOR = 1;
constexpr int32_t ON_CPU = 1;  // the device type of the CPU

// Returns null if torch offers another version only.
inline const ExchangeApi* exchange_api(PyObject* capsule) {
    auto api = static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    while (api && api->major > DLPACK_MAJOR) api = api->previous;
    return api && api->major == DLPACK_MAJOR && api->view ? api : nullptr;
}

}  // namespace clr
