#include "manifest.h"

#include <algorithm>
#include <map>
#include <set>

#include "artifact.h"
#include "error.h"
#include "planes.h"

namespace qdeploy {
namespace {

constexpr char kFormat[] = "qdeploy-bundle/1";
constexpr int64_t kMaxBytes = (int64_t{1} << 31) - 1;

void Want(bool condition, const std::string& text) {
  if (!condition) throw JsonError(text);
}

bool IsDigest(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

bool IsFileName(const std::string& text) {
  const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
  return !text.empty() && text.size() <= 100 && letters.find(text[0]) != std::string::npos &&
         text.find_first_not_of(letters + "._-") == std::string::npos;
}

std::string Digest(const Json& value, const char* what) {
  Want(IsDigest(value.AsText(what)), std::string(what) + " is not 64 hex digits");
  return value.AsText(what);
}

int64_t Size(const Json& value, const char* what, int64_t least = 0) {
  const int64_t size = value.AsSize(what);
  Want(size >= least && size <= kMaxBytes, std::string(what) + " is out of range");
  return size;
}

int Small(const Json& value, const char* what, int low, int high) {
  const int64_t number = value.AsInteger(what);
  Want(number >= low && number <= high, std::string(what) + " is out of range");
  return static_cast<int>(number);
}

const std::vector<Json>& Rows(const Json& value, const char* what, size_t limit) {
  Want(value.AsList(what).size() <= limit, std::string(what) + " has too many entries");
  return value.AsList(what);
}

const std::vector<Json>& Row(const Json& value, const char* what, size_t length) {
  Want(value.AsList(what).size() == length, std::string(what) + " has another length");
  return value.AsList(what);
}

void ReadObjects(const Json& top, Manifest* manifest) {
  for (const Json& entry : Rows(top.At("objects"), "objects", 65536)) {
    entry.CheckKeys("an object", {"sha256", "size", "leaves"});
    manifest->objects.push_back(Digest(entry.At("sha256"), "an object"));
    manifest->object_sizes.push_back(Size(entry.At("size"), "an object", 1));
    const int64_t leaves = (manifest->object_sizes.back() + 65535) / 65536;
    const auto& found = entry.At("leaves").AsList("leaves");
    Want(static_cast<int64_t>(found.size()) == (leaves > 1 ? leaves : 0), "an object has another number of leaves");
    for (const Json& leaf : found) Digest(leaf, "a leaf");
  }
}

// Pieces follow one another and fill the objects.
void ReadPieces(const Json& top, Manifest* manifest) {
  int64_t object = 0, offset = 0;
  for (const Json& entry : Rows(top.At("pieces"), "pieces", 262144)) {
    const auto& row = Row(entry, "a piece", 6);
    Piece piece{Size(row[0], "a piece"), Size(row[1], "a piece"), Size(row[2], "a piece", 1), Size(row[3], "a piece"),
                row[4].AsText("codec") == "deflate", Digest(row[5], "a piece")};
    Want(piece.deflate || row[4].AsText("codec") == "raw", "a piece has an unknown codec");
    Want(piece.deflate || piece.size == piece.raw, "a raw piece has two sizes");
    Want(object < static_cast<int64_t>(manifest->objects.size()), "a piece is of no object");
    Want(piece.object == object && piece.offset == offset, "a piece begins where none may");
    const int64_t end = manifest->object_sizes[static_cast<size_t>(object)];
    offset += piece.size;
    Want(offset <= end, "a piece leaves its object");
    if (offset == end) ++object, offset = 0;
    manifest->pieces.push_back(std::move(piece));
  }
  Want(object == static_cast<int64_t>(manifest->objects.size()), "the pieces do not fill the objects");
}

void ReadInitializers(const Json& top, Manifest* manifest) {
  static const std::map<std::string, Initializer::Kind> kKinds = {{"planes", Initializer::Kind::kPlanes},
                                                                  {"side", Initializer::Kind::kSide},
                                                                  {"fixed", Initializer::Kind::kFixed}};
  int64_t end = 0;
  std::set<std::string> names;
  for (const Json& entry : Rows(top.At("initializers"), "initializers", 65536)) {
    const auto& row = Row(entry, "an initializer", 5);
    const auto kind = kKinds.find(row[4].AsText("kind"));
    Want(kind != kKinds.end(), "an initializer has an unknown kind");
    Initializer info{row[0].AsText("a name"), row[1].AsText("dtype"), {}, Size(row[3], "an initializer"), kind->second};
    Want(names.insert(info.name).second, "an initializer appears twice");
    int64_t bytes = ItemBytes(info.dtype);
    Want(bytes > 0, "an initializer has an unknown dtype");
    for (const Json& axis : Rows(row[2], "a shape", 8)) {
      info.shape.push_back(Size(axis, "an axis"));
      bytes *= info.shape.back();
      Want(bytes <= kMaxBytes, "an initializer is too large");
    }
    Want(info.offset >= end && info.offset + bytes <= manifest->size, "an initializer lies where none may");
    const bool planes = info.kind == Initializer::Kind::kPlanes;
    Want(!planes || ((info.dtype == "int8" || info.dtype == "uint8") && !info.shape.empty()), "a weight is not int8");
    Want(info.kind == Initializer::Kind::kFixed || bytes > 0, "an initializer that is not fixed is empty");
    end = info.offset + bytes;
    manifest->initializers.push_back(std::move(info));
  }
}

WeightTensor ReadTensor(const Json& entry, const Initializer& area) {
  entry.CheckKeys("a tensor", {"name", "bits", "parts"}, {"caps"});
  Want(entry.At("name").AsText("a name") == area.name, "the tensors are not the initializers of planes");
  WeightTensor tensor{Small(entry.At("bits"), "bits", 1, 8), {}, {}};
  if (const Json* caps = entry.Find("caps")) {
    for (const Json& cap : Row(*caps, "caps", static_cast<size_t>(area.shape[0]))) {
      tensor.caps.push_back(Small(cap, "a cap", 0, tensor.bits));
    }
    const auto last = std::max_element(tensor.caps.begin(), tensor.caps.end());
    Want(last != tensor.caps.end() && *last == tensor.bits, "no channel has all planes");
  }
  int held = 0;
  for (const Json& part : Rows(entry.At("parts"), "parts", 8)) {
    const auto& row = Row(part, "a part", 4);
    const std::string& name = row[1].AsText("layout");
    const int layout = name == "tight" ? 0 : name == "spaced" ? 1 : name == "sorted" ? 2 : -1;
    const int bits = Small(row[0], "bits of a part", 1, 8);
    const bool suits = layout == 0 || (layout == 1 && (bits == 3 || (bits >= 5 && bits <= 7))) ||
                       (layout == 2 && bits == 1 && held > 0);
    Want(suits, "a part has a layout that does not suit it");
    for (int cap : tensor.caps) Want(cap <= held || cap >= held + bits, "a cap lies inside a part");
    tensor.parts.push_back({bits, layout, Size(row[2], "a part"), Size(row[3], "a part")});
    held += bits;
  }
  Want(held == tensor.bits, "the parts do not add up to the tensor's bits");
  return tensor;
}

Channels ChannelsOf(const Initializer& area, const WeightTensor& tensor) {
  const int64_t count = area.shape[0];
  return {count, count ? area.count() / count : 0, tensor.caps};
}

// Tensors, whose parts fill their pieces.
void ReadTensors(const Json& top, Manifest* manifest) {
  std::map<int64_t, std::vector<std::pair<int64_t, int64_t>>> spans;
  const auto& rows = Rows(top.At("tensors"), "tensors", 16384);
  size_t index = 0;
  for (const Initializer& area : manifest->initializers) {
    if (area.kind != Initializer::Kind::kPlanes) continue;
    Want(index < rows.size(), "a weight has no planes");
    WeightTensor tensor = ReadTensor(rows[index++], area);
    const Channels channels = ChannelsOf(area, tensor);
    int held = 0;
    for (const Part& part : tensor.parts) {
      spans[part.piece].emplace_back(part.start, PartBytes(part.bits, part.layout, channels.Packed(held)));
      held += part.bits;
    }
    manifest->tensors.push_back(std::move(tensor));
  }
  Want(index == rows.size(), "there are planes of no weight");
  for (auto& [piece, areas] : spans) {
    Want(piece < static_cast<int64_t>(manifest->pieces.size()), "a part is of no piece");
    std::sort(areas.begin(), areas.end());
    int64_t end = 0;
    for (const auto& [start, bytes] : areas) {
      Want(start == end, "a part begins where none may");
      end += bytes;
    }
    Want(manifest->pieces[static_cast<size_t>(piece)].raw == end, "the parts do not fill their piece");
  }
}

TensorLevel ReadTensorLevel(const Json& entry, const WeightTensor& tensor, const std::string& dtype) {
  const auto& row = Row(entry, "a tensor of a level", 3);
  TensorLevel level{Small(row[0], "bits", 0, tensor.bits), Small(row[1], "shift", 0, 8), {}};
  int held = 0;
  bool whole = level.bits == 0;
  for (const Part& part : tensor.parts) whole = whole || (held += part.bits) == level.bits;
  Want(whole, "a level ends inside a part");
  if (tensor.caps.empty()) {
    level.offsets.push_back(Small(row[2], "offset", -255, 255));
  } else {
    for (const Json& offset : Row(row[2], "offsets", static_cast<size_t>(tensor.bits) + 1)) {
      level.offsets.push_back(Small(offset, "offset", -255, 255));
    }
  }
  const std::vector<int> all = {tensor.bits};
  for (int cap : tensor.caps.empty() ? all : tensor.caps) {
    const int own = std::min(level.bits, cap), unit = 1 << (level.shift + level.bits - own);
    const int offset = level.offsets[tensor.caps.empty() ? 0 : static_cast<size_t>(cap)];
    const int low = own ? -(1 << (own - 1)) * unit : 0, high = own ? ((1 << (own - 1)) - 1) * unit : 0;
    const bool fits = dtype == "int8" ? low + offset >= -128 && high + offset <= 127
                                      : low + offset >= 0 && high + offset <= 255;
    Want(fits, "the codes of a level leave their range");
  }
  return level;
}

void CheckRaw(const Manifest& manifest, int64_t piece, int64_t bytes, const char* what) {
  Want(piece >= 0 && piece < static_cast<int64_t>(manifest.pieces.size()) &&
           manifest.pieces[static_cast<size_t>(piece)].raw == bytes,
       std::string(what) + " has no piece of its size");
}

void ReadLevels(const Json& top, Manifest* manifest) {
  std::vector<const Initializer*> weights;
  int64_t side = 0, planes = 0;
  for (const Initializer& area : manifest->initializers) {
    if (area.kind == Initializer::Kind::kPlanes) weights.push_back(&area), planes += area.length();
    if (area.kind == Initializer::Kind::kSide) side += area.length();
  }
  CheckRaw(*manifest, manifest->skeleton, manifest->size - side - planes, "the skeleton");
  std::set<std::string> names;
  for (const Json& entry : Rows(top.At("levels"), "levels", 64)) {
    entry.CheckKeys("a level", {"name", "sha256", "side", "tensors"}, {"golden", "info"});
    Level level{entry.At("name").AsText("a name"), -1, {}};
    Want(IsFileName(level.name) && names.insert(level.name).second, "a level has an illegal name");
    Digest(entry.At("sha256"), "a level");
    Want(entry.At("side").is_null() == (side == 0), "a level's side piece is there without side tensors");
    if (side) {
      level.side = Size(entry.At("side"), "a level's side piece");
      CheckRaw(*manifest, level.side, side, "a level's side");
    }
    const auto& rows = Row(entry.At("tensors"), "tensors of a level", manifest->tensors.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      level.tensors.push_back(ReadTensorLevel(rows[i], manifest->tensors[i], weights[i]->dtype));
    }
    manifest->levels.push_back(std::move(level));
  }
  Want(!manifest->levels.empty(), "there are no levels");
}

void ReadArtifacts(const Json& top, Manifest* manifest) {
  for (const Json& entry : Rows(top.At("artifacts"), "artifacts", 64)) {
    entry.CheckKeys("an artifact", {"target", "files"});
    auto& files = manifest->artifacts.emplace_back();
    std::set<std::string> names;
    for (const Json& file : Rows(entry.At("files"), "files", 64)) {
      const auto& row = Row(file, "a file", 2);
      const std::string& name = row[0].AsText("a file");
      Want(IsFileName(name) && names.insert(name).second, "an artifact's file has an illegal name");
      files.emplace_back(name, Size(row[1], "a file"));
      Want(files.back().second < static_cast<int64_t>(manifest->pieces.size()), "an artifact's file is of no piece");
    }
    Want(!files.empty(), "an artifact has no files");
  }
}

}  // namespace

int64_t Initializer::count() const {
  int64_t count = 1;
  for (int64_t axis : shape) count *= axis;
  return count;
}

int64_t Initializer::length() const { return count() * ItemBytes(dtype); }

const Level& Manifest::At(const std::string& name) const {
  std::string names;
  for (const Level& level : levels) {
    if (level.name == name) return level;
    names += (names.empty() ? "" : ", ") + level.name;
  }
  Fail("no level " + name + " in " + model + ": levels are " + names);
}

Manifest ParseManifest(std::string_view data) {
  const Json top = Json::ParseCanonical(data);
  top.CheckKeys("it", {"format", "model", "release", "graph", "size", "objects", "pieces", "skeleton", "initializers",
                       "tensors", "levels", "artifacts"});
  Want(top.At("format").AsText("format") == kFormat, std::string("its format is not ") + kFormat);
  Manifest manifest;
  manifest.model = top.At("model").AsText("model");
  Want(IsFileName(manifest.model), "its model has an illegal name");
  Want(top.At("release").AsSize("release") >= 1, "its release number is below 1");
  manifest.graph = Digest(top.At("graph"), "graph");
  manifest.size = Size(top.At("size"), "size", 1);
  manifest.skeleton = Size(top.At("skeleton"), "skeleton");
  ReadObjects(top, &manifest);
  ReadPieces(top, &manifest);
  ReadInitializers(top, &manifest);
  ReadTensors(top, &manifest);
  ReadLevels(top, &manifest);
  ReadArtifacts(top, &manifest);
  return manifest;
}

}  // namespace qdeploy
