// Bit planes -> container codes in plain C++ (qdeploy/bundle/FORMAT.md, Weight tensors), also with caps.
#ifndef QDEPLOY_RUNNER_PLANES_H_
#define QDEPLOY_RUNNER_PLANES_H_

#include <cstdint>
#include <vector>

#include "program.h"

namespace qdeploy {

// How a tensor's channels lie in memory, and how many planes each holds at most (all of them where `caps` is empty).
struct Channels {
  int64_t count, weights;  // `weights` of one channel
  std::vector<int> caps;

  int cap(int64_t channel) const { return caps.empty() ? 8 : caps[static_cast<size_t>(channel)]; }
  // Weights of the channels that a part beginning at plane `held` packs.
  int64_t Packed(int held) const;
};

// Raw bytes of a part of `bits` planes for so many weights.
int64_t PartBytes(int bits, int layout, int64_t weights);

// Container codes of a level [bits, shift, offsets] whose first parts are `parts`; `offsets`: one, or one for each
// cap 0 .. N. Raises Error for a part of another length or an unused bit that is set.
void JoinPlanes(const std::vector<RawPart>& parts, const Channels& channels, int bits, int shift,
                const std::vector<int>& offsets, Buffer* codes);

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_PLANES_H_
