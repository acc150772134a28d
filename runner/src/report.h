// What a run was: figures as JSON and as text.
#ifndef QDEPLOY_RUNNER_REPORT_H_
#define QDEPLOY_RUNNER_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "artifact.h"

namespace qdeploy {

// All images at one level.
struct Pass {
  std::string level;                 // empty: the artifact's own
  double prepare_ms = 0, pause_ms = 0;  // to make its parameters; between the level before and this one
  std::vector<int64_t> times;        // nanoseconds of each call
  std::vector<int64_t> ticks;        // in each kernel, summed over all calls
};

// Bytes of this process in memory: now, and at the highest point. /proc/self/status; 0 where Linux does not say.
struct Memory {
  int64_t resident = 0, peak = 0;
};
Memory MeasureMemory();

struct Report {
  std::string gpu;  // name of the GPU that ran; empty: the processor did
  int64_t images = 0;
  std::vector<Pass> passes;
  Memory memory;  // while the last level was in use
  int64_t compared = 0, differing = 0;  // elements of --expect; 0 compared: not asked for
};

std::string JsonReport(const Artifact& artifact, const Report& report);
std::string TextReport(const Artifact& artifact, const Report& report);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_REPORT_H_
