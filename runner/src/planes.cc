#include "planes.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "error.h"

namespace qdeploy {
namespace {

constexpr int kSpaced = 1, kSorted = 2, kContexts = 8;

// Reads numbers of a few bits, the most significant bit of a byte first.
class Bits {
 public:
  explicit Bits(std::string_view bytes) : bytes_(bytes) {}

  int Bit(int64_t at) const { return static_cast<uint8_t>(bytes_[static_cast<size_t>(at / 8)]) >> (7 - at % 8) & 1; }

  int Number(int64_t at, int bits) const {
    int value = 0;
    for (int i = 0; i < bits; ++i) value = value << 1 | Bit(at + i);
    return value;
  }

 private:
  std::string_view bytes_;
};

// Context of a prefix of `held` bits, and whether its next bit is stored inverted.
std::pair<int, int> Fold(int prefix, int held) {
  const int half = 1 << (held - 1);
  return prefix >= half ? std::pair(std::min(prefix - half, kContexts - 1), 0)
                        : std::pair(std::min(half - 1 - prefix, kContexts - 1), 1);
}

void CheckUnused(const RawPart& part, int64_t weights) {
  const int per = part.layout == kSpaced ? 8 / part.bits : 0;
  const int64_t used = per ? 0 : weights * part.bits;
  bool set = false;
  const Bits bits(part.bytes);
  const int64_t total = static_cast<int64_t>(part.bytes.size()) * 8;
  if (!per) {
    for (int64_t at = used; at < total; ++at) set = set || bits.Bit(at);
  } else {
    for (int64_t byte = 0; byte < total / 8; ++byte) {
      const int64_t symbols = std::min<int64_t>(per, weights - byte * per);
      for (int64_t at = symbols * part.bits; at < 8; ++at) set = set || bits.Bit(byte * 8 + at);
    }
  }
  if (set) Fail("an unused bit of a plane is set: run `qdeploy pull` again");
}

// Symbols of the part's weights in their order, handed to `put`; `prefix` gives what is held of the same weights.
template <typename Prefix, typename Put>
void Unpack(const RawPart& part, int held, int64_t weights, Prefix prefix, Put put) {
  if (static_cast<int64_t>(part.bytes.size()) != PartBytes(part.bits, part.layout, weights)) {
    Fail("a part of a weight tensor has another length than its layout says: run `qdeploy pull` again");
  }
  CheckUnused(part, weights);
  const Bits bits(part.bytes);
  if (part.layout == kSorted) {
    std::array<int64_t, kContexts + 1> place{};
    for (int64_t i = 0; i < weights; ++i) ++place[static_cast<size_t>(Fold(prefix(i), held).first) + 1];
    for (size_t c = 1; c <= kContexts; ++c) place[c] += place[c - 1];
    for (int64_t i = 0; i < weights; ++i) {
      const auto [context, inverted] = Fold(prefix(i), held);
      put(i, bits.Bit(place[static_cast<size_t>(context)]++) ^ inverted);
    }
    return;
  }
  const int per = part.layout == kSpaced ? 8 / part.bits : 0;
  for (int64_t i = 0; i < weights; ++i) {
    put(i, bits.Number(per ? i / per * 8 + i % per * part.bits : i * part.bits, part.bits));
  }
}

}  // namespace

int64_t Channels::Packed(int held) const {
  int64_t channels = 0;
  for (int64_t c = 0; c < count; ++c) channels += cap(c) > held;
  return channels * weights;
}

int64_t PartBytes(int bits, int layout, int64_t weights) {
  if (layout == kSpaced) return (weights + 8 / bits - 1) / (8 / bits);
  return (weights * bits + 7) / 8;
}

void JoinPlanes(const std::vector<RawPart>& parts, const Channels& channels, int bits, int shift,
                const std::vector<int>& offsets, Buffer* codes) {
  uint8_t* prefix = codes->data();
  std::memset(prefix, 0, codes->size());
  int held = 0;
  for (const RawPart& part : parts) {
    std::vector<int64_t> members;
    for (int64_t c = 0; c < channels.count; ++c) {
      if (channels.cap(c) > held) members.push_back(c);
    }
    const auto at = [&](int64_t i) {
      return prefix + members[static_cast<size_t>(i / channels.weights)] * channels.weights + i % channels.weights;
    };
    const int64_t packed = static_cast<int64_t>(members.size()) * channels.weights;
    Unpack(part, held, packed, [&](int64_t i) { return int{*at(i)}; },
           [&](int64_t i, int symbol) { *at(i) = static_cast<uint8_t>(*at(i) << part.bits | symbol); });
    held += part.bits;
  }
  for (int64_t c = 0; c < channels.count; ++c) {
    const int own = std::min(bits, channels.cap(c));
    const int offset = offsets.size() == 1 ? offsets[0] : offsets[static_cast<size_t>(channels.cap(c))];
    const int half = own ? 1 << (own - 1) : 0, unit = 1 << (shift + bits - own);
    uint8_t* code = prefix + c * channels.weights;
    for (int64_t i = 0; i < channels.weights; ++i) code[i] = static_cast<uint8_t>((code[i] - half) * unit + offset);
  }
}

}  // namespace qdeploy
