// Devices, their properties, contexts and errors.
#include "device.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

using namespace fake;

namespace {

// The kernels are compiled for this architecture, sm_90.
constexpr int major_version = 9;
constexpr int minor_version = 0;
constexpr int processors = 132;
constexpr int shared_memory = 232448;
constexpr int cuda_version = 13000;

thread_local cudaError_t last_error = cudaSuccess;

// A context is known by its address.
char contexts[most_devices];

int value_of(cudaDeviceAttr attribute) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return major_version;
    case cudaDevAttrComputeCapabilityMinor: return minor_version;
    case cudaDevAttrMultiProcessorCount: return processors;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return shared_memory;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    default: return 1;
    }
}

}  // namespace

cudaError_t fake::failed(cudaError_t error) {
    last_error = error;
    return error;
}

// ---- the runtime

cudaError_t cudaGetDeviceCount(int* count) {
    *count = device_count();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return failed(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = cuda_version;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = cuda_version;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
    *properties = {};
    std::strcpy(properties->name, "Fake device");
    properties->major = major_version;
    properties->minor = minor_version;
    properties->multiProcessorCount = processors;
    properties->totalGlobalMem = size_t(4) << 30;
    properties->sharedMemPerBlock = 49152;
    properties->sharedMemPerBlockOptin = shared_memory;
    properties->sharedMemPerMultiprocessor = shared_memory + 1024;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    for (int i = 0; i < 3; ++i) {
        properties->maxThreadsDim[i] = i < 2 ? 1024 : 64;
        properties->maxGridSize[i] = i < 1 ? 2147483647 : 65535;
    }
    properties->totalConstMem = 65536;
    properties->textureAlignment = 512;
    properties->l2CacheSize = 60 << 20;
    properties->canMapHostMemory = properties->unifiedAddressing = properties->managedMemory = 1;
    properties->concurrentKernels = properties->streamPrioritiesSupported = 1;
    properties->asyncEngineCount = 3;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = value_of(attribute);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* name, int size, int device) {
    std::snprintf(name, size_t(size), "0000:%02x:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
    static thread_local char text[64];
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
        return "operation failed due to a previous error during capture";
    default: std::snprintf(text, sizeof text, "error %d of the fake device", int(error));
    }
    return text;
}

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorOfTheFakeDevice"; }

cudaError_t cudaProfilerStart() { return cudaSuccess; }

cudaError_t cudaProfilerStop() { return cudaSuccess; }

// ---- the driver

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
    *version = cuda_version;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = cudaGetErrorString(cudaError_t(error));
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
    *text = cudaGetErrorName(cudaError_t(error));
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    *count = device_count();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int index) {
    *device = index;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = value_of(cudaDeviceAttr(attribute));
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(&contexts[current_device]);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    current_device = int(reinterpret_cast<char*>(context) - contexts);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = current_device;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = reinterpret_cast<CUcontext>(&contexts[device]);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
    *flags = 0;
    *is_active = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit) {
    *value = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

// torch asks for driver functions by name. A function that we lack says so when called.
cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult* result
) {
    *function = dlsym(RTLD_DEFAULT, (std::string(name) + "_v2").c_str());
    if (*function == nullptr) *function = dlsym(RTLD_DEFAULT, name);
    if (*function == nullptr) {
        static CUresult (*const missing)() = [] { return CUDA_ERROR_NOT_SUPPORTED; };
        *function = reinterpret_cast<void*>(missing);
    }
    if (result != nullptr) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
