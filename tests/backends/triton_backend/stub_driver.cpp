// A libcuda.so.1 that runs nothing and records what it was asked for.
//
// Triton compiles kernels and calls its launcher as if this were NVIDIA's driver. Copies and events
// can be held back, so that a test plays a GPU that lags behind. test_prebound.py builds the library.
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace {

// A call, as ctypes reads it.
struct Record {
    char name[40];       // of the driver's function
    uint64_t object;     // the function, the event, or the address that a copy writes to
    uint64_t stream;
    uint32_t grid[3], block[3], shared, attributes;
    int32_t holds_gil;   // whether the caller held the GIL
    uint32_t size;       // of `bytes`: parameters with their gaps, or the copied bytes
    unsigned char bytes[1024];
};

// What the driver pretends, for tests to set.
struct State {
    uint64_t context = 0xC0;  // the current context; 0: none
    int32_t capture = 0;      // the status of a capture on every stream
    int32_t lags = 0;         // whether copies and events wait for stub_catch_up() or a wait
    int32_t overwritten = 0;  // copies whose source was written before the GPU had read it
    int32_t is_old = 0;       // whether cuFuncGetParamInfo fails, with its own error
    int32_t mode = 0;         // CUstreamCaptureMode of the thread
    int32_t unrelaxed = 0;    // questions that another thread's capture would have forbidden
    int32_t is_silent = 0;    // whether calls leave no record, for measurements of time
};

struct Function {
    std::string name;
    std::map<unsigned, std::pair<size_t, size_t>> parameters;  // offset and size, by number
};
struct Module { std::vector<Function> functions; };
struct Copy {
    const void* source;
    std::string bytes;
};
struct Event {
    bool is_over = true;
    std::vector<Copy> copies;
};

State state;
std::deque<Record> records;
std::vector<Copy> copies;  // that no event follows yet
std::vector<Event*> events;
std::string failing;       // the function that fails
int failure = 0, left = 0;  // its error, and the calls until then

bool holds_gil() {
    static const auto check = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
    return check && check();
}

// The number of a handle or an address.
template <class Handle> uint64_t number(Handle handle) {
    return reinterpret_cast<uint64_t>(handle);
}

Record& note(const char* name, uint64_t object, CUstream stream) {
    static Record unread;
    if (state.is_silent) return unread;
    Record record = {};
    std::strncpy(record.name, name, sizeof record.name - 1);
    record.object = object, record.stream = number(stream);
    record.holds_gil = holds_gil();
    records.push_back(record);
    return records.back();
}

// Returns the error that a test wants of this function now.
CUresult wanted(const char* name) {
    if (failing != name || left-- > 0) return CUDA_SUCCESS;
    failing.clear();
    return static_cast<CUresult>(failure);
}

void end(Event& event) {
    for (const Copy& copy : event.copies)
        state.overwritten += std::memcmp(copy.source, copy.bytes.data(), copy.bytes.size()) != 0;
    event.copies.clear();
    event.is_over = true;
}

void check_mode() { state.unrelaxed += state.mode != CU_STREAM_CAPTURE_MODE_RELAXED; }

// Reads the parameters of a cubin's kernels from its sections .nv.info.<kernel>: a list of
// attributes, of which EIATTR_KPARAM_INFO has number, offset and size of a parameter.
void read_cubin(const unsigned char* image, Module& module) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
    const auto* names =
        reinterpret_cast<const char*>(image + sections[header->e_shstrndx].sh_offset);
    for (int i = 0; i < header->e_shnum; ++i) {
        const std::string name = names + sections[i].sh_name;
        if (name.rfind(".nv.info.", 0) != 0) continue;
        Function function;
        function.name = name.substr(9);
        const unsigned char* at = image + sections[i].sh_offset;
        const unsigned char* const last = at + sections[i].sh_size;
        while (at + 4 <= last) {
            constexpr unsigned char SIZED = 4, KPARAM_INFO = 0x17;
            const unsigned char format = at[0], attribute = at[1];
            uint16_t value, number, offset;
            uint32_t flags;
            std::memcpy(&value, at + 2, 2);
            at += 4;
            if (format != SIZED) continue;
            if (attribute == KPARAM_INFO) {
                std::memcpy(&number, at + 4, 2);
                std::memcpy(&offset, at + 6, 2);
                std::memcpy(&flags, at + 8, 4);
                function.parameters[number] = {offset, flags >> 18};
            }
            at += value;
        }
        module.functions.push_back(function);
    }
}

CUresult launch(const char* name, CUfunction handle, const unsigned (&grid)[3],
                const unsigned (&block)[3], unsigned shared, CUstream stream, void** parameters,
                unsigned attributes) {
    Record& record = note(name, number(handle), stream);
    std::memcpy(record.grid, grid, sizeof grid);
    std::memcpy(record.block, block, sizeof block);
    record.shared = shared, record.attributes = attributes;
    for (const auto& [index, place] : reinterpret_cast<Function*>(handle)->parameters) {
        const auto [offset, size] = place;
        if (offset + size > sizeof record.bytes) return CUDA_ERROR_INVALID_VALUE;
        std::memcpy(record.bytes + offset, parameters[index], size);
        if (offset + size > record.size) record.size = static_cast<uint32_t>(offset + size);
    }
    return wanted(name);
}

}  // namespace

// ---- for tests

extern "C" {

State* stub_state() { return &state; }
size_t stub_count() { return records.size(); }
const Record* stub_record(size_t i) { return &records[i]; }
void stub_clear() { records.clear(); }
// Ends all copies and events.
void stub_catch_up() {
    for (Event* event : events) end(*event);
    events.clear();
}
// Has the call of a function fail that follows `after` more of its calls.
void stub_fail(const char* name, int error, int after) {
    failing = name, failure = error, left = after;
}
// Returns a function that takes parameters of these sizes.
void* stub_function(const size_t* sizes, unsigned count) {
    auto* const function = new Function;
    function->name = "made";
    size_t end = 0;
    for (unsigned i = 0; i < count; ++i) {
        const size_t offset = (end + sizes[i] - 1) / sizes[i] * sizes[i];
        function->parameters[i] = {offset, sizes[i]};
        end = offset + sizes[i];
    }
    return function;
}

// ---- what the library under test calls

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(state.context);
    return wanted("cuCtxGetCurrent");
}
CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    *status = static_cast<CUstreamCaptureStatus>(state.capture);
    return wanted("cuStreamIsCapturing");
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    const int before = state.mode;
    state.mode = *mode, *mode = static_cast<CUstreamCaptureMode>(before);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void** parameters, void**) {
    return launch("cuLaunchKernel", function, {grid_x, grid_y, grid_z},
                  {block_x, block_y, block_z}, shared, stream, parameters, 0);
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    Record& record = note("cuMemcpyHtoDAsync_v2", target, stream);
    record.size = static_cast<uint32_t>(bytes < sizeof record.bytes ? bytes : sizeof record.bytes);
    std::memcpy(record.bytes, source, record.size);
    if (!state.is_silent)
        copies.push_back({source, std::string(static_cast<const char*>(source), bytes)});
    return wanted("cuMemcpyHtoDAsync_v2");
}
CUresult cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
    check_mode();
    *memory = std::malloc(bytes);
    note("cuMemHostAlloc", number(*memory), nullptr);
    return wanted("cuMemHostAlloc");
}
CUresult cuMemFreeHost(void* memory) {
    note("cuMemFreeHost", number(memory), nullptr);
    std::free(memory);
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent* event, unsigned) {
    *event = reinterpret_cast<CUevent>(new Event);
    note("cuEventCreate", number(*event), nullptr);
    return wanted("cuEventCreate");
}
CUresult cuEventRecord(CUevent handle, CUstream stream) {
    note("cuEventRecord", number(handle), stream);
    auto* const event = reinterpret_cast<Event*>(handle);
    event->copies.swap(copies);
    copies.clear();
    event->is_over = false;
    events.push_back(event);
    if (!state.lags) end(*event);
    return wanted("cuEventRecord");
}
CUresult cuEventQuery(CUevent event) {
    check_mode();
    note("cuEventQuery", number(event), nullptr);
    if (const CUresult error = wanted("cuEventQuery")) return error;
    return reinterpret_cast<Event*>(event)->is_over ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}
CUresult cuEventSynchronize(CUevent event) {
    check_mode();
    note("cuEventSynchronize", number(event), nullptr);
    end(*reinterpret_cast<Event*>(event));
    return wanted("cuEventSynchronize");
}
CUresult cuEventDestroy(CUevent event) {
    note("cuEventDestroy_v2", number(event), nullptr);
    delete reinterpret_cast<Event*>(event);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetParamInfo(CUfunction function, size_t number, size_t* offset, size_t* size) {
    const auto& parameters = reinterpret_cast<Function*>(function)->parameters;
    const auto found = parameters.find(static_cast<unsigned>(number));
    if (state.is_old || found == parameters.end()) return CUDA_ERROR_INVALID_VALUE;
    *offset = found->second.first;
    if (size) *size = found->second.second;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    static const std::map<int, const char*> names = {{CUDA_ERROR_INVALID_VALUE,
                                                      "CUDA_ERROR_INVALID_VALUE"},
                                                     {CUDA_ERROR_OUT_OF_MEMORY,
                                                      "CUDA_ERROR_OUT_OF_MEMORY"},
                                                     {CUDA_ERROR_ILLEGAL_ADDRESS,
                                                      "CUDA_ERROR_ILLEGAL_ADDRESS"}};
    const auto found = names.find(error);
    if (found == names.end()) return CUDA_ERROR_INVALID_VALUE;
    *name = found->second;
    return CUDA_SUCCESS;
}

// ---- what Triton calls beside that

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) {
    return *text = "an error of the stub", CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    static const std::map<int, int> values = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 227 << 10},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 228 << 10},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
        {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
        {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 1 << 16}};
    const auto found = values.find(attribute);
    return *value = found == values.end() ? 1 : found->second, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return cuCtxGetCurrent(context); }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    auto* const loaded = new Module;
    read_cubin(static_cast<const unsigned char*>(image), *loaded);
    return *module = reinterpret_cast<CUmodule>(loaded), CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    for (Function& each : reinterpret_cast<Module*>(module)->functions)
        if (each.name == name)
            return *function = reinterpret_cast<CUfunction>(&each), CUDA_SUCCESS;
    return CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
    return std::memcpy(value, &pointer, sizeof pointer), CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned, CUpointer_attribute*, void**, CUdeviceptr) {
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void**) {
    return launch("cuLaunchKernelEx", function,
                  {config->gridDimX, config->gridDimY, config->gridDimZ},
                  {config->blockDimX, config->blockDimY, config->blockDimZ},
                  config->sharedMemBytes, config->hStream, parameters, config->numAttrs);
}
CUresult cuOccupancyMaxActiveClusters(int*, CUfunction, const CUlaunchConfig*) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                 const cuuint64_t*, const cuuint64_t*, const int*, const int*,
                                 cuuint32_t, cuuint32_t, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

}  // extern "C"
