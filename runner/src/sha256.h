// SHA-256 (FIPS 180-4).
#ifndef QDEPLOY_RUNNER_SHA256_H_
#define QDEPLOY_RUNNER_SHA256_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace qdeploy {

class Sha256 {
 public:
  void Update(const void* data, size_t size);
  // 64 lower-case hex digits; the object is spent afterwards.
  std::string Hex();

 private:
  void Block(const uint8_t* data);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> pending_{};
  uint64_t length_ = 0;  // bytes
};

std::string Sha256Hex(std::string_view data);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_SHA256_H_
