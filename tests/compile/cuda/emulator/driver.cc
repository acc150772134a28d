// A stand-in for libcuda.so.1 whose kernels are functions of the host: memory is the host's, streams do not wait, and
// graphs replay. A module is the path of a library of such functions. `emulator_fail` makes a function fail. Who cannot
// call emulator_... sets EMULATOR_FAIL ("cuInit=100") and EMULATOR_CAPABILITY ("90") for a program, and finds counts as
// JSON in the file EMULATOR_LOG when it has ended.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <chrono>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

typedef int Result;
typedef unsigned long long DevicePointer;
typedef int (*Kernel)(const void*, const unsigned*, unsigned);
typedef std::vector<std::function<Result()>> Graph;

static std::recursive_mutex mutex;  // of all that follows, and of kernels, whose threads are fibers of one thread
static std::map<std::string, int> failures;
static int capability = 75;
static std::map<DevicePointer, size_t> memory;
static size_t most;  // blocks of memory at once
static std::map<std::string, int> calls;

static struct Environment {
  Environment() {
    const char *number = getenv("EMULATOR_CAPABILITY"), *text = getenv("EMULATOR_FAIL");
    if (number) capability = atoi(number);
    const char* result = text ? strchr(text, '=') : nullptr;
    if (result) failures[std::string(text, result)] = atoi(result + 1);
  }
  ~Environment() {
    const char* path = getenv("EMULATOR_LOG");
    FILE* file = path ? fopen(path, "w") : nullptr;
    if (!file) return;
    fprintf(file, "{\"held\": %zu, \"most\": %zu, \"uploads\": %d}\n", memory.size(), most, calls["cuMemcpyHtoD"]);
    fclose(file);
  }
} environment;

struct Stream {
  bool captures = false;
  Graph graph;
};

static Result called(const char* name) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  calls[name]++;
  auto found = failures.find(name);
  return found == failures.end() ? 0 : found->second;
}

static Result enqueue(void* stream, std::function<Result()> step) {
  Stream* s = static_cast<Stream*>(stream);
  if (s->captures) {
    s->graph.push_back(step);
    return 0;
  }
  return step();
}

static bool inside(DevicePointer pointer, size_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto found = memory.upper_bound(pointer);
  if (found == memory.begin()) return false;
  --found;
  return pointer + bytes <= found->first + found->second;
}

extern "C" {
void emulator_fail(const char* name, int result) { failures[name] = result; }
void emulator_heal() { failures.clear(); }
void emulator_capability(int number) { capability = number; }
int emulator_calls(const char* name) { return calls[name]; }
long emulator_allocations() { return (long)memory.size(); }

Result cuInit(unsigned) { return called("cuInit"); }
Result cuGetErrorString(Result, const char** text) {
  *text = "an emulated error";
  return 0;
}
Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
Result cuDeviceGetCount(int* count) {
  *count = 1;
  return called("cuDeviceGetCount");
}
Result cuDeviceGet(int* device, int) {
  *device = 0;
  return 0;
}
Result cuDeviceGetName(char* name, int size, int) {
  strncpy(name, "Emulated GPU", size);
  return 0;
}
Result cuDeviceGetAttribute(int* value, int which, int) {
  *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : 1;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &memory;
  return 0;
}
Result cuDevicePrimaryCtxRelease_v2(int) { return 0; }
Result cuCtxSetCurrent(void*) { return 0; }
Result cuModuleLoadData(void** module, const void* image) {
  if (Result failed = called("cuModuleLoadData")) return failed;
  *module = dlopen(static_cast<const char*>(image), RTLD_NOW | RTLD_LOCAL);
  return *module == nullptr ? 200 : 0;
}
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, name);
  return *function == nullptr ? 500 : 0;
}
Result cuModuleUnload(void* module) { return dlclose(module); }
Result cuMemAlloc_v2(DevicePointer* pointer, size_t bytes) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (Result failed = called("cuMemAlloc")) return failed;
  void* found = aligned_alloc(256, (bytes + 255) / 256 * 256);
  memset(found, 0xa5, bytes);  // nothing may depend on what was there
  *pointer = reinterpret_cast<DevicePointer>(found);
  memory[*pointer] = bytes;
  if (memory.size() > most) most = memory.size();
  return 0;
}
Result cuMemFree_v2(DevicePointer pointer) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  if (pointer == 0) return 0;
  if (memory.erase(pointer) == 0) return 1;
  free(reinterpret_cast<void*>(pointer));
  return 0;
}
Result cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  *pointer = malloc(bytes);
  return 0;
}
Result cuMemFreeHost(void* pointer) {
  free(pointer);
  return 0;
}
Result cuMemcpyHtoD_v2(DevicePointer to, const void* from, size_t bytes) {
  if (Result failed = called("cuMemcpyHtoD")) return failed;
  if (!inside(to, bytes)) return 1;
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
Result cuMemcpyHtoDAsync_v2(DevicePointer to, const void* from, size_t bytes, void* stream) {
  if (!inside(to, bytes)) return 1;
  return enqueue(stream, [=] { return memcpy(reinterpret_cast<void*>(to), from, bytes), 0; });
}
Result cuMemcpyDtoHAsync_v2(void* to, DevicePointer from, size_t bytes, void* stream) {
  if (!inside(from, bytes)) return 1;
  return enqueue(stream, [=] { return memcpy(to, reinterpret_cast<void*>(from), bytes), 0; });
}
Result cuStreamCreate(void** stream, unsigned) {
  *stream = new Stream();
  return 0;
}
Result cuStreamDestroy_v2(void* stream) {
  delete static_cast<Stream*>(stream);
  return 0;
}
Result cuStreamSynchronize(void*) { return called("cuStreamSynchronize"); }
Result cuStreamBeginCapture_v2(void* stream, int) {
  *static_cast<Stream*>(stream) = Stream{true, {}};
  return called("cuStreamBeginCapture");
}
Result cuStreamEndCapture(void* stream, void** graph) {
  Stream* s = static_cast<Stream*>(stream);
  s->captures = false;
  *graph = new Graph(s->graph);
  return 0;
}
Result cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
  *made = new Graph(*static_cast<Graph*>(graph));
  return 0;
}
Result cuGraphLaunch(void* graph, void*) {
  for (auto& step : *static_cast<Graph*>(graph)) {
    if (Result failed = step()) return failed;
  }
  return called("cuGraphLaunch");
}
Result cuGraphExecDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return 0;
}
Result cuGraphDestroy(void* graph) {
  delete static_cast<Graph*>(graph);
  return 0;
}
Result cuLaunchHostFunc(void* stream, void (*function)(void*), void* data) {
  return enqueue(stream, [=] { return function(data), 0; });
}
Result cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned, unsigned, unsigned,
                      void* stream, void** params, void**) {
  if (Result failed = called("cuLaunchKernel")) return failed;
  if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535 || block == 0 || block > 1024) return 1;
  std::vector<uint64_t> args(128);  // as many bytes as any kernel has
  memcpy(args.data(), params[0], 1024);
  return enqueue(stream, [=] {
    const unsigned grid[3] = {x, y, z};
    std::lock_guard<std::recursive_mutex> lock(mutex);
    return reinterpret_cast<Kernel>(function)(args.data(), grid, block);
  });
}
Result cuEventCreate(void** event, unsigned) {
  *event = new std::chrono::steady_clock::time_point();
  return 0;
}
Result cuEventRecord(void* event, void*) {
  *static_cast<std::chrono::steady_clock::time_point*>(event) = std::chrono::steady_clock::now();
  return 0;
}
Result cuEventElapsedTime(float* milliseconds, void* first, void* last) {
  auto start = *static_cast<std::chrono::steady_clock::time_point*>(first);
  auto end = *static_cast<std::chrono::steady_clock::time_point*>(last);
  *milliseconds = std::chrono::duration<float, std::milli>(end - start).count();
  return 0;
}
Result cuEventDestroy_v2(void* event) {
  delete static_cast<std::chrono::steady_clock::time_point*>(event);
  return 0;
}
}
