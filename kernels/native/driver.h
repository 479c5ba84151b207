// The functions of a GPU's driver, found in the library that torch has loaded.
//
// No header of CUDA or HIP is needed, and the extension links to neither. Each function has the
// signature of CUDA's driver. HIP's functions take the same arguments, but no AMD GPU has run them.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#include <process.h>
#else
#include <dlfcn.h>
#include <unistd.h>
#endif

#include "python.h"

namespace clr {

// Values of CUresult, CUstreamCaptureStatus, CUstreamCaptureMode and of flags. HIP has the same.
constexpr int SUCCESS = 0;           // CUDA_SUCCESS
constexpr int NOT_READY = 600;       // CUDA_ERROR_NOT_READY
constexpr int NOT_CAPTURING = 0;     // CU_STREAM_CAPTURE_STATUS_NONE
constexpr int RELAXED = 2;           // CU_STREAM_CAPTURE_MODE_RELAXED
constexpr unsigned PORTABLE = 1;     // CU_MEMHOSTALLOC_PORTABLE: pinned for every context
constexpr unsigned SLEEPS = 1;       // CU_EVENT_BLOCKING_SYNC: a waiting thread leaves the CPU
constexpr unsigned UNTIMED = 2;      // CU_EVENT_DISABLE_TIMING

struct Driver {
    int (*context)(void** context);                    // cuCtxGetCurrent
    int (*capture_status)(void* stream, int* status);  // cuStreamIsCapturing
    int (*exchange_mode)(int* mode);                   // cuThreadExchangeStreamCaptureMode
    int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                  unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                  void* stream, void** parameters, void** extra);  // cuLaunchKernel
    int (*upload)(uint64_t target, const void* source, size_t bytes,
                  void* stream);                                         // cuMemcpyHtoDAsync_v2
    int (*allocate)(void** memory, size_t bytes, unsigned flags);        // cuMemHostAlloc
    int (*free)(void* memory);                                           // cuMemFreeHost
    int (*make_event)(void** event, unsigned flags);                     // cuEventCreate
    int (*record)(void* event, void* stream);                            // cuEventRecord
    int (*query)(void* event);                                           // cuEventQuery
    int (*wait)(void* event);                                            // cuEventSynchronize
    int (*end_event)(void* event);                                       // cuEventDestroy_v2
    int (*error_name)(int error, const char** name);                     // cuGetErrorName
    // cuFuncGetParamInfo, of CUDA 12.4 and later; null if the driver lacks it
    int (*parameter)(void* function, size_t index, size_t* offset, size_t* bytes);
};

#ifdef _WIN32

inline const Driver* driver() { return nullptr; }
inline int64_t process_id() { return _getpid(); }

#else

class Library {
public:
    // Opens a library only if this process has loaded it.
    explicit Library(const char* name) : handle_(dlopen(name, RTLD_NOLOAD | RTLD_LAZY)) {}
    explicit operator bool() const { return handle_; }

    template <class Function> bool find(const char* name, Function& function) const {
        function = reinterpret_cast<Function>(dlsym(handle_, name));
        return function;
    }

private:
    void* handle_;
};

// Finds the functions of a driver in a library, by their names in the order of Driver; the last one
// may be missing, or have no name.
inline bool find_all(Driver& d, const char* library_name, const char* const (&names)[14]) {
    const Library library(library_name);
    if (!library) return false;
    d.parameter = nullptr;
    if (names[13]) library.find(names[13], d.parameter);
    return library.find(names[0], d.context) && library.find(names[1], d.capture_status) &&
           library.find(names[2], d.exchange_mode) && library.find(names[3], d.launch) &&
           library.find(names[4], d.upload) && library.find(names[5], d.allocate) &&
           library.find(names[6], d.free) && library.find(names[7], d.make_event) &&
           library.find(names[8], d.record) && library.find(names[9], d.query) &&
           library.find(names[10], d.wait) && library.find(names[11], d.end_event) &&
           library.find(names[12], d.error_name);
}

constexpr const char* CUDA[14] = {
    "cuCtxGetCurrent", "cuStreamIsCapturing", "cuThreadExchangeStreamCaptureMode",
    "cuLaunchKernel", "cuMemcpyHtoDAsync_v2", "cuMemHostAlloc", "cuMemFreeHost", "cuEventCreate",
    "cuEventRecord", "cuEventQuery", "cuEventSynchronize", "cuEventDestroy_v2", "cuGetErrorName",
    "cuFuncGetParamInfo"};
constexpr const char* HIP[14] = {
    "hipCtxGetCurrent", "hipStreamIsCapturing", "hipThreadExchangeStreamCaptureMode",
    "hipModuleLaunchKernel", "hipMemcpyHtoDAsync", "hipHostMalloc", "hipHostFree",
    "hipEventCreateWithFlags", "hipEventRecord", "hipEventQuery", "hipEventSynchronize",
    "hipEventDestroy", "hipDrvGetErrorName", nullptr};

// Returns the driver's functions, or null if this process has loaded no driver.
inline const Driver* driver() {
    static Driver found;
    static bool is_found = false;  // a driver may be loaded later, but is never unloaded
    if (!is_found)
        is_found = find_all(found, "libcuda.so.1", CUDA) ||
                   find_all(found, "libamdhip64.so", HIP) ||
                   find_all(found, "libamdhip64.so.7", HIP) ||
                   find_all(found, "libamdhip64.so.6", HIP);
    return is_found ? &found : nullptr;
}

// The number of this process. A forked process must not call the driver.
inline int64_t process_id() { return getpid(); }

#endif

// Sets a RuntimeError that names the function and the driver's error.
inline void raise_driver_error(const Driver& driver, const char* function, int error) {
    const char* name = nullptr;
    if (driver.error_name(error, &name) != SUCCESS || !name) name = "an unknown error";
    PyErr_Format(PyExc_RuntimeError, "the GPU's driver could not %s: %s (%d)", function, name,
                 error);
}

// Allows this thread questions that another thread's capture would forbid.
class Relaxed {
public:
    explicit Relaxed(const Driver& driver) : driver_(driver) {
        is_exchanged_ = driver_.exchange_mode(&mode_) == SUCCESS;
    }
    Relaxed(const Relaxed&) = delete;
    ~Relaxed() {
        if (is_exchanged_) driver_.exchange_mode(&mode_);
    }

private:
    const Driver& driver_;
    int mode_ = RELAXED;
    bool is_exchanged_;
};

}  // namespace clr
