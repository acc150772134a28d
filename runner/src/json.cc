#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>

namespace qdeploy {
namespace {

constexpr int kDepth = 64;
constexpr int64_t kLimit = int64_t{1} << 53;

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

void AppendUtf8(uint32_t point, std::string* out) {
  auto push = [out](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (point < 0x80) {
    push(point);
  } else if (point < 0x800) {
    push(0xc0 | point >> 6), push(0x80 | (point & 63));
  } else if (point < 0x10000) {
    push(0xe0 | point >> 12), push(0x80 | (point >> 6 & 63)), push(0x80 | (point & 63));
  } else {
    push(0xf0 | point >> 18), push(0x80 | (point >> 12 & 63)), push(0x80 | (point >> 6 & 63));
    push(0x80 | (point & 63));
  }
}

// Decode one character of valid or invalid UTF-8; raises for the latter. Advances `at`.
uint32_t NextPoint(std::string_view text, size_t* at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(*at);
  if (first < 0x80) return ++*at, first;
  const int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
  if (first < 0xc2 || first > 0xf4 || *at + more >= text.size()) throw JsonError("it is not UTF-8");
  uint32_t point = first & (0x3f >> more);
  for (int i = 1; i <= more; ++i) {
    if ((byte(*at + i) & 0xc0) != 0x80) throw JsonError("it is not UTF-8");
    point = point << 6 | (byte(*at + i) & 63);
  }
  const uint32_t least = more == 1 ? 0x80 : more == 2 ? 0x800 : 0x10000;
  if (point < least || point > 0x10ffff || (point >= 0xd800 && point < 0xe000)) throw JsonError("it is not UTF-8");
  *at += more + 1;
  return point;
}

void WriteText(const std::string& text, std::string* out) {
  const auto escape = [out](uint32_t unit) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "\\u%04x", unit);
    *out += hex;
  };
  *out += '"';
  for (size_t at = 0; at < text.size();) {
    const uint32_t c = NextPoint(text, &at);
    static constexpr char kShort[] = "\"\\\b\f\n\r\t", kLetter[] = "\"\\bfnrt";
    const char* found = c && c < 0x80 ? std::char_traits<char>::find(kShort, 7, static_cast<char>(c)) : nullptr;
    if (found) {
      *out += '\\', *out += kLetter[found - kShort];
    } else if (c >= 0x20 && c < 0x7f) {
      *out += static_cast<char>(c);
    } else if (c < 0x10000) {
      escape(c);
    } else {
      escape(0xd800 + ((c - 0x10000) >> 10)), escape(0xdc00 + ((c - 0x10000) & 0x3ff));
    }
  }
  *out += '"';
}

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(std::string_view text) : text_(text) {}

  Json Whole() {
    Json value = Value(0);
    Space();
    if (at_ != text_.size()) Wrong("something follows the value");
    return value;
  }

 private:
  [[noreturn]] void Wrong(const std::string& what) const {
    throw JsonError(what + " at byte " + std::to_string(at_));
  }

  void Space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
  }

  char Peek() {
    if (at_ >= text_.size()) Wrong("it ends early");
    return text_[at_];
  }

  bool Take(char c) {
    if (Peek() != c) return false;
    ++at_;
    return true;
  }

  bool Word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json Value(int depth) {
    if (depth > kDepth) Wrong("too many levels");
    Space();
    const char c = Peek();
    if (c == '{') return ObjectValue(depth);
    if (c == '[') return ListValue(depth);
    if (c == '"') return Json::Text(TextValue());
    if (c == '-' || IsDigit(c)) return NumberValue();
    if (Word("true")) return Json::Bool(true);
    if (Word("false")) return Json::Bool(false);
    if (Word("null")) return Json();
    Wrong("no value");
  }

  Json ObjectValue(int depth) {
    std::vector<std::pair<std::string, Json>> entries;
    ++at_, Space();
    if (!Take('}')) {
      do {
        Space();
        if (Peek() != '"') Wrong("no key");
        std::string key = TextValue();
        Space();
        if (!Take(':')) Wrong("no colon");
        Json value = Value(depth + 1);
        entries.emplace_back(std::move(key), std::move(value));
        Space();
      } while (Take(','));
      if (!Take('}')) Wrong("no end of an object");
    }
    Json object = Json::Object(std::move(entries));
    std::vector<std::string_view> keys(object.keys_.begin(), object.keys_.end());
    std::sort(keys.begin(), keys.end());
    if (std::adjacent_find(keys.begin(), keys.end()) != keys.end()) Wrong("a key appears twice before the end");
    return object;
  }

  Json ListValue(int depth) {
    std::vector<Json> items;
    ++at_, Space();
    if (!Take(']')) {
      do {
        items.push_back(Value(depth + 1));
        Space();
      } while (Take(','));
      if (!Take(']')) Wrong("no end of a list");
    }
    return Json::List(std::move(items));
  }

  void Digits() {
    if (!IsDigit(Peek())) Wrong("no digit");
    while (at_ < text_.size() && IsDigit(text_[at_])) ++at_;
  }

  Json NumberValue() {
    const size_t start = at_;
    Take('-');
    if (!Take('0')) Digits();
    if (at_ < text_.size() && text_[at_] == '.') ++at_, Digits();
    if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      ++at_;
      if (Peek() == '+' || Peek() == '-') ++at_;
      Digits();
    }
    Json number;
    number.type_ = Json::Type::kNumber;
    number.text_ = std::string(text_.substr(start, at_ - start));
    if (number.text_ == "-0") number.text_ = "0";
    return number;
  }

  uint32_t Hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = Peek();
      const int digit = IsDigit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) Wrong("no hex digit");
      value = value << 4 | static_cast<uint32_t>(digit);
    }
    return value;
  }

  std::string TextValue() {
    std::string out;
    ++at_;
    while (!Take('"')) {
      const char c = Peek();
      if (static_cast<uint8_t>(c) < 0x20) Wrong("a control character in a text");
      if (c != '\\') {
        const size_t start = at_;
        NextPoint(text_, &at_);
        out += text_.substr(start, at_ - start);
        continue;
      }
      ++at_;
      const char kind = Peek();
      ++at_;
      static constexpr char kLetter[] = "\"\\/bfnrt", kMeaning[] = "\"\\/\b\f\n\r\t";
      if (const char* found = kind ? std::char_traits<char>::find(kLetter, 8, kind) : nullptr) {
        out += kMeaning[found - kLetter];
      } else if (kind == 'u') {
        uint32_t point = Hex4();
        if (point >= 0xdc00 && point < 0xe000) Wrong("a lone surrogate");
        if (point >= 0xd800 && point < 0xdc00) {
          if (!Word("\\u")) Wrong("a lone surrogate");
          const uint32_t low = Hex4();
          if (low < 0xdc00 || low >= 0xe000) Wrong("a lone surrogate");
          point = 0x10000 + ((point - 0xd800) << 10) + (low - 0xdc00);
        }
        AppendUtf8(point, &out);
      } else {
        Wrong("an unknown escape");
      }
    }
    return out;
  }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::Bool(bool value) {
  Json json;
  json.type_ = Type::kBool;
  json.bool_ = value;
  return json;
}

Json Json::Integer(int64_t value) {
  Json json;
  json.type_ = Type::kNumber;
  json.text_ = std::to_string(value);
  return json;
}

Json Json::Real(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  Json json;
  json.type_ = Type::kNumber;
  json.text_ = text;
  return json;
}

Json Json::Text(std::string value) {
  Json json;
  json.type_ = Type::kText;
  json.text_ = std::move(value);
  return json;
}

Json Json::List(std::vector<Json> items) {
  Json json;
  json.type_ = Type::kList;
  json.items_ = std::move(items);
  json.items_.shrink_to_fit();
  return json;
}

Json Json::Object(std::vector<std::pair<std::string, Json>> entries) {
  Json json;
  json.type_ = Type::kObject;
  json.keys_.reserve(entries.size());
  json.items_.reserve(entries.size());
  for (auto& [key, value] : entries) {
    json.keys_.push_back(std::move(key));
    json.items_.push_back(std::move(value));
  }
  return json;
}

Json Json::Parse(std::string_view data) { return JsonParser(data).Whole(); }

Json Json::ParseCanonical(std::string_view data) {
  Json value = Parse(data);
  if (value.Canonical() != data) throw JsonError("it is not canonical JSON");
  return value;
}

bool Json::AsBool(std::string_view what) const {
  if (type_ != Type::kBool) throw JsonError(std::string(what) + " is neither true nor false");
  return bool_;
}

int64_t Json::AsInteger(std::string_view what) const {
  const bool whole = type_ == Type::kNumber && text_.find_first_of(".eE") == std::string::npos && text_.size() < 18;
  const int64_t value = whole ? std::strtoll(text_.c_str(), nullptr, 10) : kLimit;
  if (value <= -kLimit || value >= kLimit) throw JsonError(std::string(what) + " is not an integer");
  return value;
}

int64_t Json::AsSize(std::string_view what) const {
  const int64_t value = AsInteger(what);
  if (value < 0) throw JsonError(std::string(what) + " is below 0");
  return value;
}

const std::string& Json::AsText(std::string_view what) const {
  if (type_ != Type::kText) throw JsonError(std::string(what) + " is not a text");
  return text_;
}

const std::vector<Json>& Json::AsList(std::string_view what) const {
  if (type_ != Type::kList) throw JsonError(std::string(what) + " is not a list");
  return items_;
}

const Json* Json::Find(std::string_view key) const {
  for (size_t i = 0; i < keys_.size(); ++i) {
    if (keys_[i] == key) return &items_[i];
  }
  return nullptr;
}

const Json& Json::At(std::string_view key) const {
  if (const Json* found = Find(key)) return *found;
  throw JsonError("the key " + std::string(key) + " is missing");
}

void Json::CheckKeys(std::string_view what, const std::vector<std::string_view>& required,
                     const std::vector<std::string_view>& optional) const {
  if (type_ != Type::kObject) throw JsonError(std::string(what) + " is not an object");
  for (std::string_view key : required) {
    if (!Find(key)) throw JsonError(std::string(what) + " lacks the key " + std::string(key));
  }
  for (const std::string& key : keys_) {
    const auto among = [&](const auto& keys) { return std::find(keys.begin(), keys.end(), key) != keys.end(); };
    if (!among(required) && !among(optional)) throw JsonError(std::string(what) + " has an unknown key");
  }
}

std::vector<std::string> Json::Keys() const { return keys_; }

void Json::Write(std::string* out) const {
  switch (type_) {
    case Type::kNull:
      *out += "null";
      return;
    case Type::kBool:
      *out += bool_ ? "true" : "false";
      return;
    case Type::kNumber:
      *out += text_;
      return;
    case Type::kText:
      WriteText(text_, out);
      return;
    case Type::kList:
      *out += '[';
      for (size_t i = 0; i < items_.size(); ++i) {
        if (i) *out += ',';
        items_[i].Write(out);
      }
      *out += ']';
      return;
    case Type::kObject: {
      std::vector<size_t> order(keys_.size());  // UTF-8 sorts as code points do
      std::iota(order.begin(), order.end(), size_t{0});
      std::sort(order.begin(), order.end(), [this](size_t a, size_t b) { return keys_[a] < keys_[b]; });
      *out += '{';
      for (size_t i = 0; i < order.size(); ++i) {
        if (i) *out += ',';
        WriteText(keys_[order[i]], out);
        *out += ':';
        items_[order[i]].Write(out);
      }
      *out += '}';
      return;
    }
  }
}

std::string Json::Canonical() const {
  std::string out;
  Write(&out);
  out += '\n';
  return out;
}

}  // namespace qdeploy
