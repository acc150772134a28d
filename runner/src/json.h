// JSON as qdeploy writes it: a strict parser and the one canonical byte form (keys sorted, no spaces, ASCII).
#ifndef QDEPLOY_RUNNER_JSON_H_
#define QDEPLOY_RUNNER_JSON_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qdeploy {

// A text that is no JSON, or a value of another type than the caller needs; callers say in which file.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class Json {
 public:
  enum class Type : uint8_t { kNull, kBool, kNumber, kText, kList, kObject };

  Json() = default;  // null
  static Json Bool(bool value);
  static Json Integer(int64_t value);
  static Json Real(double value);  // six digits
  static Json Text(std::string value);
  static Json List(std::vector<Json> items);
  static Json Object(std::vector<std::pair<std::string, Json>> entries);

  // Strict RFC 8259: UTF-8, no duplicate keys, no lone surrogates, at most 64 levels, nothing after the value.
  static Json Parse(std::string_view data);
  // As Parse, and `data` is exactly what Canonical gives.
  static Json ParseCanonical(std::string_view data);

  Type type() const { return type_; }
  bool is_null() const { return type_ == Type::kNull; }
  // These raise JsonError, which names `what`, for a value of another type.
  bool AsBool(std::string_view what) const;
  int64_t AsInteger(std::string_view what) const;  // |value| < 2^53
  int64_t AsSize(std::string_view what) const;     // 0 or more
  const std::string& AsText(std::string_view what) const;
  const std::vector<Json>& AsList(std::string_view what) const;
  // Entry of an object; raises where there is none.
  const Json& At(std::string_view key) const;
  const Json* Find(std::string_view key) const;
  // Raises unless this is an object with all of `required` and nothing but them and `optional`.
  void CheckKeys(std::string_view what, const std::vector<std::string_view>& required,
                 const std::vector<std::string_view>& optional = {}) const;
  std::vector<std::string> Keys() const;

  // The canonical form and one newline.
  std::string Canonical() const;

 private:
  friend class JsonParser;
  void Write(std::string* out) const;

  Type type_ = Type::kNull;
  bool bool_ = false;
  std::string text_;               // of a text (UTF-8); of a number, as it was written
  std::vector<Json> items_;        // of a list; of an object, its values
  std::vector<std::string> keys_;  // of an object
};

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_JSON_H_
