// Decides when operations run, and keeps captures and violations.
#include "device.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>

namespace fake {
namespace {

struct State {
    std::recursive_mutex mutex;
    Order order = Order::at_once;
    std::mt19937_64 chance{0};
    uint64_t eagerness = 0;
    bool is_running = false;  // an operation runs now
    std::vector<Stream> default_streams{most_devices};
    std::vector<Stream*> streams;
    std::vector<std::shared_ptr<Capture>> captures;
    uint64_t capture_count = 0;
    std::string last_graph;
    std::map<std::string, int> violations;

    State() {
        for (int device = 0; device < most_devices; ++device) {
            default_streams[size_t(device)].device = device;
            streams.push_back(&default_streams[size_t(device)]);
        }
    }
};

// The state is never destroyed: torch still calls while the process ends.
State& state() {
    static State* only = new State;
    return *only;
}

// Python's lock, reached through the running interpreter, if any.
struct PythonLock {
    int (*is_held)() = nullptr;
    void* (*give_away)() = nullptr;
    void (*take_back)(void*) = nullptr;

    PythonLock() {
        find(is_held, "PyGILState_Check");
        find(give_away, "PyEval_SaveThread");
        find(take_back, "PyEval_RestoreThread");
    }

    template <class Function> static void find(Function& function, const char* name) {
        function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    }
};

bool can_run(const Stream* stream) {
    if (stream->queue.empty()) return false;
    const Operation& next = stream->queue.front();
    return next.awaited == nullptr || next.awaited->done >= next.ticket;
}

void run_next(Stream* stream) {
    const Operation operation = std::move(stream->queue.front());
    stream->queue.pop_front();
    state().is_running = true;
    if (operation.run) operation.run();
    state().is_running = false;
    ++stream->done;
}

Stream* any_that_can_run() {
    std::vector<Stream*> candidates;
    for (Stream* stream : state().streams) {
        if (can_run(stream)) candidates.push_back(stream);
    }
    if (candidates.empty()) return nullptr;
    return candidates[state().chance() % candidates.size()];
}

}  // namespace

thread_local int current_device = 0;

Lock::Lock() {
    if (state().mutex.try_lock()) return;
    static const PythonLock python;
    void* thread = nullptr;
    const bool held = python.is_held != nullptr && python.is_held() == 1;
    if (held) thread = python.give_away();
    state().mutex.lock();
    if (held) python.take_back(thread);
}

Lock::~Lock() { state().mutex.unlock(); }

int device_count() {
    static const int count = [] {
        const char* asked = std::getenv("FAKE_DEVICES");
        return asked == nullptr ? 1 : std::clamp(std::atoi(asked), 1, most_devices);
    }();
    return count;
}

// ---- streams

Stream* stream_of(cudaStream_t handle) {
    if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) {
        return &state().default_streams[size_t(current_device)];
    }
    return reinterpret_cast<Stream*>(handle);
}

Stream* make_stream() {
    auto* stream = new Stream;
    stream->device = current_device;
    state().streams.push_back(stream);
    return stream;
}

void set_order(Order order, uint64_t seed) {
    wait_for_everything();
    state().order = order;
    state().chance.seed(seed);
    state().eagerness = seed % 4;
}

void append(Stream* stream, Operation operation) {
    if (stream->capture) {
        stream->capture->graph.operations.push_back(std::move(operation));
        return;
    }
    stream->queue.push_back(std::move(operation));
    ++stream->issued;
    if (state().is_running) return;  // the call came from within an operation
    if (state().order == Order::at_once) wait_for(stream);
    if (state().order == Order::random) {
        // Some seeds let queues grow long, others keep them short.
        Stream* chosen = state().chance() % 4 < state().eagerness ? any_that_can_run() : nullptr;
        if (chosen != nullptr) run_next(chosen);
    }
}

void wait_for(Stream* stream, uint64_t ticket) {
    while (stream->done < ticket) {
        if (state().order == Order::random) {
            Stream* chosen = any_that_can_run();
            if (chosen == nullptr) {
                std::fprintf(stderr, "fake device: streams wait for one another\n");
                std::abort();
            }
            run_next(chosen);
        } else {
            const Operation& next = stream->queue.front();
            if (next.awaited != nullptr) wait_for(next.awaited, next.ticket);
            run_next(stream);
        }
    }
}

void wait_for(Stream* stream) { wait_for(stream, stream->issued); }

void wait_for_everything() {
    const std::vector<Stream*> streams = state().streams;
    for (Stream* stream : streams) wait_for(stream);
}

// ---- captures

std::shared_ptr<Capture> begin_capture(Stream* stream, cudaStreamCaptureMode mode) {
    auto capture = std::make_shared<Capture>();
    capture->id = ++state().capture_count;
    capture->mode = mode;
    capture->thread = std::this_thread::get_id();
    state().captures.push_back(capture);
    stream->capture = capture;
    return capture;
}

std::unique_ptr<Graph> end_capture(Stream* stream) {
    const std::shared_ptr<Capture> capture = stream->capture;
    for (Stream* each : state().streams) {
        if (each->capture == capture) each->capture = nullptr;
    }
    auto& captures = state().captures;
    captures.erase(std::remove(captures.begin(), captures.end(), capture), captures.end());
    if (capture->broken) return nullptr;
    state().last_graph.clear();
    for (const Operation& operation : capture->graph.operations) {
        state().last_graph += operation.name + "\n";
    }
    return std::make_unique<Graph>(capture->graph);
}

std::string last_graph() { return state().last_graph; }

// ---- violations

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

void violation(const std::string& what) {
    ++state().violations[what];
    if (std::getenv("FAKE_ABORT") != nullptr) {
        std::fprintf(stderr, "fake device: %s\n", what.c_str());
        std::abort();
    }
}

bool forbidden(const char* call) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    bool found = false;
    for (const auto& capture : state().captures) {
        const bool own = capture->thread == std::this_thread::get_id();
        const bool forbids = own ? capture->mode != cudaStreamCaptureModeRelaxed
                                 : capture->mode == cudaStreamCaptureModeGlobal &&
                                       thread_mode == cudaStreamCaptureModeGlobal;
        if (forbids) {
            capture->broken = true;
            found = true;
        }
    }
    if (found) violation(std::string(call) + " during a capture");
    return found;
}

std::string take_violations() {
    std::string text;
    for (const auto& [what, count] : state().violations) {
        text += what + " (" + std::to_string(count) + " times)\n";
    }
    state().violations.clear();
    return text;
}

}  // namespace fake

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, fake::thread_mode);
    return cudaSuccess;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    auto wanted = cudaStreamCaptureMode(*mode);
    const cudaError_t error = cudaThreadExchangeStreamCaptureMode(&wanted);
    *mode = CUstreamCaptureMode(wanted);
    return CUresult(error);
}
