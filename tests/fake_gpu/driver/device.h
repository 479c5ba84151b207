// The model of the device: streams with queues of operations, events, captures, memory.
//
// Device memory is host memory. The host's calls append operations to the queue of a stream, and
// device.cpp decides when each operation runs.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace fake {

// When operations run: with the call that appends them, when the host waits for them, or at
// random moments, in random order between streams.
enum class Order { at_once, late, random };

struct Stream;

// One piece of work of a stream. An operation that awaits another stream has nothing to run.
struct Operation {
    std::string name;
    std::function<void()> run;
    Stream* awaited = nullptr;
    uint64_t ticket = 0;  // the number of operations that the awaited stream must have done
};

struct Graph {
    std::vector<Operation> operations;
};

// A capture under way. `broken` captures end with an error, as CUDA's do after a forbidden call.
struct Capture {
    uint64_t id;
    cudaStreamCaptureMode mode;
    std::thread::id thread;
    Graph graph;
    bool broken = false;
};

struct Stream {
    int device = 0;
    std::deque<Operation> queue;
    uint64_t issued = 0;
    uint64_t done = 0;
    std::shared_ptr<Capture> capture;
};

// The operations that a stream had received when the event was recorded.
struct Event {
    Stream* stream = nullptr;
    uint64_t ticket = 0;
    std::weak_ptr<Capture> capture;
    bool captured = false;
};

// Holds the mutex of the fake device. A thread that has to wait gives Python's lock away meanwhile,
// since the owner of the mutex may be running a kernel, which needs Python's lock.
class Lock {
public:
    Lock();
    ~Lock();
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
};

// ---- devices

constexpr int most_devices = 8;
int device_count();
extern thread_local int current_device;

// ---- streams (the caller holds a Lock in all functions below)

Stream* stream_of(cudaStream_t handle);
Stream* make_stream();
void set_order(Order order, uint64_t seed);

// Appends an operation to a stream, or to the graph that the stream is capturing.
void append(Stream* stream, Operation operation);
// Runs operations until the stream has done as many as `ticket`.
void wait_for(Stream* stream, uint64_t ticket);
void wait_for(Stream* stream);
void wait_for_everything();

// ---- captures

std::shared_ptr<Capture> begin_capture(Stream* stream, cudaStreamCaptureMode mode);
// Returns the captured graph, or nothing if a forbidden call broke the capture.
std::unique_ptr<Graph> end_capture(Stream* stream);
// Names of the operations of the last captured graph, one a line.
std::string last_graph();

// ---- violations

// Notes that the program did something that a real device forbids.
void violation(const std::string& what);
// Returns whether a capture forbids this call now; such a call breaks the capture.
bool forbidden(const char* call);
// Returns and forgets the violations so far, with their numbers, one a line.
std::string take_violations();

// ---- memory

enum class Place { pageable, pinned, device };
Place place_of(const void* pointer);
// Returns the device that owns the memory, or -1.
int owner_of(const void* pointer);
// Returns whether all bytes from `begin` to `end` lie in one allocation on the device.
bool is_device_memory(uintptr_t begin, uintptr_t end);

// Remembers and returns the error as the thread's last one.
cudaError_t failed(cudaError_t error);

}  // namespace fake
