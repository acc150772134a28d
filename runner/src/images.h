// Images from .npy and raw files, batch by batch; outputs to .npy and raw files, row by row.
#ifndef QDEPLOY_RUNNER_IMAGES_H_
#define QDEPLOY_RUNNER_IMAGES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "artifact.h"
#include "files.h"

namespace qdeploy {

// What a .npy file's head says (NEP 1, versions 1 to 3).
struct NpyHead {
  std::string dtype;  // numpy's name: "uint8", "int8" or "float32"
  std::vector<int64_t> shape;
  int64_t offset;  // of the data in the file

  int64_t count() const;
};

// False where the file is no .npy; raises Error for one that is damaged, in Fortran order or of another dtype.
bool ReadNpyHead(const InputFile& file, const std::string& path, NpyHead* head);

// All images of several files, one after another. A .npy file holds uint8 pixels (they become pixel / 255) or float32
// [n, ...], [...] where [...] is the model's sample, perhaps without its axis of one channel; any other file holds
// float32 in little-endian order. Every file is checked in the constructor, values when they are read.
class Images {
 public:
  // `sample`: shape of the model's input without the batch. Raises Error.
  Images(const std::vector<std::string>& paths, const std::vector<int64_t>& sample);

  int64_t count() const { return count_; }
  // Images number first .. first + n - 1.
  void Read(int64_t first, int64_t n, float* out);

 private:
  struct Source {
    std::string path;
    NpyHead head;
    int64_t first, count;
  };

  void Convert(const Source& source, int64_t index, float* out);

  std::vector<Source> sources_;
  int64_t elements_, count_ = 0;
  std::unique_ptr<InputFile> file_;
  std::string open_;
  std::vector<uint8_t> bytes_;
};

// The bytes that numpy.save puts before the data.
std::string NpyHeadBytes(const std::string& dtype, const std::vector<int64_t>& shape);

// A file of expected outputs, compared row by row, bit for bit.
class Expected {
 public:
  // Raises Error when the file does not hold exactly `shape` of `dtype`.
  Expected(const std::string& path, const std::string& dtype, const std::vector<int64_t>& shape);

  void Compare(const uint8_t* rows, size_t size);
  int64_t differing() const { return differing_; }  // elements
  int64_t compared() const { return compared_; }

 private:
  InputFile file_;
  int64_t at_ = 0, item_, differing_ = 0, compared_ = 0;
};

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_IMAGES_H_
