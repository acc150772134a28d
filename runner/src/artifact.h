// An artifact folder (docs/handovers.md): its description, checked, and the variant that this machine runs.
#ifndef QDEPLOY_RUNNER_ARTIFACT_H_
#define QDEPLOY_RUNNER_ARTIFACT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace qdeploy {

// A tensor at the edge of a model: numpy's name of its dtype.
struct TensorInfo {
  std::string name, dtype;
  std::vector<int64_t> shape;

  int64_t count() const;
};

// One kernel call as `profile` times it.
struct CallInfo {
  std::string function, op, kind;  // `op` and `kind`: the operator that it computes
};

struct Artifact {
  std::string folder, graph;
  int64_t threads;
  bool constant;  // it holds a level of its own
  TensorInfo input, output;
  std::string codes;  // dtype of the codes before the last Dequantize; empty where the output has none
  std::vector<TensorInfo> params;
  // of the variant
  std::string target, library, packed;  // name of the target; files in `folder` (`packed` only where `constant`)
  std::string gpu;  // architecture of the GPU that it has code for ("sm_75"); empty: the processor
  int64_t arena_bytes, packed_bytes;
  std::vector<CallInfo> calls;
};

// Bytes of an element of `dtype`, numpy's name; 0 for an unknown one.
int64_t ItemBytes(const std::string& dtype);

// Check the description, the digest of each file, this machine's processor and the library's build id; nothing is
// loaded. Raises Error that says what is wrong and what to do.
Artifact OpenArtifact(const std::string& folder);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_ARTIFACT_H_
