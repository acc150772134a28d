// What this machine's processor has, in LLVM's names of instruction sets (qdeploy/target.py has the same tables).
#ifndef QDEPLOY_RUNNER_CPU_H_
#define QDEPLOY_RUNNER_CPU_H_

#include <string>
#include <vector>

namespace qdeploy {

// The architecture that this program was built for, as artifacts name it: "x86_64" or "aarch64".
std::string Architecture();

// All instruction sets that can be checked, sorted, and those of them that this machine has.
std::vector<std::string> KnownFeatures();
std::vector<std::string> PresentFeatures();

// Those of `required` that this machine lacks or that cannot be checked, sorted.
std::vector<std::string> MissingFeatures(const std::vector<std::string>& required);

// Ask Linux for AMX tiles where `features` has them; false where it keeps them from this process.
bool RequestTiles(const std::vector<std::string>& features);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_CPU_H_
