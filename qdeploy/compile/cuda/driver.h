// The parts of the NVIDIA driver's interface that host.cc needs, found in libcuda.so.1 when they are.
#include <dlfcn.h>
#include <stddef.h>

#include <string>

namespace qdeploy {

typedef int Result;
typedef void* Handle;  // context, module, function, stream, event, graph
typedef unsigned long long DevicePointer;

struct Failure {
  std::string text;
};

struct Driver {
  Result (*Init)(unsigned);
  Result (*GetErrorString)(Result, const char**);
  Result (*DeviceGetCount)(int*);
  Result (*DeviceGet)(int*, int);
  Result (*DeviceGetName)(char*, int, int);
  Result (*DeviceGetAttribute)(int*, int, int);
  Result (*DevicePrimaryCtxRetain)(Handle*, int);
  Result (*DevicePrimaryCtxRelease)(int);
  Result (*CtxSetCurrent)(Handle);
  Result (*ModuleLoadData)(Handle*, const void*);
  Result (*ModuleGetFunction)(Handle*, Handle, const char*);
  Result (*ModuleUnload)(Handle);
  Result (*MemAlloc)(DevicePointer*, size_t);
  Result (*MemFree)(DevicePointer);
  Result (*MemHostAlloc)(void**, size_t, unsigned);
  Result (*MemFreeHost)(void*);
  Result (*MemcpyHtoD)(DevicePointer, const void*, size_t);
  Result (*MemcpyHtoDAsync)(DevicePointer, const void*, size_t, Handle);
  Result (*MemcpyDtoHAsync)(void*, DevicePointer, size_t, Handle);
  Result (*StreamCreate)(Handle*, unsigned);
  Result (*StreamDestroy)(Handle);
  Result (*StreamSynchronize)(Handle);
  Result (*StreamBeginCapture)(Handle, int);
  Result (*StreamEndCapture)(Handle, Handle*);
  Result (*GraphInstantiate)(Handle*, Handle, unsigned long long);
  Result (*GraphLaunch)(Handle, Handle);
  Result (*GraphExecDestroy)(Handle);
  Result (*GraphDestroy)(Handle);
  Result (*LaunchHostFunc)(Handle, void (*)(void*), void*);
  Result (*LaunchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                         void**);
  Result (*EventCreate)(Handle*, unsigned);
  Result (*EventRecord)(Handle, Handle);
  Result (*EventElapsedTime)(float*, Handle, Handle);
  Result (*EventDestroy)(Handle);
};

enum { MAJOR = 75, MINOR = 76 };  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
enum { NON_BLOCKING = 1, THREAD_LOCAL = 1, NO_DEVICE = 100 };

template <class Function>
void find(void* library, Function& to, const char* name) {
  to = reinterpret_cast<Function>(dlsym(library, name));
  if (to == nullptr) {
    throw Failure{std::string("the NVIDIA driver here has no ") + name + ": it is older than CUDA 11.4, update it"};
  }
}

inline Driver load_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw Failure{"this machine has no NVIDIA driver (libcuda.so.1): install it, or use an artifact for the processor"};
  }
  Driver d;
  find(library, d.Init, "cuInit");
  find(library, d.GetErrorString, "cuGetErrorString");
  find(library, d.DeviceGetCount, "cuDeviceGetCount");
  find(library, d.DeviceGet, "cuDeviceGet");
  find(library, d.DeviceGetName, "cuDeviceGetName");
  find(library, d.DeviceGetAttribute, "cuDeviceGetAttribute");
  find(library, d.DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  find(library, d.DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2");
  find(library, d.CtxSetCurrent, "cuCtxSetCurrent");
  find(library, d.ModuleLoadData, "cuModuleLoadData");
  find(library, d.ModuleGetFunction, "cuModuleGetFunction");
  find(library, d.ModuleUnload, "cuModuleUnload");
  find(library, d.MemAlloc, "cuMemAlloc_v2");
  find(library, d.MemFree, "cuMemFree_v2");
  find(library, d.MemHostAlloc, "cuMemHostAlloc");
  find(library, d.MemFreeHost, "cuMemFreeHost");
  find(library, d.MemcpyHtoD, "cuMemcpyHtoD_v2");
  find(library, d.MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2");
  find(library, d.MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2");
  find(library, d.StreamCreate, "cuStreamCreate");
  find(library, d.StreamDestroy, "cuStreamDestroy_v2");
  find(library, d.StreamSynchronize, "cuStreamSynchronize");
  find(library, d.StreamBeginCapture, "cuStreamBeginCapture_v2");
  find(library, d.StreamEndCapture, "cuStreamEndCapture");
  find(library, d.GraphInstantiate, "cuGraphInstantiateWithFlags");
  find(library, d.GraphLaunch, "cuGraphLaunch");
  find(library, d.GraphExecDestroy, "cuGraphExecDestroy");
  find(library, d.GraphDestroy, "cuGraphDestroy");
  find(library, d.LaunchHostFunc, "cuLaunchHostFunc");
  find(library, d.LaunchKernel, "cuLaunchKernel");
  find(library, d.EventCreate, "cuEventCreate");
  find(library, d.EventRecord, "cuEventRecord");
  find(library, d.EventElapsedTime, "cuEventElapsedTime");
  find(library, d.EventDestroy, "cuEventDestroy_v2");
  return d;
}

}  // namespace qdeploy
