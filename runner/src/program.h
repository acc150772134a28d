// The loaded library of an artifact: calls of the functions that qdeploy/compile/entry.py defines.
#ifndef QDEPLOY_RUNNER_PROGRAM_H_
#define QDEPLOY_RUNNER_PROGRAM_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "artifact.h"
#include "files.h"

namespace qdeploy {

struct Library;  // an artifact's loaded code

// One level's parameters in the kernels' layout and, for a GPU, the copy in its memory that goes with them. Immutable
// while inference runs on it.
class Packed {
 public:
  Packed() = default;
  Packed(Packed&&) = default;
  Packed& operator=(Packed&& other) noexcept;
  ~Packed();

 private:
  friend class Program;
  explicit Packed(int64_t size) : bytes_(static_cast<size_t>(size)) {}
  void Upload(std::shared_ptr<const Library> library);
  void Release();  // the copy; does nothing where there is none

  Buffer bytes_;  // for a GPU the first 64 are the handle of the copy
  std::shared_ptr<const Library> gpu_;  // whose code made the copy; none: there is no copy
};

// A part of a weight tensor's bit planes as inflated (qdeploy/bundle/FORMAT.md, Weight tensors).
struct RawPart {
  int bits;
  int layout;  // 0: tight, 1: spaced, 2: sorted
  std::string_view bytes;
};

// `prepare` and `join` may run in another thread than inference, which has the one arena.
class Program {
 public:
  // Load the library. Raises Error(kMachine) where that fails, or the GPU is missing or another one.
  explicit Program(Artifact artifact);

  const Artifact& artifact() const { return artifact_; }
  const std::string& gpu() const { return gpu_; }  // name of the GPU; empty: the processor runs

  // The level that a constant artifact holds; raises Error for one that holds none.
  Packed StoredLevel() const;

  // Parameters in the order and sizes of artifact().params -> packed, in the memory of `over` unless that is empty.
  // Raises Error when a kernel refuses one.
  Packed Prepare(const std::vector<Buffer>& params, Packed over) const;

  // Container codes [count] of a tensor whose channels all have the planes of `parts`, one at least (join.py).
  void Join(const std::vector<RawPart>& parts, int shift, int bias, Buffer* codes) const;

  // One batch: float32 input -> `output`, float32 or, with `codes`, in artifact().codes.
  void Run(const float* input, const Packed& packed, bool codes, void* output);

  // As Run without codes; nanoseconds of each of artifact().calls are added to `ticks`.
  void Profile(const float* input, const Packed& packed, void* output, std::vector<int64_t>* ticks);

 private:
  const char* Hint() const;

  Artifact artifact_;
  std::string gpu_;
  std::shared_ptr<Library> library_;
  Buffer arena_;
};

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_PROGRAM_H_
