// The GPU of this machine, as far as the choice of a variant needs it.
#ifndef QDEPLOY_RUNNER_GPU_H_
#define QDEPLOY_RUNNER_GPU_H_

#include <string>

namespace qdeploy {

// Whether this machine's first GPU takes machine code for `arch` ("sm_75"); false without a GPU or a driver.
// qdeploy/target.py has the same rule.
bool HasGpu(const std::string& arch);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_GPU_H_
