/* A stand-in for NVIDIA's driver that keeps "GPU memory" on the host and does at once what is put on a stream. It checks what a real driver checks:
   that a context is current on the calling thread, that what is freed was given, and that nothing is allocated during a capture of the same thread.
   CUDA_STUB_INIT and CUDA_STUB_DEVICES, or stub_configure, say what cuInit returns and how many GPUs there are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903 };
enum { MOST = 4096, DEPTH = 64 };
enum { MEMORY = 1, HOST = 2, STREAM = 3, EVENT = 4, GRAPH = 5, EXECUTABLE = 6 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { void *address; int kind; } live[MOST];
static int init_status = -1, devices = -1, retained, made;
static long limit = 1L << 30;
static char calls[1 << 20];
static char contexts[8];
static void (*on_launch)(long);
static __thread void *stack[DEPTH];
static __thread int depth;
static __thread void *capturing;
static __thread int capture_broken;
static __thread long capture_id;
static long next_graph = 1;
static long clock_us, copy_us;
static struct { void *event; long at; int timed; } times[MOST];

static int setting(const char *name, int other) { const char *value = getenv(name); return value ? atoi(value) : other; }

static void note(const char *call)
{
    pthread_mutex_lock(&lock);
    if (strlen(calls) + strlen(call) + 2 < sizeof calls) { strcat(calls, call); strcat(calls, " "); }
    pthread_mutex_unlock(&lock);
}

static int keep(void *address, int kind)
{
    int status = OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST && status; i++)
        if (!live[i].kind) { live[i].address = address; live[i].kind = kind; made++; status = OK; }
    pthread_mutex_unlock(&lock);
    return status;
}

static int drop(void *address, int kind)
{
    int status = INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST && status; i++)
        if (live[i].kind == kind && live[i].address == address) { live[i].kind = 0; status = OK; }
    pthread_mutex_unlock(&lock);
    return status;
}

static int is_live(void *address, int kind)
{
    for (int i = 0; i < MOST; i++) if (live[i].kind == kind && live[i].address == address) return 1;
    return 0;
}

static int ready(void) { return depth && retained ? OK : INVALID_CONTEXT; }

static int stream_ready(void *stream)
{
    if (ready()) return INVALID_CONTEXT;
    return !stream || (size_t)stream < 3 || is_live(stream, STREAM) ? OK : INVALID_HANDLE;
}

static int new_object(void **object, int kind, size_t size)
{
    if (ready()) return INVALID_CONTEXT;
    if (capturing && kind != EVENT) { capture_broken = 1; return CAPTURE_UNSUPPORTED; }
    *object = aligned_alloc(256, (size + 255) / 256 * 256);
    return *object ? keep(*object, kind) : OUT_OF_MEMORY;
}

static int old_object(void *object, int kind)
{
    if (ready()) return INVALID_CONTEXT;
    int status = drop(object, kind);
    if (!status) free(object);
    return status;
}

/* --- for tests --- */
void stub_configure(int status, int count) { init_status = status; devices = count; }
void stub_limit(long bytes) { limit = bytes; }
void stub_copies_take(long microseconds) { copy_us = microseconds; }
void stub_work(long microseconds) { clock_us += microseconds; }
void stub_on_launch(void (*callback)(long)) { on_launch = callback; }
int stub_live(void) { int count = retained; for (int i = 0; i < MOST; i++) count += live[i].kind != 0; return count; }
int stub_made(void) { return made; }
int stub_depth(void) { return depth; }
long stub_capture(void *stream) { return capturing && capturing == stream ? capture_id : 0; }
void stub_break_capture(void) { capture_broken = 1; }
const char *stub_calls(void) { return calls; }
void stub_mark(const char *call) { note(call); }
void stub_forget_calls(void) { calls[0] = 0; }

/* --- devices and contexts --- */
int cuInit(unsigned flags)
{
    (void)flags;
    if (init_status < 0) { init_status = setting("CUDA_STUB_INIT", 0); devices = setting("CUDA_STUB_DEVICES", 1); }
    return init_status;
}
int cuDriverGetVersion(int *version) { *version = 12040; return OK; }
int cuDeviceGetCount(int *count) { *count = devices; return OK; }
int cuDeviceGet(int *device, int index) { *device = index; return index < devices ? OK : INVALID_DEVICE; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stub GPU %d", device); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 75 ? 9 : 0; return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 7UL << 30; return OK; }
int cuGetErrorString(int status, const char **text)
{
    *text = status == OUT_OF_MEMORY ? "out of memory" : status == 999 ? "unknown error" : status >= CAPTURE_UNSUPPORTED ? "not during a capture" : NULL;
    return *text ? OK : INVALID_VALUE;
}
int cuGetErrorName(int status, const char **text) { return cuGetErrorString(status, text); }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &contexts[device]; retained++; note("retain"); return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; retained--; note("release"); return OK; }
int cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }
int cuCtxPushCurrent_v2(void *context) { if (depth == DEPTH) return INVALID_VALUE; stack[depth++] = context; return OK; }
int cuCtxPopCurrent_v2(void **context) { if (!depth) return INVALID_CONTEXT; *context = stack[--depth]; return OK; }
int cuCtxGetDevice(int *device) { *device = 0; return depth ? OK : INVALID_CONTEXT; }

/* --- memory --- */
int cuMemAlloc_v2(unsigned long long *pointer, size_t size)
{
    note("alloc");
    return (long)size > limit ? OUT_OF_MEMORY : new_object((void **)pointer, MEMORY, size);
}
int cuMemFree_v2(unsigned long long pointer) { return old_object((void *)pointer, MEMORY); }
int cuMemHostAlloc(void **pointer, size_t size, unsigned flags) { (void)flags; note("pin"); return new_object(pointer, HOST, size); }
int cuMemFreeHost(void *pointer) { return old_object(pointer, HOST); }

static int copy(const char *call, void *to, const void *from, size_t size, void *stream)
{
    note(call);
    if (capturing) { capture_broken = 1; return CAPTURE_UNSUPPORTED; }
    int status = stream_ready(stream);
    if (!status) { memcpy(to, from, size); clock_us += copy_us; }
    return status;
}
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t size, void *stream) { return copy("in", (void *)to, from, size, stream); }
int cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t size, void *stream) { return copy("out", to, (void *)from, size, stream); }
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t size, void *stream)
{ return copy("device", (void *)to, (void *)from, size, stream); }

/* --- streams and events --- */
int cuStreamCreate(void **stream, unsigned flags) { return flags == 1 ? new_object(stream, STREAM, 1) : INVALID_VALUE; }
int cuStreamDestroy_v2(void *stream) { return old_object(stream, STREAM); }
int cuStreamSynchronize(void *stream)
{
    note("synchronize");
    if (capturing) { capture_broken = 1; return CAPTURE_UNSUPPORTED; }
    return stream_ready(stream);
}
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { (void)flags; note("wait"); return is_live(event, EVENT) ? stream_ready(stream) : INVALID_HANDLE; }
static int index_of(void *event) { int i = 0; while (times[i].event && times[i].event != event) i++; return i; }
int cuEventCreate(void **event, unsigned flags)
{
    int status = new_object(event, EVENT, 1);
    if (!status) { int i = index_of(*event); times[i].event = *event; times[i].at = -1; times[i].timed = !(flags & 2); }
    return status;
}
int cuEventRecord(void *event, void *stream)
{
    note("record");
    if (!is_live(event, EVENT)) return INVALID_HANDLE;
    times[index_of(event)].at = clock_us;
    return stream_ready(stream);
}
int cuEventSynchronize(void *event) { note("synchronize"); return is_live(event, EVENT) ? OK : INVALID_HANDLE; }
int cuEventElapsedTime(float *milliseconds, void *start, void *end)
{
    int i = index_of(start), j = index_of(end);
    if (!is_live(start, EVENT) || !is_live(end, EVENT) || !times[i].timed || !times[j].timed || times[i].at < 0 || times[j].at < 0) return INVALID_HANDLE;
    *milliseconds = (times[j].at - times[i].at) / 1000.0f;
    return OK;
}
int cuEventDestroy_v2(void *event) { return old_object(event, EVENT); }

/* --- graphs --- */
int cuStreamBeginCapture_v2(void *stream, int mode)
{
    if (mode != 1 || !stream || capturing) return INVALID_VALUE;
    int status = stream_ready(stream);
    if (!status) { capturing = stream; capture_broken = 0; capture_id = next_graph++; note("capture"); }
    return status;
}
int cuStreamEndCapture(void *stream, void **graph)
{
    if (capturing != stream) return CAPTURE_UNMATCHED;
    capturing = NULL;
    *graph = capture_broken ? NULL : (void *)capture_id;
    return capture_broken ? CAPTURE_INVALIDATED : keep(*graph, GRAPH);
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags)
{
    if (flags || !is_live(graph, GRAPH)) return INVALID_VALUE;
    *executable = graph;
    return keep(graph, EXECUTABLE);
}
int cuGraphLaunch(void *executable, void *stream)
{
    note("launch");
    if (!is_live(executable, EXECUTABLE)) return INVALID_HANDLE;
    int status = stream_ready(stream);
    if (!status && on_launch) on_launch((long)executable);
    return status;
}
int cuGraphDestroy(void *graph) { return drop(graph, GRAPH); }
int cuGraphExecDestroy(void *executable) { return ready() ? INVALID_CONTEXT : drop(executable, EXECUTABLE); }

/* How cuda-bindings finds the functions: by their names without the version. */
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status)
{
    char versioned[128];
    Dl_info self;
    (void)version, (void)flags;
    dladdr((void *)cuInit, &self);
    void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = dlsym(library, versioned);
    if (!*function) *function = dlsym(library, name);
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : 500;
}
