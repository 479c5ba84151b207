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

inline bool find_cuda(Driver& d) {
    const Library library("libcuda.so.1");
    if (!library) return false;
    library.find("cuFuncGetParamInfo", d.parameter);
    return library.find("cuCtxGetCurrent", d.context) &&
           library.find("cuStreamIsCapturing", d.capture_status) &&
           library.find("cuThreadExchangeStreamCaptureMode", d.exchange_mode) &&
           library.find("cuLaunchKernel", d.launch) &&
           library.find("cuMemcpyHtoDAsync_v2", d.upload) &&
           library.find("cuMemHostAlloc", d.allocate) && library.find("cuMemFreeHost", d.free) &&
           library.find("cuEventCreate", d.make_event) &&
           library.find("cuEventRecord", d.record) && library.find("cuEventQuery", d.query) &&
           library.find("cuEventSynchronize", d.wait) &&
           library.find("cuEventDestroy_v2", d.end_event) &&
           library.find("cuGetErrorName", d.error_name);
}

inline bool find_hip(Driver& d, const char* name) {
    const Library library(name);
    if (!library) return false;
    d.parameter = nullptr;
    return library.find("hipCtxGetCurrent", d.context) &&
           library.find("hipStreamIsCapturing", d.capture_status) &&
           library.find("hipThreadExchangeStreamCaptureMode", d.exchange_mode) &&
           library.find("hipModuleLaunchKernel", d.launch) &&
           library.find("hipMemcpyHtoDAsync", d.upload) &&
           library.find("hipHostMalloc", d.allocate) && library.find("hipHostFree", d.free) &&
           library.find("hipEventCreateWithFlags", d.make_event) &&
           library.find("hipEventRecord", d.record) && library.find("hipEventQuery", d.query) &&
           library.find("hipEventSynchronize", d.wait) &&
           library.find("hipEventDestroy", d.end_event) &&
           library.find("hipDrvGetErrorName", d.error_name);
}

// Returns the driver's functions, or null if this process has loaded no driver.
inline const Driver* driver() {
    static Driver found;
    static bool is_found = false;  // a driver may be loaded later, but is never unloaded
    if (!is_found)
        is_found = find_cuda(found) || find_hip(found, "libamdhip64.so") ||
                   find_hip(found, "libamdhip64.so.7") || find_hip(found, "libamdhip64.so.6");
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
