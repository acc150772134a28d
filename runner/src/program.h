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

// One level's parameters in the kernels' layout. Immutable while inference runs on it.
using Packed = Buffer;

// A part of a weight tensor's bit planes as inflated (qdeploy/bundle/FORMAT.md, Weight tensors).
struct RawPart {
  int bits;
  int layout;  // 0: tight, 1: spaced, 2: sorted
  std::string_view bytes;
};

// `prepare` and `join` may run in another thread than inference, which has the one arena.
class Program {
 public:
  // Load the library. Raises Error(kMachine) where that fails.
  explicit Program(Artifact artifact);
  ~Program();

  const Artifact& artifact() const { return artifact_; }

  // The level that a constant artifact holds; raises Error for one that holds none.
  Packed StoredLevel() const;

  // Parameters in the order and sizes of artifact().params -> `packed`. Raises Error when a kernel refuses one.
  void Prepare(const std::vector<Buffer>& params, Packed* packed) const;

  // Container codes [count] of a tensor whose channels all have the planes of `parts`, one at least (join.py).
  void Join(const std::vector<RawPart>& parts, int shift, int bias, Buffer* codes) const;

  // One batch: float32 input -> `output`, float32 or, with `codes`, in artifact().codes.
  void Run(const float* input, const Packed& packed, bool codes, void* output);

  // As Run without codes; nanoseconds of each of artifact().calls are added to `ticks`.
  void Profile(const float* input, const Packed& packed, void* output, std::vector<int64_t>* ticks);

 private:
  struct Library;

  Artifact artifact_;
  std::unique_ptr<Library> library_;
  Buffer arena_;
};

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_PROGRAM_H_
