#include "gpu.h"

#include <dlfcn.h>

namespace qdeploy {
namespace {

constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
constexpr int kOrin = 87;                // Jetson Orin takes only code that is made for it

template <typename... Args>
bool Call(void* driver, const char* name, Args... args) {
  const auto function = reinterpret_cast<int (*)(Args...)>(dlsym(driver, name));
  return function && function(args...) == 0;
}

// Ten times the major and the minor version of the first GPU; 0 where there is none.
int Capability() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // never closed: the artifact uses it too
  int count = 0, device = 0, major = 0, minor = 0;
  const bool found = driver && Call(driver, "cuInit", 0u) && Call(driver, "cuDeviceGetCount", &count) && count > 0 &&
                     Call(driver, "cuDeviceGet", &device, 0) &&
                     Call(driver, "cuDeviceGetAttribute", &major, kMajor, device) &&
                     Call(driver, "cuDeviceGetAttribute", &minor, kMinor, device);
  return found ? 10 * major + minor : 0;
}

// 75 of "sm_75"; 0 for anything else.
int Number(const std::string& arch) {
  const std::string digits = arch.substr(0, 3) == "sm_" ? arch.substr(3) : "";
  if (digits.size() < 2 || digits.size() > 3 || digits.find_first_not_of("0123456789") != std::string::npos) return 0;
  return std::stoi(digits);
}

}  // namespace

bool HasGpu(const std::string& arch) {
  const int code = Number(arch), gpu = Capability();
  return code && gpu / 10 == code / 10 && gpu >= code && (gpu == kOrin) == (code == kOrin);
}

}  // namespace qdeploy
