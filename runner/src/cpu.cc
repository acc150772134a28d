#include "cpu.h"

#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>

namespace qdeploy {
namespace {

#if defined(__x86_64__)

struct Feature {
  const char* name;  // LLVM's
  const char* flag;  // in /proc/cpuinfo
};

constexpr Feature kFeatures[] = {
    {"adx", "adx"},
    {"aes", "aes"},
    {"amx-int8", "amx_int8"},
    {"amx-tile", "amx_tile"},
    {"avx", "avx"},
    {"avx2", "avx2"},
    {"avx512bf16", "avx512_bf16"},
    {"avx512bitalg", "avx512_bitalg"},
    {"avx512bw", "avx512bw"},
    {"avx512cd", "avx512cd"},
    {"avx512dq", "avx512dq"},
    {"avx512f", "avx512f"},
    {"avx512fp16", "avx512_fp16"},
    {"avx512ifma", "avx512ifma"},
    {"avx512vbmi", "avx512vbmi"},
    {"avx512vbmi2", "avx512_vbmi2"},
    {"avx512vl", "avx512vl"},
    {"avx512vnni", "avx512_vnni"},
    {"avx512vpopcntdq", "avx512_vpopcntdq"},
    {"avxifma", "avx_ifma"},
    {"avxvnni", "avx_vnni"},
    {"avxvnniint8", "avx_vnni_int8"},
    {"bmi", "bmi1"},
    {"bmi2", "bmi2"},
    {"cx16", "cx16"},
    {"f16c", "f16c"},
    {"fma", "fma"},
    {"fma4", "fma4"},
    {"gfni", "gfni"},
    {"lzcnt", "abm"},
    {"movbe", "movbe"},
    {"pclmul", "pclmulqdq"},
    {"popcnt", "popcnt"},
    {"sha", "sha_ni"},
    {"sse", "sse"},
    {"sse2", "sse2"},
    {"sse3", "pni"},
    {"sse4.1", "sse4_1"},
    {"sse4.2", "sse4_2"},
    {"sse4a", "sse4a"},
    {"ssse3", "ssse3"},
    {"tbm", "tbm"},
    {"vaes", "vaes"},
    {"vpclmulqdq", "vpclmulqdq"},
    {"xop", "xop"},
};

// Flags of the first processor; the kernel leaves out what it does not save for processes.
std::set<std::string> Flags() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 5, "flags") != 0) continue;
    std::istringstream words(line.substr(std::min(line.find(':'), line.size() - 1) + 1));
    std::set<std::string> found;
    for (std::string word; words >> word;) found.insert(word);
    return found;
  }
  return {};
}

bool Has(const std::set<std::string>& flags, const Feature& feature) { return flags.count(feature.flag) != 0; }

#elif defined(__aarch64__)

struct Feature {
  const char* name;  // LLVM's
  int word;          // 1: AT_HWCAP, 2: AT_HWCAP2
  int bit;           // Documentation/arch/arm64/elf_hwcaps.rst, asm/hwcap.h
};

constexpr Feature kFeatures[] = {
    {"aes", 1, 3},       {"bf16", 2, 14},     {"complxnum", 1, 14}, {"crc", 1, 7},        {"dotprod", 1, 20},
    {"flagm", 1, 27},    {"fp-armv8", 1, 0},  {"fp16fml", 1, 23},   {"fullfp16", 1, 10},  {"i8mm", 2, 13},
    {"jsconv", 1, 13},   {"lse", 1, 8},       {"neon", 1, 1},       {"rcpc", 1, 15},      {"rcpc-immo", 1, 26},
    {"rdm", 1, 12},      {"sha2", 1, 6},      {"sha3", 1, 17},      {"sm4", 1, 19},       {"sve", 1, 22},
    {"sve2", 2, 1},
};

using Words = std::pair<unsigned long, unsigned long>;

Words Flags() { return {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)}; }

bool Has(const Words& words, const Feature& feature) {
  return (feature.word == 1 ? words.first : words.second) >> feature.bit & 1;
}

#else
#error "qdeploy-run is for x86_64 and aarch64"
#endif

}  // namespace

std::string Architecture() {
#if defined(__x86_64__)
  return "x86_64";
#else
  return "aarch64";
#endif
}

std::vector<std::string> KnownFeatures() {
  std::vector<std::string> names;
  for (const Feature& feature : kFeatures) names.emplace_back(feature.name);
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> PresentFeatures() {
  const auto flags = Flags();
  std::vector<std::string> names;
  for (const Feature& feature : kFeatures) {
    if (Has(flags, feature)) names.emplace_back(feature.name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> MissingFeatures(const std::vector<std::string>& required) {
  const std::vector<std::string> present = PresentFeatures();
  std::set<std::string> missing;
  for (const std::string& name : required) {
    if (!std::binary_search(present.begin(), present.end(), name)) missing.insert(name);
  }
  return {missing.begin(), missing.end()};
}

bool RequestTiles(const std::vector<std::string>& features) {
  const auto tiles = [](const std::string& name) { return name == "amx-tile" || name == "amx-int8"; };
  if (std::none_of(features.begin(), features.end(), tiles)) return true;
#if defined(__x86_64__)
  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Documentation/arch/x86/xstate.rst
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace qdeploy
