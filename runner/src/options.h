// The command line of qdeploy-run.
#ifndef QDEPLOY_RUNNER_OPTIONS_H_
#define QDEPLOY_RUNNER_OPTIONS_H_

#include <cstdint>
#include <string>
#include <vector>

namespace qdeploy {

struct Options {
  std::string folder;                // an artifact folder or a device folder
  std::vector<std::string> inputs;   // files
  std::string output, expect;        // empty: none
  std::string level;                 // empty: the level in force
  std::vector<std::string> climb;    // levels to go to one after another
  std::string artifact;              // empty: the release's
  bool in_place = false;
  bool codes = false;
  bool profile = false;
  bool json = false;
  bool help = false, cpu = false;
  int64_t repeat = 1;
  int64_t threads = 0;  // 0: what the artifact was compiled for
};

extern const char kUsage[];

// Raises Error for an unknown option, a missing value or a contradiction.
Options ParseOptions(int argc, char** argv);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_OPTIONS_H_
