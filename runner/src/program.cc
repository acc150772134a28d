#include "program.h"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstring>
#include <utility>

#include "error.h"

namespace qdeploy {
namespace {

namespace ffi = tvm::ffi;

// A view of memory as a compact tensor, for the length of a call.
class View {
 public:
  View(const void* data, DLDataTypeCode code, int bits, std::vector<int64_t> shape) : shape_(std::move(shape)) {
    tensor_.data = const_cast<void*>(data);
    tensor_.device = {kDLCPU, 0};
    tensor_.ndim = static_cast<int32_t>(shape_.size());
    tensor_.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    tensor_.shape = shape_.data();
    strides_.assign(shape_.size(), 1);
    for (size_t i = shape_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * shape_[i];
    tensor_.strides = strides_.data();
    tensor_.byte_offset = 0;
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  operator DLTensor*() { return &tensor_; }

  static View Bytes(const void* data, size_t size) { return View(data, kDLUInt, 8, {static_cast<int64_t>(size)}); }

 private:
  std::vector<int64_t> shape_, strides_;
  DLTensor tensor_;
};

// The telling line of an error of TVM's.
std::string Reason(const ffi::Error& error) {
  std::string text = error.message();
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  const size_t line = text.rfind('\n');
  return line == std::string::npos ? text : text.substr(line + 1);
}

ffi::Function Exported(const ffi::Module& module, const char* name) {
  const ffi::Optional<ffi::Function> function = module->GetFunction(name);
  if (!function.has_value()) {
    FailMachine(std::string("the library has no function ") + name + ": fetch or compile the artifact again");
  }
  return function.value();
}

template <typename... Args>
void Guarded(const ffi::Function& function, const char* hint, Args&&... args) {
  try {
    function(std::forward<Args>(args)...);
  } catch (const ffi::Error& e) {
    Fail(Reason(e) + ": " + hint);
  }
}

constexpr char kAgain[] = "fetch or compile the artifact again";

}  // namespace

struct Program::Library {
  explicit Library(const std::string& path) : module(ffi::Module::LoadFromFile(path)) {}

  ffi::Module module;
  ffi::Function prepare, main, profile, join, codes;
};

Program::Program(Artifact artifact)
    : artifact_(std::move(artifact)), arena_(static_cast<size_t>(artifact_.arena_bytes)) {
  const std::string path = artifact_.folder + "/" + artifact_.library;
  try {  // a name without a slash would be looked up elsewhere
    library_ = std::make_unique<Library>(path.find('/') == std::string::npos ? "./" + path : path);
  } catch (const ffi::Error& e) {
    FailMachine(path + " cannot be loaded (" + Reason(e) + "): compile the model for this machine");
  }
  library_->prepare = Exported(library_->module, "prepare");
  library_->main = Exported(library_->module, "main");
  library_->profile = Exported(library_->module, "profile");
  library_->join = Exported(library_->module, "join");
  if (!artifact_.codes.empty()) library_->codes = Exported(library_->module, "codes");
}

Program::~Program() = default;

Packed Program::StoredLevel() const {
  if (!artifact_.constant) {
    Fail(artifact_.folder + " holds no level: run a pulled folder, or compile with --constant");
  }
  const std::string path = artifact_.folder + "/" + artifact_.packed;
  const InputFile file(path, "the packed parameters");
  if (file.size() != artifact_.packed_bytes) {
    Fail(path + " has another length than artifact.json says: fetch or compile the artifact again");
  }
  Packed packed(static_cast<size_t>(file.size()));
  if (!file.Read(0, packed.data(), packed.size())) Fail("cannot read " + path + ": it became shorter");
  return packed;
}

void Program::Prepare(const std::vector<Buffer>& params, Packed* packed) const {
  const Buffer addresses(params.size() * sizeof(int64_t));  // a Buffer: compiled code relies on its alignment
  int64_t* address = reinterpret_cast<int64_t*>(addresses.data());
  for (const Buffer& param : params) *address++ = reinterpret_cast<int64_t>(param.data());
  std::memset(packed->data(), 0, packed->size());
  View pointers(addresses.data(), kDLInt, 64, {static_cast<int64_t>(params.size())});
  View out = View::Bytes(packed->data(), packed->size());
  Guarded(library_->prepare, "the level's parameters do not fit the artifact; publish the release again",
          static_cast<DLTensor*>(pointers), static_cast<DLTensor*>(out));
}

void Program::Join(const std::vector<RawPart>& parts, int shift, int bias, Buffer* codes) const {
  std::memset(codes->data(), 0, codes->size());
  View out = View::Bytes(codes->data(), codes->size());
  int left = 0, held = 0;
  for (const RawPart& part : parts) left += part.bits;
  for (const RawPart& part : parts) {
    left -= part.bits;
    const Buffer bytes(part.bytes.size());  // parts begin anywhere in their piece
    std::memcpy(bytes.data(), part.bytes.data(), part.bytes.size());
    View raw = View::Bytes(bytes.data(), bytes.size());
    Guarded(library_->join, "run `qdeploy pull` again", static_cast<DLTensor*>(raw), static_cast<DLTensor*>(out),
            part.bits, part.layout, held, shift + left, 0, left ? 0 : bias);
    held += part.bits;
  }
}

void Program::Run(const float* input, const Packed& packed, bool codes, void* output) {
  View x(input, kDLFloat, 32, artifact_.input.shape);
  View level = View::Bytes(packed.data(), packed.size()), arena = View::Bytes(arena_.data(), arena_.size());
  View y(output, !codes ? kDLFloat : artifact_.codes == "int8" ? kDLInt : kDLUInt, codes ? 8 : 32,
         artifact_.output.shape);
  Guarded(codes ? library_->codes : library_->main, kAgain, static_cast<DLTensor*>(x), static_cast<DLTensor*>(level),
          static_cast<DLTensor*>(arena), static_cast<DLTensor*>(y));
}

void Program::Profile(const float* input, const Packed& packed, void* output, std::vector<int64_t>* ticks) {
  const size_t count = artifact_.calls.size();
  const Buffer times(count * sizeof(int64_t));
  View x(input, kDLFloat, 32, artifact_.input.shape), y(output, kDLFloat, 32, artifact_.output.shape);
  View level = View::Bytes(packed.data(), packed.size()), arena = View::Bytes(arena_.data(), arena_.size());
  View out(times.data(), kDLInt, 64, {static_cast<int64_t>(count)});
  Guarded(library_->profile, kAgain, static_cast<DLTensor*>(x), static_cast<DLTensor*>(level),
          static_cast<DLTensor*>(arena), static_cast<DLTensor*>(y), static_cast<DLTensor*>(out));
  ticks->resize(count);
  for (size_t i = 0; i < count; ++i) (*ticks)[i] += reinterpret_cast<const int64_t*>(times.data())[i];
}

}  // namespace qdeploy
