#include "images.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>

#include "error.h"

namespace qdeploy {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicBytes = 6, kMaxHead = 1 << 16, kMaxAxes = 64;

std::string Shape(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t axis : shape) text += (text.empty() ? "" : ", ") + std::to_string(axis);
  return "[" + text + "]";
}

[[noreturn]] void Damaged(const std::string& path) {
  Fail(path + " is not a usable .npy file: save float32 or uint8 in C order with numpy.save");
}

// The dictionary of a head: a literal of Python with three keys in the order in which numpy writes them.
class HeadParser {
 public:
  HeadParser(std::string_view text, const std::string& path) : text_(text), path_(path) {}

  NpyHead Parse() {
    Word("{"), Word("'descr'"), Word(":"), Word("'");
    const std::string descr = Until("'");
    Word(","), Word("'fortran_order'"), Word(":");
    const std::string order = Until(",");
    Word("'shape'"), Word(":"), Word("(");
    NpyHead head{descr == "<f4" ? "float32" : descr == "|u1" ? "uint8" : descr == "|i1" ? "int8" : "", {}, 0};
    while (!Maybe(")")) {
      head.shape.push_back(Number());
      if (head.shape.size() > kMaxAxes) Damaged(path_);
      if (Maybe(",")) continue;
      Word(")");
      break;
    }
    Maybe(","), Word("}");
    Space();
    if (at_ != text_.size() || head.dtype.empty()) Damaged(path_);
    if (order != "False" && (order != "True" || head.shape.size() > 1)) Damaged(path_);
    return head;
  }

 private:
  void Space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  bool Maybe(std::string_view word) {
    Space();
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void Word(std::string_view word) {
    if (!Maybe(word)) Damaged(path_);
  }

  std::string Until(std::string_view end) {
    Space();
    const size_t stop = text_.find(end, at_);
    if (stop == std::string_view::npos) Damaged(path_);
    const std::string found(text_.substr(at_, stop - at_));
    at_ = stop + end.size();
    return found;
  }

  int64_t Number() {
    Space();
    int64_t value = 0;
    const size_t start = at_;
    for (; at_ < text_.size() && at_ - start < 16 && text_[at_] >= '0' && text_[at_] <= '9'; ++at_)
      value = 10 * value + (text_[at_] - '0');
    if (at_ == start || at_ - start > 15) Damaged(path_);
    return value;
  }

  std::string_view text_;
  const std::string& path_;
  size_t at_ = 0;
};

}  // namespace

int64_t NpyHead::count() const {
  int64_t count = 1;
  for (int64_t axis : shape) {
    if (axis && count > (int64_t{1} << 50) / axis) return int64_t{1} << 50;  // more than any file holds
    count *= axis;
  }
  return count;
}

bool ReadNpyHead(const InputFile& file, const std::string& path, NpyHead* head) {
  char magic[kMagicBytes];
  if (!file.Read(0, magic, kMagicBytes) || std::memcmp(magic, kMagic, kMagicBytes) != 0) return false;
  uint8_t fixed[6];
  if (!file.Read(kMagicBytes, fixed, 6) || fixed[0] < 1 || fixed[0] > 3) Damaged(path);
  const size_t start = fixed[0] == 1 ? 10 : 12;
  const size_t size = fixed[0] == 1 ? size_t{fixed[2]} | size_t{fixed[3]} << 8
                                    : size_t{fixed[2]} | size_t{fixed[3]} << 8 | size_t{fixed[4]} << 16 |
                                          size_t{fixed[5]} << 24;
  if (size > kMaxHead) Damaged(path);
  std::string text(size, '\0');
  if (!file.Read(static_cast<int64_t>(start), text.data(), size)) Damaged(path);
  *head = HeadParser(text, path).Parse();
  head->offset = static_cast<int64_t>(start + size);
  if (file.size() - head->offset != head->count() * ItemBytes(head->dtype)) {
    Fail(path + " does not hold the " + Shape(head->shape) + " that its head announces: save or fetch it again");
  }
  return true;
}

Images::Images(const std::vector<std::string>& paths, const std::vector<int64_t>& sample) {
  std::vector<int64_t> plain = sample;
  if (!plain.empty() && plain[0] == 1) plain.erase(plain.begin());
  elements_ = TensorInfo{"", "", sample}.count();
  for (const std::string& path : paths) {
    const InputFile file(path, "the images");
    Source source{path, {"float32", {}, 0}, count_, 1};
    if (ReadNpyHead(file, path, &source.head)) {
      const std::vector<int64_t>& shape = source.head.shape;
      const std::vector<int64_t> rest(shape.begin() + (shape.empty() ? 0 : 1), shape.end());
      if (source.head.dtype == "int8") Fail(path + " holds int8: give uint8 pixels (0..255) or float32");
      if (shape != sample && shape != plain) {
        if (shape.empty() || shape[0] < 1 || (rest != sample && rest != plain)) {
          const std::string inner = Shape(sample).substr(1);
          Fail(path + " has shape " + Shape(shape) + ": the model reads [n, " + inner);
        }
        source.count = shape[0];
      }
    } else {
      source.count = file.size() / (4 * elements_);
      if (source.count < 1 || file.size() % (4 * elements_)) {
        Fail(path + " has " + std::to_string(file.size()) + " bytes: raw images are float32 " + Shape(sample) + ", " +
             std::to_string(4 * elements_) + " bytes each");
      }
    }
    count_ += source.count;
    sources_.push_back(std::move(source));
  }
}

void Images::Convert(const Source& source, int64_t index, float* out) {
  if (open_ != source.path) {
    file_ = std::make_unique<InputFile>(source.path, "the images");
    open_ = source.path;
  }
  const bool pixels = source.head.dtype == "uint8";
  const size_t count = static_cast<size_t>(elements_), size = pixels ? count : 4 * count;
  bytes_.resize(pixels ? size : 0);
  uint8_t* to = pixels ? bytes_.data() : reinterpret_cast<uint8_t*>(out);
  if (!file_->Read(source.head.offset + index * static_cast<int64_t>(size), to, size)) {
    Fail("cannot read " + source.path + ": it became shorter");
  }
  if (pixels) {
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<float>(bytes_[i]) / 255.0f;
  } else if (!std::all_of(out, out + count, [](float x) { return std::isfinite(x); })) {
    Fail(source.path + " holds values that are not finite numbers");
  }
}

void Images::Read(int64_t first, int64_t n, float* out) {
  for (int64_t i = first; i < first + n; ++i, out += elements_) {
    const auto after = std::upper_bound(sources_.begin(), sources_.end(), i,
                                        [](int64_t at, const Source& source) { return at < source.first; });
    const Source& source = *(after - 1);
    Convert(source, i - source.first, out);
  }
}

std::string NpyHeadBytes(const std::string& dtype, const std::vector<int64_t>& shape) {
  std::string axes;
  for (size_t i = 0; i < shape.size(); ++i) axes += (i ? ", " : "") + std::to_string(shape[i]);
  if (shape.size() == 1) axes += ",";
  const char* descr = dtype == "float32" ? "<f4" : dtype == "uint8" ? "|u1" : "|i1";
  std::string text = std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (" + axes + "), }";
  text.append(63 - (10 + text.size()) % 64, ' ');
  text += '\n';
  std::string head(kMagic, kMagicBytes);
  head += {1, 0, static_cast<char>(text.size() & 255), static_cast<char>(text.size() >> 8)};
  return head + text;
}

Expected::Expected(const std::string& path, const std::string& dtype, const std::vector<int64_t>& shape)
    : file_(path, "the expected outputs"), item_(ItemBytes(dtype)) {
  NpyHead head{dtype, shape, 0};
  const int64_t bytes = head.count() * item_;
  if (ReadNpyHead(file_, path, &head)) {
    if (head.dtype != dtype || head.shape != shape) {
      Fail(path + " holds " + head.dtype + " " + Shape(head.shape) + ": the outputs are " + dtype + " " + Shape(shape));
    }
  } else if (file_.size() != bytes) {
    Fail(path + " has " + std::to_string(file_.size()) + " bytes: the outputs are " + dtype + " " + Shape(shape) +
         ", " + std::to_string(bytes) + " bytes");
  }
  at_ = head.offset;
}

void Expected::Compare(const uint8_t* rows, size_t size) {
  std::vector<uint8_t> wanted(size);
  if (!file_.Read(at_, wanted.data(), size)) Fail("cannot read the expected outputs: they became shorter");
  at_ += static_cast<int64_t>(size);
  const size_t item = static_cast<size_t>(item_);
  for (size_t i = 0; i < size; i += item) differing_ += std::memcmp(rows + i, wanted.data() + i, item) != 0;
  compared_ += static_cast<int64_t>(size / item);
}

}  // namespace qdeploy
