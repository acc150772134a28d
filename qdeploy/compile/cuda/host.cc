// The host side of a CUDA artifact: loads the machine code through the driver's own interface (libcuda, found when it
// is needed, so that packing works without one) and runs the steps of program.inc, which the compiler writes.
//
//   device(name)                      check driver and GPU; uint8 [n] receives the GPU's name, cut to n - 1 bytes
//   upload(packed)                    copy packed parameters to the GPU, once; the handle is kept in `packed` itself
//   release(packed)                   free that copy
//   main(input, packed, arena, output)    as of any artifact; float regions run here on the host, between copies
//   codes(...), profile(..., ticks)
//
// Activations lie in device memory that belongs to a slot; as many slots exist as calls ran at once. The first call of
// a slot with a level records its steps as a graph, later ones launch that.
#include "driver.h"

#include <stdint.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

using namespace qdeploy;

// What the compiler writes --------------------------------------------------------------------------------------------

enum Area : uint8_t { PACKED, ARENA, INPUT, OUTPUT };

struct Patch {  // a pointer among a kernel's arguments
  uint16_t offset;
  Area area;
  uint64_t at;
};

struct Span {  // of the arena
  uint64_t at, bytes;
};

struct Memory {  // on the host
  uint8_t *packed, *arena, *input, *output;
};

struct Step {  // a kernel, or a float kernel on the host (`call`, for one image) between copies
  int kernel;
  unsigned grid[3], block;
  const uint8_t* args;
  unsigned bytes;
  const Patch* patches;
  unsigned patch_count;
  int32_t (*call)(const Memory&, uint64_t image);
  const Span *in, *out;
  unsigned in_count, out_count;
};

#include "program.inc"

constexpr unsigned MOST_ARGS = 1024;
extern "C" const uint8_t qdeploy_machine_code[];
asm(".section .rodata\n.balign 64\n.hidden qdeploy_machine_code\nqdeploy_machine_code:\n"
    ".incbin \"machine_code.bin\"\n.balign 64\n.previous\n");

// The GPU -------------------------------------------------------------------------------------------------------------

class Gpu {
 public:
  Driver driver = load_driver();
  std::string name;
  std::vector<Handle> functions;

  Gpu() {
    Result found = driver.Init(0);
    int count = 0, major = 0, minor = 0;
    if (found == 0) found = driver.DeviceGetCount(&count);
    if (found == NO_DEVICE || (found == 0 && count == 0)) {
      throw Failure{"the NVIDIA driver finds no GPU: check CUDA_VISIBLE_DEVICES, or use an artifact for the processor"};
    }
    check(found, "the NVIDIA driver does not start");
    char text[256] = {};
    check(driver.DeviceGet(&device_, 0), "no access to the GPU");
    check(driver.DeviceGetName(text, sizeof(text) - 1, device_), "no access to the GPU");
    check(driver.DeviceGetAttribute(&major, MAJOR, device_), "no access to the GPU");
    check(driver.DeviceGetAttribute(&minor, MINOR, device_), "no access to the GPU");
    name = text;
    bool tegra = 10 * major + minor == 87;  // such processors take only code that is made for them
    if (major != kMajor || minor < kMinor || tegra != (10 * kMajor + kMinor == 87)) {
      throw Failure{"the artifact has machine code for sm_" + std::to_string(10 * kMajor + kMinor) + ", but " + name +
                    " is sm_" + std::to_string(10 * major + minor) + ": compile it for that"};
    }
    check(driver.DevicePrimaryCtxRetain(&context_, device_), "no context on the GPU");
    try {
      load();
    } catch (const Failure&) {
      close();
      throw;
    }
  }

  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;
  ~Gpu() { close(); }

  // Makes the GPU that of the calling thread
  void enter() const { check(driver.CtxSetCurrent(context_), "no context on the GPU"); }
  void enter_quietly() const { driver.CtxSetCurrent(context_); }

  void check(Result result, const std::string& what) const {
    if (result == 0) return;
    const char* reason = nullptr;
    driver.GetErrorString(result, &reason);
    throw Failure{what + " (" + (reason == nullptr ? "CUDA error " + std::to_string(result) : reason) + ")"};
  }

  DevicePointer allocate(size_t bytes) const {
    DevicePointer found = 0;
    check(driver.MemAlloc(&found, bytes), "no room for " + std::to_string(bytes) + " bytes on " + name);
    return found;
  }

  uint8_t* allocate_host(size_t bytes) const {
    void* found = nullptr;
    check(driver.MemHostAlloc(&found, bytes, 0), "no room for " + std::to_string(bytes) + " page-locked bytes");
    return static_cast<uint8_t*>(found);
  }

 private:
  void load() {
    enter();
    check(driver.ModuleLoadData(&module_, qdeploy_machine_code),
          std::string("the driver refuses code of ") + kToolkit + ": update it, or compile with its release's toolkit");
    for (const char* kernel : kKernels) {
      functions.push_back(nullptr);
      check(driver.ModuleGetFunction(&functions.back(), module_, kernel), "the machine code is damaged");
    }
  }

  void close() {
    driver.CtxSetCurrent(context_);
    if (module_ != nullptr) driver.ModuleUnload(module_);
    driver.DevicePrimaryCtxRelease(device_);
  }

  int device_ = 0;
  Handle context_ = nullptr, module_ = nullptr;
};

std::mutex mutex;  // of what follows, `slots` and `serials`
std::shared_ptr<const Gpu> opened;

// Opened on first use; a failure is found again by the next call
std::shared_ptr<const Gpu> gpu() {
  std::lock_guard<std::mutex> lock(mutex);
  if (opened == nullptr) opened.reset(new Gpu());
  opened->enter();
  return opened;
}

// Levels --------------------------------------------------------------------------------------------------------------

// The first bytes of packed parameters, where no parameter lies
struct Level {
  const void* owner;  // `opened` of the library that copied them
  DevicePointer pointer;
  uint64_t serial;
};

uint64_t serials = 0;

Level* level_of(const DLTensor* packed) { return static_cast<Level*>(packed->data); }

bool is_uploaded(const Level* level) { return level->owner == &opened; }

void upload(const DLTensor* packed) {
  Level* level = level_of(packed);
  if (is_uploaded(level)) return;
  std::shared_ptr<const Gpu> device = gpu();
  DevicePointer pointer = device->allocate(kPackedBytes);
  Result copied = device->driver.MemcpyHtoD(pointer, packed->data, kPackedBytes);
  if (copied == 0) copied = device->driver.StreamSynchronize(nullptr);  // it may return before the GPU has all
  if (copied != 0) device->driver.MemFree(pointer);
  device->check(copied, "the parameters cannot be copied to " + device->name);
  std::lock_guard<std::mutex> lock(mutex);
  *level = Level{&opened, pointer, ++serials};
}

void release(const DLTensor* packed) {
  Level* level = level_of(packed);
  if (!is_uploaded(level)) return;
  std::shared_ptr<const Gpu> device = gpu();
  DevicePointer pointer = level->pointer;
  *level = Level{};
  device->check(device->driver.MemFree(pointer), "the parameters cannot be freed");
}

// Running -------------------------------------------------------------------------------------------------------------

struct Task {  // a float kernel that waits in a stream
  const Step* step;
  Memory memory;
  int32_t* failed;
};

struct Recorded {
  Handle graph = nullptr;
  uint64_t serial = 0;  // of the level that it reads
  std::vector<std::unique_ptr<Task>> tasks;
};

struct Slot {
  explicit Slot(std::shared_ptr<const Gpu> gpu) : device(std::move(gpu)) {
    device->check(device->driver.StreamCreate(&stream, NON_BLOCKING), "no stream on the GPU");
  }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() {
    const Driver& driver = device->driver;
    device->enter_quietly();
    for (Recorded& one : recorded) {
      if (one.graph != nullptr) driver.GraphExecDestroy(one.graph);
    }
    for (Handle event : events) driver.EventDestroy(event);
    for (DevicePointer pointer : {arena, input, output}) driver.MemFree(pointer);
    for (uint8_t* pointer : {host.arena, host.input, host.output}) {
      if (pointer != nullptr) driver.MemFreeHost(pointer);
    }
    driver.StreamDestroy(stream);
  }

  void allocate() {
    arena = device->allocate(kArenaBytes);
    input = device->allocate(kInputBytes);
    output = device->allocate(kOutputBytes);
    host.input = device->allocate_host(kInputBytes);
    host.output = device->allocate_host(kOutputBytes);
    if (kHostSteps) host.arena = device->allocate_host(kArenaBytes);
  }

  std::shared_ptr<const Gpu> device;
  Handle stream = nullptr;
  DevicePointer arena = 0, input = 0, output = 0;
  Memory host = {};
  int32_t failed = 0;
  Recorded recorded[2];  // main, codes
  std::vector<Handle> events;
};

std::vector<std::unique_ptr<Slot>> slots;  // those that no call uses

// A slot for one call
struct Lease {
  explicit Lease(const std::shared_ptr<const Gpu>& device) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!slots.empty()) {
        slot = std::move(slots.back());
        slots.pop_back();
        return;
      }
    }
    slot.reset(new Slot(device));
    slot->allocate();
  }
  ~Lease() {
    std::lock_guard<std::mutex> lock(mutex);
    slots.push_back(std::move(slot));
  }
  std::unique_ptr<Slot> slot;
};

void run_task(void* data) {
  Task* task = static_cast<Task*>(data);
  for (uint64_t image = 0; image < kBatch; image++) {
    if (task->step->call(task->memory, image) != 0) *task->failed = 1;
  }
}

class Runner {
 public:
  Runner(Slot& slot, const DLTensor* packed)
      : device_(*slot.device), driver_(device_.driver), slot_(slot), level_(*level_of(packed)) {
    slot.host.packed = static_cast<uint8_t*>(packed->data);
    bases_[PACKED] = level_.pointer, bases_[ARENA] = slot.arena;
    bases_[INPUT] = slot.input, bases_[OUTPUT] = slot.output;
  }

  // One of `main` (0) and `codes` (1) as a graph, recorded where the slot has none for this level
  void launch(int which, uint64_t output_bytes) {
    Recorded& recorded = slot_.recorded[which];
    if (recorded.serial != level_.serial) record(recorded, which, output_bytes);
    device_.check(driver_.GraphLaunch(recorded.graph, slot_.stream), "the GPU refuses the network");
  }

  // `main` step by step with an event around each
  void launch_timed(std::vector<std::unique_ptr<Task>>& tasks) {
    for (unsigned i = slot_.events.size(); i <= kBodySteps + kMainSteps; i++) {
      slot_.events.push_back(nullptr);
      device_.check(driver_.EventCreate(&slot_.events.back(), 0), "no event on the GPU");
    }
    copy_in();
    mark(0);
    for (unsigned i = 0; i < kBodySteps + kMainSteps; i++) {
      enqueue(i < kBodySteps ? kBody[i] : kMain[i - kBodySteps], tasks);
      mark(i + 1);
    }
    copy_out(kOutputBytes);
  }

  void wait() {
    slot_.failed = 0;
    device_.check(driver_.StreamSynchronize(slot_.stream), "the GPU failed");
    if (slot_.failed != 0) throw Failure{"a float kernel failed"};
  }

  int64_t nanoseconds(unsigned step) {
    float milliseconds = 0;
    device_.check(driver_.EventElapsedTime(&milliseconds, slot_.events[step], slot_.events[step + 1]), "no time");
    return static_cast<int64_t>(milliseconds * 1e6);
  }

 private:
  void record(Recorded& recorded, int which, uint64_t output_bytes) {
    if (recorded.graph != nullptr) driver_.GraphExecDestroy(recorded.graph);
    recorded.graph = nullptr, recorded.serial = 0;
    recorded.tasks.clear();
    device_.check(driver_.StreamBeginCapture(slot_.stream, THREAD_LOCAL), "the network cannot be recorded");
    Handle graph = nullptr;
    try {
      copy_in();
      for (unsigned i = 0; i < kBodySteps; i++) enqueue(kBody[i], recorded.tasks);
      for (unsigned i = 0; i < (which ? kCodesSteps : kMainSteps); i++) {
        enqueue(which ? kCodes[i] : kMain[i], recorded.tasks);
      }
      copy_out(output_bytes);
    } catch (const Failure&) {
      driver_.StreamEndCapture(slot_.stream, &graph);
      throw;
    }
    device_.check(driver_.StreamEndCapture(slot_.stream, &graph), "the network cannot be recorded");
    Result made = driver_.GraphInstantiate(&recorded.graph, graph, 0);
    driver_.GraphDestroy(graph);
    device_.check(made, "the network cannot be recorded");
    recorded.serial = level_.serial;
  }

  void copy_in() { up(slot_.input, slot_.host.input, kInputBytes); }

  void copy_out(uint64_t bytes) { down(slot_.host.output, slot_.output, bytes); }

  void up(DevicePointer to, const uint8_t* from, uint64_t bytes) {
    device_.check(driver_.MemcpyHtoDAsync(to, from, bytes, slot_.stream), "no copy to the GPU");
  }

  void down(uint8_t* to, DevicePointer from, uint64_t bytes) {
    device_.check(driver_.MemcpyDtoHAsync(to, from, bytes, slot_.stream), "no copy from the GPU");
  }

  void mark(unsigned i) { device_.check(driver_.EventRecord(slot_.events[i], slot_.stream), "no event on the GPU"); }

  void enqueue(const Step& step, std::vector<std::unique_ptr<Task>>& tasks) {
    if (step.call == nullptr) {
      alignas(8) uint8_t args[MOST_ARGS];
      memcpy(args, step.args, step.bytes);
      for (unsigned i = 0; i < step.patch_count; i++) {
        DevicePointer pointer = bases_[step.patches[i].area] + step.patches[i].at;
        memcpy(args + step.patches[i].offset, &pointer, sizeof(pointer));
      }
      void* params[1] = {args};
      device_.check(driver_.LaunchKernel(device_.functions[step.kernel], step.grid[0], step.grid[1], step.grid[2],
                                         step.block, 1, 1, 0, slot_.stream, params, nullptr),
                    std::string("the GPU refuses kernel ") + kKernels[step.kernel]);
      return;
    }
    for (unsigned i = 0; i < step.in_count; i++) {
      const Span& part = step.in[i];
      down(slot_.host.arena + part.at, slot_.arena + part.at, part.bytes);
    }
    tasks.emplace_back(new Task{&step, slot_.host, &slot_.failed});
    device_.check(driver_.LaunchHostFunc(slot_.stream, run_task, tasks.back().get()), "no float kernel can start");
    for (unsigned i = 0; i < step.out_count; i++) {
      const Span& part = step.out[i];
      up(slot_.arena + part.at, slot_.host.arena + part.at, part.bytes);
    }
  }

  const Gpu& device_;
  const Driver& driver_;
  Slot& slot_;
  Level level_;
  DevicePointer bases_[4];
};

enum Which { MAIN, CODES, PROFILE };

void run(Which which, const DLTensor* const* tensors) {
  const DLTensor *input = tensors[0], *packed = tensors[1], *output = tensors[3];
  if (!is_uploaded(level_of(packed))) throw Failure{"these parameters are not on the GPU: upload them first"};
  uint64_t bytes = which == CODES ? kCodesBytes : kOutputBytes;
  Lease lease(gpu());
  Slot& slot = *lease.slot;
  memcpy(slot.host.input, static_cast<const uint8_t*>(input->data) + input->byte_offset, kInputBytes);
  Runner runner(slot, packed);
  std::vector<std::unique_ptr<Task>> tasks;
  if (which == PROFILE) {
    runner.launch_timed(tasks);
  } else {
    runner.launch(which, bytes);
  }
  runner.wait();
  memcpy(static_cast<uint8_t*>(output->data) + output->byte_offset, slot.host.output, bytes);
  if (which == PROFILE) {
    int64_t* ticks = static_cast<int64_t*>(tensors[4]->data);
    for (unsigned i = 0; i < kBodySteps + kMainSteps; i++) ticks[i] = runner.nanoseconds(i);
  }
}

// The exported functions, by the calling convention of tvm-ffi --------------------------------------------------------

const DLTensor* tensor_of(const TVMFFIAny& arg) {
  if (arg.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(arg.v_ptr);
  if (arg.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(arg.v_obj);
  throw Failure{"an argument is not a tensor"};
}

uint64_t size_of(const DLTensor* tensor) {
  uint64_t size = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; i++) size *= tensor->shape[i];
  return size;
}

// Calls `body`(tensors) with arguments of `sizes` bytes (0: any), all on the host
template <class Body>
int guarded(const TVMFFIAny* args, int32_t count, std::initializer_list<uint64_t> sizes, TVMFFIAny* result, Body body) {
  try {
    if (count != static_cast<int32_t>(sizes.size())) throw Failure{"wrong number of arguments"};
    const DLTensor* tensors[8];
    for (int i = 0; i < count; i++) {
      tensors[i] = tensor_of(args[i]);
      uint64_t want = sizes.begin()[i];
      if (tensors[i]->device.device_type != kDLCPU) throw Failure{"arguments lie in the host's memory"};
      if (want != 0 && size_of(tensors[i]) != want) {
        throw Failure{"argument " + std::to_string(i) + " has " + std::to_string(size_of(tensors[i])) +
                      " bytes instead of " + std::to_string(want)};
      }
    }
    body(tensors);
    result->type_index = kTVMFFINone;
    result->v_int64 = 0;
    return 0;
  } catch (const Failure& failure) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", failure.text.c_str());
  } catch (const std::exception& error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
  }
  return -1;
}

void device_name(const DLTensor* const* tensors) {
  char* to = static_cast<char*>(tensors[0]->data);
  uint64_t size = size_of(tensors[0]);
  if (size == 0) throw Failure{"no room for the GPU's name"};
  memset(to, 0, size);
  const std::string name = gpu()->name;
  memcpy(to, name.data(), name.size() < size ? name.size() : size - 1);
}

}  // namespace

#define EXPORTED(name) \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_##name(void*, const TVMFFIAny* args, int32_t count, \
                                                                         TVMFFIAny* result)

EXPORTED(device) { return guarded(args, count, {0}, result, device_name); }

EXPORTED(upload) {
  return guarded(args, count, {kPackedBytes}, result, [](const DLTensor* const* t) { upload(t[0]); });
}

EXPORTED(release) {
  return guarded(args, count, {kPackedBytes}, result, [](const DLTensor* const* t) { release(t[0]); });
}

EXPORTED(main) {
  return guarded(args, count, {kInputBytes, kPackedBytes, 0, kOutputBytes}, result,
                 [](const DLTensor* const* t) { run(MAIN, t); });
}

#if QDEPLOY_CODES
EXPORTED(codes) {
  return guarded(args, count, {kInputBytes, kPackedBytes, 0, kCodesBytes}, result,
                 [](const DLTensor* const* t) { run(CODES, t); });
}
#endif

EXPORTED(profile) {
  return guarded(args, count, {kInputBytes, kPackedBytes, 0, kOutputBytes, 8 * (kBodySteps + kMainSteps)}, result,
                 [](const DLTensor* const* t) { run(PROFILE, t); });
}
