// Errors that end the program: one line that says what to do, and who must act as the exit code.
#ifndef QDEPLOY_RUNNER_ERROR_H_
#define QDEPLOY_RUNNER_ERROR_H_

#include <stdexcept>
#include <string>

namespace qdeploy {

enum ExitCode : int {
  kDone = 0,
  kDiffers = 1,   // outputs are not those of --expect
  kBadInput = 2,  // arguments, images, a damaged artifact or level: give others, fetch again
  kMachine = 3,   // this machine cannot run the artifact: another architecture, a missing instruction set, no memory
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& text) : std::runtime_error(text), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

// Raise for input that is wrong.
[[noreturn]] inline void Fail(const std::string& text) { throw Error(kBadInput, text); }

// Raise for what this machine cannot do.
[[noreturn]] inline void FailMachine(const std::string& text) { throw Error(kMachine, text); }

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_ERROR_H_
