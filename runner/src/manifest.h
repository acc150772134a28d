// The manifest of a bundle (qdeploy/bundle/FORMAT.md), as far as a device that runs it needs it.
#ifndef QDEPLOY_RUNNER_MANIFEST_H_
#define QDEPLOY_RUNNER_MANIFEST_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "json.h"

namespace qdeploy {

struct Piece {
  int64_t object, offset, size, raw;
  bool deflate;
  std::string sha256;
};

struct Initializer {
  enum class Kind { kPlanes, kSide, kFixed };

  std::string name, dtype;
  std::vector<int64_t> shape;
  int64_t offset;
  Kind kind;

  int64_t count() const;
  int64_t length() const;  // bytes
};

struct Part {
  int bits, layout;  // as in RawPart
  int64_t piece, start;
};

struct WeightTensor {
  int bits;
  std::vector<Part> parts;
  std::vector<int> caps;  // empty: none
};

struct TensorLevel {
  int bits, shift;
  std::vector<int> offsets;  // one, or bits of the tensor + 1
};

struct Level {
  std::string name;
  int64_t side;  // piece; -1: none
  std::vector<TensorLevel> tensors;
};

struct Manifest {
  std::string model, graph;
  int64_t size;  // of the ONNX file
  std::vector<std::string> objects;  // digests
  std::vector<int64_t> object_sizes;
  std::vector<Piece> pieces;
  int64_t skeleton;
  std::vector<Initializer> initializers;
  std::vector<WeightTensor> tensors;
  std::vector<Level> levels;
  std::vector<std::vector<std::pair<std::string, int64_t>>> artifacts;  // (file name, piece)

  // Raises Error that names the levels there are.
  const Level& At(const std::string& name) const;
};

// Parse canonical JSON and check every rule on which the assembly of a level relies. Raises JsonError.
Manifest ParseManifest(std::string_view data);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_MANIFEST_H_
