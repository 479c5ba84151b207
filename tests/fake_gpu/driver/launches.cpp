// Launches: Triton's kernels by the driver, torch's own kernels by the runtime.
//
// The device runs a Triton kernel by a call of Python, see kernels.py. torch's operations never
// arrive here, since operations.py runs them on the CPU: each kernel of torch is a violation.
#include "device.h"

#include <cxxabi.h>
#include <elf.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "control.h"

using namespace fake;

namespace {

struct Parameter {
    size_t offset = 0;
    size_t size = 0;
};

struct Function {
    std::string name;
    int device = 0;
    std::vector<Parameter> parameters;
    bool is_loaded = true;
};

// A module is never freed: launches in a queue refer to its functions.
struct Module {
    std::vector<std::unique_ptr<Function>> functions;
};

Function* function_of(CUfunction handle) { return reinterpret_cast<Function*>(handle); }

template <class T> T read(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Reads the table of parameters in a section `.nv.info.<kernel>` of a cubin.
std::vector<Parameter> parameters_in(const uint8_t* begin, const uint8_t* end) {
    constexpr uint8_t sized = 4;              // an entry followed by as many bytes as it says
    constexpr uint8_t parameter_info = 0x17;  // EIATTR_KPARAM_INFO
    std::vector<Parameter> found;
    while (begin + 4 <= end) {
        const uint8_t format = begin[0], attribute = begin[1];
        const size_t size = read<uint16_t>(begin + 2);
        begin += 4;
        if (format != sized) continue;
        if (attribute == parameter_info) {
            const size_t number = read<uint16_t>(begin + 4);
            found.resize(std::max(found.size(), number + 1));
            found[number] = {read<uint16_t>(begin + 6), read<uint32_t>(begin + 8) >> 18};
        }
        begin += size;
    }
    return found;
}

void check(const Function* function, const Stream* stream, const std::vector<uint8_t>& packed) {
    if (!function->is_loaded) violation(function->name + ": launched after its module's end");
    if (function->device != stream->device || stream->device != current_device) {
        violation(function->name + ": launched on a stream of another device");
    }
    for (const Parameter& parameter : function->parameters) {
        if (parameter.size != sizeof(void*)) continue;
        const int owner = owner_of(read<const void*>(&packed[parameter.offset]));
        if (owner >= 0 && owner != stream->device) {
            violation(function->name + ": receives memory of another device");
        }
    }
}

CUresult launch(CUfunction handle, dim3 grid, CUstream on, void** arguments) {
    Lock lock;
    const Function* function = function_of(handle);
    Stream* stream = stream_of(on);
    size_t size = 0;
    for (const Parameter& each : function->parameters) {
        size = std::max(size, each.offset + each.size);
    }
    std::vector<uint8_t> packed(size);
    for (size_t i = 0; i < function->parameters.size(); ++i) {
        const Parameter& parameter = function->parameters[i];
        std::memcpy(&packed[parameter.offset], arguments[i], parameter.size);
    }
    check(function, stream, packed);
    append(stream, {function->name, [=] { run_kernel(handle, grid, packed.data()); }});
    return CUDA_SUCCESS;
}

// The names of torch's kernels by the addresses that torch launches.
std::unordered_map<const void*, std::string>& names() {
    static auto* only = new std::unordered_map<const void*, std::string>;
    return *only;
}

cudaError_t refuse(const void* kernel) {
    Lock lock;
    int status = 0;
    char* readable = abi::__cxa_demangle(names()[kernel].c_str(), nullptr, nullptr, &status);
    const std::string name = readable == nullptr ? names()[kernel] : readable;
    std::free(readable);
    violation("a kernel of torch, which cannot run here: " + name.substr(0, 200));
    return cudaSuccess;
}

}  // namespace

// ---- modules and functions

CUresult cuModuleLoadData(CUmodule* handle, const void* image) {
    Lock lock;
    if (forbidden("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    const auto* bytes = static_cast<const uint8_t*>(image);
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes);
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes + header->e_shoff);
    const auto* section_names =
        reinterpret_cast<const char*>(bytes + sections[header->e_shstrndx].sh_offset);
    const std::string prefix = ".nv.info.";
    auto* module = new Module;
    for (int i = 0; i < header->e_shnum; ++i) {
        const std::string name = section_names + sections[i].sh_name;
        if (name.compare(0, prefix.size(), prefix) != 0) continue;
        const uint8_t* begin = bytes + sections[i].sh_offset;
        auto function = std::make_unique<Function>();
        function->name = name.substr(prefix.size());
        function->device = current_device;
        function->parameters = parameters_in(begin, begin + sections[i].sh_size);
        module->functions.push_back(std::move(function));
    }
    *handle = reinterpret_cast<CUmodule>(module);
    return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule handle) {
    Lock lock;
    for (auto& function : reinterpret_cast<Module*>(handle)->functions) function->is_loaded = false;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
    for (const auto& function : reinterpret_cast<Module*>(module)->functions) {
        if (function->name == name) {
            *handle = reinterpret_cast<CUfunction>(function.get());
            return CUDA_SUCCESS;
        }
    }
    return CUDA_ERROR_NOT_FOUND;
}

CUresult cuFuncGetParamInfo(CUfunction handle, size_t number, size_t* offset, size_t* size) {
    const auto& parameters = function_of(handle)->parameters;
    if (number >= parameters.size()) return CUDA_ERROR_INVALID_VALUE;
    *offset = parameters[number].offset;
    if (size != nullptr) *size = parameters[number].size;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(
    const CUlaunchConfig* config, CUfunction function, void** arguments, void**
) {
    const dim3 grid(config->gridDimX, config->gridDimY, config->gridDimZ);
    return launch(function, grid, config->hStream, arguments);
}

CUresult cuLaunchKernel(
    CUfunction function, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned,
    unsigned, CUstream stream, void** arguments, void**
) {
    return launch(function, dim3(x, y, z), stream, arguments);
}

// ---- torch's own kernels

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

char __cudaInitModule(void**) { return 1; }

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(
    void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*, int*
) {
    names()[kernel] = name;
}

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = *block = dim3(1, 1, 1);
    *shared = 0;
    *static_cast<cudaStream_t*>(stream) = nullptr;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return refuse(kernel);
}

}  // extern "C"

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return refuse(kernel);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) {
    return refuse(kernel);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* count, const void*, int, size_t, unsigned
) {
    *count = 4;
    return cudaSuccess;
}
