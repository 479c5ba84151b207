// Streams, events, captures and graphs, as the runtime and the driver show them.
#include "device.h"

using namespace fake;

namespace {

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

Graph* graph_of(void* handle) { return reinterpret_cast<Graph*>(handle); }

cudaStreamCaptureStatus status_of(const Stream* stream) {
    if (!stream->capture) return cudaStreamCaptureStatusNone;
    return stream->capture->broken ? cudaStreamCaptureStatusInvalidated
                                   : cudaStreamCaptureStatusActive;
}

}  // namespace

// ---- streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned, int) {
    Lock lock;
    *handle = reinterpret_cast<cudaStream_t>(make_stream());
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) {
    return cudaStreamCreateWithPriority(handle, 0, 0);
}

// The stream stays, as events may refer to it.
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (stream->capture) {
        stream->capture->broken = true;
        violation("cudaStreamSynchronize of a capturing stream");
        return failed(cudaErrorStreamCaptureUnsupported);
    }
    wait_for(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    Lock lock;
    const Stream* stream = stream_of(handle);
    return stream->done >= stream->issued ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize() {
    Lock lock;
    if (forbidden("cudaDeviceSynchronize")) return failed(cudaErrorStreamCaptureUnsupported);
    wait_for_everything();
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
    Lock lock;
    append(stream_of(handle), {"host function", [=] { function(data); }});
    return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
    *handle = reinterpret_cast<cudaEvent_t>(new Event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    Lock lock;
    delete event_of(handle);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
    Lock lock;
    Stream* stream = stream_of(on);
    *event_of(handle) = {stream, stream->issued, stream->capture, stream->capture != nullptr};
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
    return cudaEventRecord(handle, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    Lock lock;
    const Event* event = event_of(handle);
    if (forbidden("cudaEventQuery")) return failed(cudaErrorStreamCaptureUnsupported);
    if (event->captured) return failed(cudaErrorCapturedEvent);
    const bool is_done = event->stream == nullptr || event->stream->done >= event->ticket;
    return is_done ? cudaSuccess : failed(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    Lock lock;
    const Event* event = event_of(handle);
    if (event->captured) return failed(cudaErrorCapturedEvent);
    if (event->stream != nullptr) wait_for(event->stream, event->ticket);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 0.01f;
    return cudaSuccess;
}

// A stream that waits for an event of a capture joins the capture.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned) {
    Lock lock;
    Stream* stream = stream_of(handle);
    const Event* event = event_of(awaited);
    if (event->stream == nullptr) return cudaSuccess;
    if (event->captured) {
        stream->capture = event->capture.lock();
        if (!stream->capture) violation("a stream waits for an event of an ended capture");
        return cudaSuccess;
    }
    if (stream->capture) {
        stream->capture->broken = true;
        violation("a captured stream waits for an event outside of the capture");
        return failed(cudaErrorStreamCaptureIsolation);
    }
    append(stream, {"wait", nullptr, event->stream, event->ticket});
    return cudaSuccess;
}

// ---- captures

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (handle == nullptr || stream->capture) return failed(cudaErrorStreamCaptureUnsupported);
    begin_capture(stream, mode);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    Lock lock;
    Stream* stream = stream_of(handle);
    if (!stream->capture) return failed(cudaErrorIllegalState);
    *graph = reinterpret_cast<cudaGraph_t>(end_capture(stream).release());
    return *graph == nullptr ? failed(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    Lock lock;
    *status = status_of(stream_of(handle));
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
    cudaGraph_t* graph, const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
    size_t* count
) {
    Lock lock;
    const Stream* stream = stream_of(handle);
    *status = status_of(stream);
    if (id != nullptr) *id = stream->capture ? stream->capture->id : 0;
    if (graph != nullptr) {
        Graph* found = stream->capture ? &stream->capture->graph : nullptr;
        *graph = reinterpret_cast<cudaGraph_t>(found);
    }
    if (dependencies != nullptr) *dependencies = nullptr;
    if (edges != nullptr) *edges = nullptr;
    if (count != nullptr) *count = 0;
    return cudaSuccess;
}

// ---- graphs

cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long
) {
    *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
    return cudaSuccess;
}

// The operations of a replay follow one another, and other streams may run between them.
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
    Lock lock;
    for (const Operation& operation : graph_of(executable)->operations) {
        append(stream_of(handle), operation);
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph_of(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete graph_of(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    *count = graph_of(graph)->operations.size();
    return cudaSuccess;
}

cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
    *static_cast<uint64_t*>(value) = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) {
    return cudaSuccess;
}

// torch ties the state of random number generators to graphs; that state may live on.
cudaError_t cudaUserObjectCreate(
    cudaUserObject_t* object, void* pointer, cudaHostFn_t, unsigned, unsigned
) {
    *object = static_cast<cudaUserObject_t>(pointer);
    return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }

cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
    return cudaSuccess;
}

// ---- the driver

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    Lock lock;
    *status = CUstreamCaptureStatus(status_of(stream_of(stream)));
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) { return CUresult(cudaStreamSynchronize(stream)); }

CUresult cuEventCreate(CUevent* event, unsigned flags) {
    return CUresult(cudaEventCreateWithFlags(event, flags));
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    return CUresult(cudaEventRecord(event, stream));
}

// The driver leaves the last error of the runtime alone.
CUresult cuEventQuery(CUevent event) {
    const cudaError_t before = cudaGetLastError();
    const cudaError_t error = cudaEventQuery(event);
    cudaGetLastError();
    if (before != cudaSuccess) failed(before);
    return CUresult(error);
}

CUresult cuEventSynchronize(CUevent event) { return CUresult(cudaEventSynchronize(event)); }

CUresult cuEventDestroy(CUevent event) { return CUresult(cudaEventDestroy(event)); }
