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

  static View Bytes(const Buffer& b) { return View(b.data(), kDLUInt, 8, {static_cast<int64_t>(b.size())}); }

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

constexpr char kAgain[] = "fetch or compile the artifact again";
constexpr const char* kOnGpu = nullptr;  // a hint: what fails is this machine's matter, and its line says all
constexpr size_t kGpuName = 256;

template <typename... Args>
void Guarded(const ffi::Function& function, const char* hint, Args&&... args) {
  try {
    function(std::forward<Args>(args)...);
  } catch (const ffi::Error& e) {
    if (hint == kOnGpu) FailMachine(Reason(e));
    Fail(Reason(e) + ": " + hint);
  }
}

}  // namespace

struct Library {
  explicit Library(const std::string& path) : module(ffi::Module::LoadFromFile(path)) {}

  ffi::Module module;
  ffi::Function prepare, main, profile, join, codes;
  ffi::Function device, upload, release;  // for a GPU
};

Packed& Packed::operator=(Packed&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(gpu_, other.gpu_);
  return *this;
}

Packed::~Packed() {
  try {
    Release();
  } catch (const std::exception&) {  // the GPU is lost, and its memory with it: the next call says so
  }
}

void Packed::Upload(std::shared_ptr<const Library> library) {
  View packed = View::Bytes(bytes_);
  Guarded(library->upload, kOnGpu, static_cast<DLTensor*>(packed));
  gpu_ = std::move(library);
}

void Packed::Release() {
  const std::shared_ptr<const Library> library = std::move(gpu_);
  if (!library) return;
  View packed = View::Bytes(bytes_);
  Guarded(library->release, kOnGpu, static_cast<DLTensor*>(packed));
}

Program::Program(Artifact artifact)
    : artifact_(std::move(artifact)),
      arena_(artifact_.gpu.empty() ? static_cast<size_t>(artifact_.arena_bytes) : 1) {  // a GPU has its own
  const std::string path = artifact_.folder + "/" + artifact_.library;
  try {  // a name without a slash would be looked up elsewhere
    library_ = std::make_shared<Library>(path.find('/') == std::string::npos ? "./" + path : path);
  } catch (const ffi::Error& e) {
    FailMachine(path + " cannot be loaded (" + Reason(e) + "): compile the model for this machine");
  }
  library_->prepare = Exported(library_->module, "prepare");
  library_->main = Exported(library_->module, "main");
  library_->profile = Exported(library_->module, "profile");
  library_->join = Exported(library_->module, "join");
  if (!artifact_.codes.empty()) library_->codes = Exported(library_->module, "codes");
  if (artifact_.gpu.empty()) return;
  library_->device = Exported(library_->module, "device");
  library_->upload = Exported(library_->module, "upload");
  library_->release = Exported(library_->module, "release");
  const Buffer name(kGpuName);
  std::memset(name.data(), 0, name.size());
  View out = View::Bytes(name);
  Guarded(library_->device, kOnGpu, static_cast<DLTensor*>(out));
  gpu_ = std::string(name.view().substr(0, name.view().find('\0')));
}

const char* Program::Hint() const { return artifact_.gpu.empty() ? kAgain : kOnGpu; }

Packed Program::StoredLevel() const {
  if (!artifact_.constant) {
    Fail(artifact_.folder + " holds no level: run a pulled folder, or compile with --constant");
  }
  const std::string path = artifact_.folder + "/" + artifact_.packed;
  const InputFile file(path, "the packed parameters");
  if (file.size() != artifact_.packed_bytes) {
    Fail(path + " has another length than artifact.json says: fetch or compile the artifact again");
  }
  Packed packed(file.size());
  if (!file.Read(0, packed.bytes_.data(), packed.bytes_.size())) Fail("cannot read " + path + ": it became shorter");
  if (!artifact_.gpu.empty()) packed.Upload(library_);
  return packed;
}

Packed Program::Prepare(const std::vector<Buffer>& params, Packed over) const {
  Packed packed = std::move(over);
  packed.Release();  // before its handle is overwritten
  if (packed.bytes_.size() == 0) packed = Packed(artifact_.packed_bytes);
  const Buffer addresses(params.size() * sizeof(int64_t));  // a Buffer: compiled code relies on its alignment
  int64_t* address = reinterpret_cast<int64_t*>(addresses.data());
  for (const Buffer& param : params) *address++ = reinterpret_cast<int64_t>(param.data());
  std::memset(packed.bytes_.data(), 0, packed.bytes_.size());
  View pointers(addresses.data(), kDLInt, 64, {static_cast<int64_t>(params.size())});
  View out = View::Bytes(packed.bytes_);
  Guarded(library_->prepare, "the level's parameters do not fit the artifact; publish the release again",
          static_cast<DLTensor*>(pointers), static_cast<DLTensor*>(out));
  if (!artifact_.gpu.empty()) packed.Upload(library_);
  return packed;
}

void Program::Join(const std::vector<RawPart>& parts, int shift, int bias, Buffer* codes) const {
  std::memset(codes->data(), 0, codes->size());
  View out = View::Bytes(*codes);
  int left = 0, held = 0;
  for (const RawPart& part : parts) left += part.bits;
  for (const RawPart& part : parts) {
    left -= part.bits;
    const Buffer bytes(part.bytes.size());  // parts begin anywhere in their piece
    std::memcpy(bytes.data(), part.bytes.data(), part.bytes.size());
    View raw = View::Bytes(bytes);
    Guarded(library_->join, "run `qdeploy pull` again", static_cast<DLTensor*>(raw), static_cast<DLTensor*>(out),
            part.bits, part.layout, held, shift + left, 0, left ? 0 : bias);
    held += part.bits;
  }
}

void Program::Run(const float* input, const Packed& packed, bool codes, void* output) {
  View x(input, kDLFloat, 32, artifact_.input.shape);
  View level = View::Bytes(packed.bytes_), arena = View::Bytes(arena_);
  View y(output, !codes ? kDLFloat : artifact_.codes == "int8" ? kDLInt : kDLUInt, codes ? 8 : 32,
         artifact_.output.shape);
  Guarded(codes ? library_->codes : library_->main, Hint(), static_cast<DLTensor*>(x), static_cast<DLTensor*>(level),
          static_cast<DLTensor*>(arena), static_cast<DLTensor*>(y));
}

void Program::Profile(const float* input, const Packed& packed, void* output, std::vector<int64_t>* ticks) {
  const size_t count = artifact_.calls.size();
  const Buffer times(count * sizeof(int64_t));
  View x(input, kDLFloat, 32, artifact_.input.shape), y(output, kDLFloat, 32, artifact_.output.shape);
  View level = View::Bytes(packed.bytes_), arena = View::Bytes(arena_);
  View out(times.data(), kDLInt, 64, {static_cast<int64_t>(count)});
  Guarded(library_->profile, Hint(), static_cast<DLTensor*>(x), static_cast<DLTensor*>(level),
          static_cast<DLTensor*>(arena), static_cast<DLTensor*>(y), static_cast<DLTensor*>(out));
  ticks->resize(count);
  for (size_t i = 0; i < count; ++i) (*ticks)[i] += reinterpret_cast<const int64_t*>(times.data())[i];
}

}  // namespace qdeploy
