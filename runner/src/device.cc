#include "device.h"

#include <sys/stat.h>
#include <zlib.h>

#include <cstring>
#include <map>
#include <unordered_map>

#include "error.h"
#include "planes.h"
#include "sha256.h"

namespace qdeploy {
namespace {

constexpr int64_t kMaxManifest = 16 << 20, kMaxState = 64 << 10;
constexpr char kPull[] = "run `qdeploy pull` again to mend it";
constexpr char kFetch[] = "fetch it with `qdeploy climb`, or mend it with `qdeploy pull`";

// Raw DEFLATE -> exactly raw.size() bytes; false where the stream does not end there or is damaged.
bool Inflate(const Buffer& coded, Buffer* raw) {
  z_stream stream;
  std::memset(&stream, 0, sizeof stream);
  if (inflateInit2(&stream, -15) != Z_OK) FailMachine("there is no memory to inflate a piece: end other programs");
  stream.next_in = coded.data(), stream.avail_in = static_cast<uInt>(coded.size());
  stream.next_out = raw->data(), stream.avail_out = static_cast<uInt>(raw->size());
  uint8_t none;
  if (raw->size() == 0) stream.next_out = &none;
  const int end = inflate(&stream, Z_FINISH);
  const bool whole = end == Z_STREAM_END && stream.avail_in == 0 && stream.avail_out == 0;
  inflateEnd(&stream);
  return whole;
}

void MakeFolder(const std::string& path) {
  if (mkdir(path.c_str(), 0755) != 0 && !IsFolder(path)) {
    Fail("cannot write " + path + ": " + std::strerror(errno) + "; name an artifact folder with --artifact");
  }
}

bool Holds(const std::string& path, const Buffer& data) {
  return IsFile(path) && ReadFile(path, "the artifact's file", kMaxManifest << 7) == data.view();
}

}  // namespace

DeviceFolder::DeviceFolder(const std::string& path) : path_(path) {
  std::string digest;
  const std::string state = path + "/current.json";
  try {
    const Json current = Json::Parse(ReadFile(state, "the device state", kMaxState));
    current.CheckKeys("it", {"format", "url", "manifest", "level", "artifact", "target", "previous"});
    if (current.At("format").AsText("format") != "qdeploy-device/1") throw JsonError("its format is another one");
    digest = current.At("manifest").AsText("manifest");
    level_ = current.At("level").AsText("level");
    if (!current.At("artifact").is_null()) artifact_ = current.At("artifact").AsSize("artifact");
    if (digest.size() != 64 || digest.find_first_not_of("0123456789abcdef") != std::string::npos) {
      throw JsonError("manifest is not 64 hex digits");
    }
  } catch (const JsonError& e) {
    Fail(state + " is damaged (" + e.what() + "): " + kPull);
  }
  const std::string name = path + "/manifests/" + digest + ".json";
  const std::string data = ReadFile(name, "the manifest", kMaxManifest);
  if (Sha256Hex(data) != digest) Fail(name + " is damaged (its SHA-256 is not its name): " + kPull);
  try {
    manifest_ = ParseManifest(data);
  } catch (const JsonError& e) {
    Fail(name + " is illegal (" + e.what() + "): publish the release again");
  }
  manifest_.At(level_);
  if (artifact_ >= static_cast<int64_t>(manifest_.artifacts.size())) {
    Fail(state + " names an artifact that is not there: " + kPull);
  }
}

Buffer DeviceFolder::ReadPiece(int64_t index) const {
  const Piece& piece = manifest_.pieces[static_cast<size_t>(index)];
  const std::string& digest = manifest_.objects[static_cast<size_t>(piece.object)];
  const std::string path = path_ + "/objects/" + digest;
  if (!IsFile(path)) Fail("object " + digest + " is not in " + path_ + ": " + kFetch);
  const InputFile file(path, "the object");
  Buffer coded(static_cast<size_t>(piece.size));
  const bool there = file.Read(piece.offset, coded.data(), coded.size());
  if (!there || Sha256Hex(coded.view()) != piece.sha256) {
    Fail("object " + digest + " in " + path_ + " is damaged or not held in " + std::to_string(piece.offset) + ".." +
         std::to_string(piece.offset + piece.size) + ": " + kFetch);
  }
  if (!piece.deflate) return coded;
  // a DEFLATE stream expands at most 1032 times: no memory for a claim that cannot be true
  if (piece.raw / 1032 > piece.size + 1) Fail("piece " + std::to_string(index) + " cannot have its raw size: " + kPull);
  Buffer raw(static_cast<size_t>(piece.raw));
  if (!Inflate(coded, &raw)) {
    Fail("piece " + std::to_string(index) + " of object " + digest + " does not decode: publish the release again");
  }
  return raw;
}

std::string DeviceFolder::UnpackArtifact() const {
  if (artifact_ < 0) Fail(path_ + " has no compiled artifact: pull with --target, or name a folder with --artifact");
  const auto& files = manifest_.artifacts[static_cast<size_t>(artifact_)];
  std::vector<Json> rows;  // names the folder, as qdeploy/client/artifact.py does
  for (const auto& [name, piece] : files) {
    const std::string& digest = manifest_.pieces[static_cast<size_t>(piece)].sha256;
    rows.push_back(Json::List({Json::Text(name), Json::Text(digest)}));
  }
  const std::string folder = path_ + "/artifacts/" + Sha256Hex(Json::List(std::move(rows)).Canonical());
  for (const auto& [name, piece] : files) {
    const Buffer data = ReadPiece(piece);
    if (Holds(folder + "/" + name, data)) continue;
    MakeFolder(path_ + "/artifacts");
    MakeFolder(folder);
    OutputFile file(folder + "/" + name);
    file.Write(data.data(), data.size());
    file.Commit();
  }
  return folder;
}

// --- from pieces to the parameters of a level -----------------------------------------------------------------------

// Decoded pieces, each kept until its last use: small tensors share them.
class Assembler {
 public:
  Assembler(const DeviceFolder& folder, const Level& level, const Program& program)
      : folder_(folder), manifest_(folder.manifest_), level_(level), program_(program) {
    size_t weight = 0;
    int64_t cut = 0, used = 0;  // bytes cut out of the skeleton, bytes of the side piece, so far
    for (const Initializer& area : manifest_.initializers) {
      Source& source = sources_[area.name];
      source.area = &area;
      source.weight = weight;
      source.at = area.kind == Initializer::Kind::kSide ? used : area.offset - cut;
      if (area.kind == Initializer::Kind::kPlanes) ++weight;
      if (area.kind == Initializer::Kind::kSide) used += area.length();
      if (area.kind != Initializer::Kind::kFixed) cut += area.length();
    }
  }

  std::vector<Buffer> Params() {
    const std::vector<TensorInfo>& params = program_.artifact().params;
    for (const TensorInfo& param : params) {
      for (int64_t piece : Pieces(Find(param))) ++uses_[piece];
    }
    std::vector<Buffer> arrays;
    for (const TensorInfo& param : params) {
      const Source& source = Find(param);
      arrays.push_back(source.area->kind == Initializer::Kind::kPlanes ? Codes(source) : Copied(source));
      for (int64_t piece : Pieces(source)) {
        if (--uses_[piece] == 0) pieces_.erase(piece);
      }
    }
    return arrays;
  }

 private:
  struct Source {
    const Initializer* area;
    size_t weight;  // of planes: index of the tensor
    int64_t at;     // else: offset in the side piece or the skeleton
  };

  const Source& Find(const TensorInfo& param) const {
    const auto found = sources_.find(param.name);
    if (found == sources_.end() || found->second.area->dtype != param.dtype ||
        found->second.area->shape != param.shape) {
      Fail("parameter " + param.name + " of the artifact is not in the release: pull or publish both again");
    }
    return found->second;
  }

  std::vector<int64_t> Pieces(const Source& source) const {
    if (source.area->kind == Initializer::Kind::kSide) return {level_.side};
    if (source.area->kind == Initializer::Kind::kFixed) return {manifest_.skeleton};
    std::vector<int64_t> pieces;
    int held = 0;
    for (const Part& part : manifest_.tensors[source.weight].parts) {
      if ((held += part.bits) <= level_.tensors[source.weight].bits) pieces.push_back(part.piece);
    }
    return pieces;
  }

  const Buffer& Decoded(int64_t piece) {
    const auto found = pieces_.find(piece);
    return found != pieces_.end() ? found->second : pieces_.emplace(piece, folder_.ReadPiece(piece)).first->second;
  }

  Buffer Copied(const Source& source) {
    const bool side = source.area->kind == Initializer::Kind::kSide;
    const Buffer& from = Decoded(side ? level_.side : manifest_.skeleton);
    Buffer array(static_cast<size_t>(source.area->length()));
    std::memcpy(array.data(), from.data() + source.at, array.size());
    return array;
  }

  Buffer Codes(const Source& source) {
    const WeightTensor& tensor = manifest_.tensors[source.weight];
    const TensorLevel& level = level_.tensors[source.weight];
    const int64_t channels = source.area->shape[0];
    const Channels layout{channels, source.area->count() / channels, tensor.caps};
    std::vector<RawPart> parts;
    int held = 0;
    for (const Part& part : tensor.parts) {
      if (held + part.bits > level.bits) break;
      const int64_t bytes = PartBytes(part.bits, part.layout, layout.Packed(held));
      const std::string_view whole = Decoded(part.piece).view();
      parts.push_back({part.bits, part.layout,
                       whole.substr(static_cast<size_t>(part.start), static_cast<size_t>(bytes))});
      held += part.bits;
    }
    Buffer codes(static_cast<size_t>(source.area->length()));
    if (tensor.caps.empty() && level.bits > 0) {
      program_.Join(parts, level.shift, level.offsets[0] - ((1 << level.bits >> 1) << level.shift), &codes);
    } else {
      JoinPlanes(parts, layout, level.bits, level.shift, level.offsets, &codes);
    }
    return codes;
  }

  const DeviceFolder& folder_;
  const Manifest& manifest_;
  const Level& level_;
  const Program& program_;
  std::unordered_map<std::string, Source> sources_;
  std::map<int64_t, Buffer> pieces_;
  std::map<int64_t, int> uses_;
};

std::vector<Buffer> DeviceFolder::Assemble(const std::string& level, const Program& program) const {
  if (program.artifact().graph != manifest_.graph) {
    Fail("the artifact in " + program.artifact().folder + " is for another graph than " + manifest_.model +
         ": publish the release again");
  }
  try {
    return Assembler(*this, manifest_.At(level), program).Params();
  } catch (const Error& e) {
    throw Error(e.code(), "level " + level + ": " + e.what());
  }
}

}  // namespace qdeploy
