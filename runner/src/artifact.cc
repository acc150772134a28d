#include "artifact.h"

#include <algorithm>
#include <map>
#include <set>

#include "cpu.h"
#include "error.h"
#include "files.h"
#include "gpu.h"
#include "sha256.h"

namespace qdeploy {
namespace {

constexpr char kFormat[] = "qdeploy-artifact/2";
constexpr int64_t kMaxDescription = 16 << 20;
constexpr int64_t kMaxBytes = (int64_t{1} << 31) - 1;  // of a tensor, the arena, the packed parameters

std::string Version(const std::string& version) {  // major.minor
  const size_t dot = version.find('.');
  return version.substr(0, dot == std::string::npos ? dot : version.find('.', dot + 1));
}

std::string Joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string FileName(const Json& value, const char* what) {
  const std::string& name = value.AsText(what);
  if (name.empty() || name.find('/') != std::string::npos || name == "." || name == ".." ||
      name.find('\0') != std::string::npos) {
    throw JsonError(std::string(what) + " is not a file of the folder");
  }
  return name;
}

TensorInfo Tensor(const Json& row, const char* what, bool coded) {
  row.CheckKeys(what, coded ? std::vector<std::string_view>{"name", "dtype", "shape", "codes"}
                            : std::vector<std::string_view>{"name", "dtype", "shape"});
  TensorInfo info{row.At("name").AsText(what), row.At("dtype").AsText(what), {}};
  const int64_t item = ItemBytes(info.dtype);
  if (!item) throw JsonError(std::string(what) + " has an unknown dtype");
  int64_t bytes = item;
  for (const Json& axis : row.At("shape").AsList(what)) {
    info.shape.push_back(axis.AsSize(what));
    if (info.shape.back() > kMaxBytes || (bytes *= info.shape.back()) > kMaxBytes) {
      throw JsonError(std::string(what) + " is too large");
    }
  }
  return info;
}

TensorInfo Edge(const Json& rows, const char* what, bool coded) {
  if (rows.AsList(what).size() != 1) throw JsonError(std::string(what) + " is not a list of one entry");
  TensorInfo info = Tensor(rows.AsList(what)[0], what, coded);
  if (info.dtype != "float32" || info.shape.empty() || info.shape[0] < 1 || info.count() < 1) {
    throw JsonError(std::string(what) + " is not float32 with a batch of 1 or more");
  }
  return info;
}

int64_t Bytes(const Json& variant, const char* key) {
  const int64_t bytes = variant.At(key).AsSize(key);
  if (bytes > kMaxBytes) throw JsonError(std::string(key) + " is too large");
  return bytes;
}

std::vector<std::string> Features(const Json& variant) {
  std::vector<std::string> features;
  for (const Json& name : variant.At("target").At("features").AsList("features")) {
    features.push_back(name.AsText("a feature"));
  }
  return features;
}

std::vector<CallInfo> Calls(const Json& variant) {
  std::vector<CallInfo> calls;
  for (const Json& row : variant.At("kernels").AsList("kernels")) {
    const std::string &op = row.At("name").AsText("a kernel"), &kind = row.At("operator").AsText("a kernel");
    for (const Json& name : row.At("functions").AsList("functions")) {
      calls.push_back({name.AsText("a function"), op, kind});
    }
  }
  return calls;
}

// SHA-256 of a file, and whether it contains `note`.
std::pair<std::string, bool> Scan(const std::string& path, const std::string& note) {
  Sha256 digest;
  bool found = false;
  std::string window;
  ReadChunks(path, "the artifact's file", [&](std::string_view chunk) {
    digest.Update(chunk.data(), chunk.size());
    if (note.empty()) return;
    window.erase(0, window.size() - std::min(window.size(), note.size() - 1));
    window += chunk;
    found = found || window.find(note) != std::string::npos;
  });
  return {digest.Hex(), found};
}

// The note by GNU that holds a build id: lengths of name and value, type 3, name, value.
std::string BuildId(const std::string& digits) {
  std::string value;
  for (size_t i = 0; i < digits.size(); i += 2) {
    value += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
  }
  const auto word = [](size_t n) { return std::string{static_cast<char>(n), 0, 0, 0}; };
  return word(4) + word(value.size()) + word(3) + std::string("GNU\0", 4) + value;
}

// The digest that the variant's library carries: of its own description (qdeploy/compile/artifact.py, identity).
std::string Identity(const Json& head, const Json& variant) {
  std::vector<std::pair<std::string, Json>> entries;
  for (const char* key : {"format", "graph", "threads", "constant", "inputs", "outputs", "params"}) {
    entries.emplace_back(key, head.At(key));
  }
  for (const std::string& key : variant.Keys()) entries.emplace_back(key, variant.At(key));
  return Sha256Hex(Json::Object(std::move(entries)).Canonical());
}

// The architecture of a target's GPU; empty where it has none.
std::string Gpu(const Json& target) {
  const Json* gpu = target.Find("gpu");
  return gpu ? gpu->AsText("gpu") : "";
}

// The first variant that this machine's processor can run, those for its GPU before others. Where there are only some
// for GPUs that it does not have, the first of them: its code says what is wrong.
const Json& Suited(const std::vector<Json>& variants) {
  std::string reasons;
  const Json *local = nullptr, *foreign = nullptr;  // for the processor; for another GPU
  for (const Json& variant : variants) {
    const Json& target = variant.At("target");
    const std::string &name = target.At("name").AsText("target name"), &arch = target.At("arch").AsText("arch");
    const std::string& kind = target.At("kind").AsText("kind");
    const std::string gpu = Gpu(target);
    const std::vector<std::string> features = Features(variant), missing = MissingFeatures(features);
    std::string reason;
    if (arch != Architecture()) {
      reason = "target " + name + " is for " + arch + ", this program and machine are " + Architecture();
    } else if (kind != (gpu.empty() ? "llvm" : "cuda")) {
      reason = "target " + name + " is of kind " + kind + ", which this program does not run";
    } else if (!missing.empty()) {
      reason = "this machine's cpu lacks " + Joined(missing) + ", which target " + name + " needs";
    } else if (!RequestTiles(features)) {
      reason = "this system keeps AMX tiles from processes (Linux gives them from 5.16 on), for " + name;
    } else if (!gpu.empty() && HasGpu(gpu)) {
      return variant;
    } else {
      const Json*& first = gpu.empty() ? local : foreign;
      if (!first) first = &variant;
      continue;
    }
    reasons += (reasons.empty() ? "" : "; ") + reason;
  }
  if (local || foreign) return local ? *local : *foreign;
  FailMachine(reasons + ": compile for another target");
}

void CheckFiles(const Json& head, const std::string& folder) {
  std::set<std::string> wanted;
  for (const Json& variant : head.At("variants").AsList("variants")) {
    variant.CheckKeys("a variant", {"library", "target", "arena_bytes", "packed_bytes", "packed", "kernels"});
    wanted.insert(FileName(variant.At("library"), "library"));
    const Json& packed = variant.At("packed");
    if (packed.is_null() == head.At("constant").AsBool("constant")) throw JsonError("packed has a wrong type");
    if (!packed.is_null()) wanted.insert(FileName(packed, "packed"));
  }
  const std::vector<std::string> names = head.At("files").Keys();
  if (std::set<std::string>(names.begin(), names.end()) != wanted) throw JsonError("its files are not its variants'");
  for (const std::string& name : names) {
    if (Scan(folder + "/" + name, "").first != head.At("files").At(name).AsText("a digest")) {
      Fail(folder + "/" + name + " does not match artifact.json: fetch or compile the artifact again");
    }
  }
}

Artifact Read(const Json& head, const std::string& folder) {
  head.CheckKeys("it", {"format", "graph", "target", "threads", "constant", "inputs", "outputs", "params", "variants",
                        "versions", "files"});
  if (head.At("variants").AsList("variants").empty()) throw JsonError("it has no variants");
  CheckFiles(head, folder);
  const Json& variant = Suited(head.At("variants").AsList("variants"));
  const std::string& tvm = head.At("versions").At("apache-tvm").AsText("a version");
  if (Version(tvm) != Version(QDEPLOY_TVM_VERSION)) {
    FailMachine("the artifact was compiled by apache-tvm " + tvm + ", this program has " QDEPLOY_TVM_VERSION
                ": compile again, or take the runner of that version");
  }
  Artifact artifact;
  artifact.folder = folder;
  artifact.graph = head.At("graph").AsText("graph");
  artifact.threads = head.At("threads").AsSize("threads");
  artifact.constant = head.At("constant").AsBool("constant");
  artifact.input = Edge(head.At("inputs"), "inputs", false);
  artifact.output = Edge(head.At("outputs"), "outputs", true);
  artifact.codes = head.At("outputs").AsList("outputs")[0].At("codes").AsText("codes");
  if (!artifact.codes.empty() && artifact.codes != "uint8" && artifact.codes != "int8") {
    throw JsonError("codes are neither uint8 nor int8");
  }
  for (const Json& row : head.At("params").AsList("params")) artifact.params.push_back(Tensor(row, "params", false));
  artifact.target = variant.At("target").At("name").AsText("target name");
  artifact.gpu = Gpu(variant.At("target"));
  artifact.library = variant.At("library").AsText("library");
  if (artifact.constant) artifact.packed = variant.At("packed").AsText("packed");
  artifact.arena_bytes = Bytes(variant, "arena_bytes");
  artifact.packed_bytes = Bytes(variant, "packed_bytes");
  artifact.calls = Calls(variant);
  if (!Scan(folder + "/" + artifact.library, BuildId(Identity(head, variant))).second) {
    Fail(folder + "/" + artifact.library +
         " was not made with this artifact.json: fetch or compile the artifact again");
  }
  return artifact;
}

}  // namespace

int64_t TensorInfo::count() const {
  int64_t count = 1;
  for (int64_t axis : shape) count *= axis;
  return count;
}

int64_t ItemBytes(const std::string& dtype) {
  static const std::map<std::string, int64_t> kItems = {
      {"bool", 1},   {"int8", 1},   {"uint8", 1},   {"int16", 2}, {"uint16", 2}, {"float16", 2},
      {"int32", 4},  {"uint32", 4}, {"float32", 4}, {"int64", 8}, {"uint64", 8}, {"float64", 8}};
  const auto found = kItems.find(dtype);
  return found == kItems.end() ? 0 : found->second;
}

Artifact OpenArtifact(const std::string& folder) {
  const std::string path = folder + "/artifact.json";
  const std::string data = ReadFile(path, "the artifact's description", kMaxDescription);
  try {
    const Json head = Json::ParseCanonical(data);
    const Json* format = head.Find("format");
    if (!format || format->type() != Json::Type::kText || format->AsText("format") != kFormat) {
      Fail(path + " does not have the format " + kFormat + ": compile the model again");
    }
    return Read(head, folder);
  } catch (const JsonError& e) {
    Fail(path + " is damaged (" + e.what() + "): fetch or compile the artifact again");
  }
}

}  // namespace qdeploy
