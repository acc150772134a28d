// A device folder (qdeploy/client/state.py): the level in force and the pieces of the release that are held.
#ifndef QDEPLOY_RUNNER_DEVICE_H_
#define QDEPLOY_RUNNER_DEVICE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "artifact.h"
#include "files.h"
#include "manifest.h"
#include "program.h"

namespace qdeploy {

// Only reads, but for UnpackArtifact. What is read is compared with its digest, whatever the folder's journal says.
class DeviceFolder {
 public:
  // Raises Error for a folder without a level in force or with a damaged manifest.
  explicit DeviceFolder(const std::string& path);

  const Manifest& manifest() const { return manifest_; }
  const std::string& level() const { return level_; }  // in force

  // The folder of the release's compiled artifact; files that are missing or damaged there are written from their
  // pieces. Raises Error where the pull brought none.
  std::string UnpackArtifact() const;

  // Parameters of a level in the order of program.artifact().params; planes are joined by the library's `join` where
  // it can. Raises Error for missing or damaged pieces and for an artifact of another graph.
  std::vector<Buffer> Assemble(const std::string& level, const Program& program) const;

 private:
  friend class Assembler;
  Buffer ReadPiece(int64_t index) const;

  std::string path_, level_;
  int64_t artifact_ = -1;
  Manifest manifest_;
};

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_DEVICE_H_
