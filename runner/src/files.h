// Files: whole small ones, ranges of large ones, output that appears complete or not at all.
#ifndef QDEPLOY_RUNNER_FILES_H_
#define QDEPLOY_RUNNER_FILES_H_

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace qdeploy {

// Bytes at an address that vectors like: a multiple of 64.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size);  // raises Error when memory is short; not initialized

  uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }
  std::string_view view() const { return {reinterpret_cast<const char*>(data_.get()), size_}; }

 private:
  struct Free {
    void operator()(uint8_t* data) const { std::free(data); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

// A regular file that is open for reading.
class InputFile {
 public:
  // Raises Error, which calls the file `what`, for a missing, unreadable or irregular one.
  InputFile(const std::string& path, std::string_view what);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  int64_t size() const { return size_; }
  // Exactly `size` bytes from `offset` on; false where the file has fewer.
  bool Read(int64_t offset, void* data, size_t size) const;

 private:
  std::string path_;
  int fd_;
  int64_t size_;
};

// The whole file; raises Error for more than `limit` bytes.
std::string ReadFile(const std::string& path, std::string_view what, int64_t limit);

// `chunk` gets consecutive parts of the file of at most 64 KiB.
void ReadChunks(const std::string& path, std::string_view what, const std::function<void(std::string_view)>& chunk);

bool IsFile(const std::string& path);
bool IsFolder(const std::string& path);

// A file that is written beside its name and takes it in Commit; without Commit nothing is left.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void Write(const void* data, size_t size);
  void Commit();

 private:
  [[noreturn]] void Wrong() const;

  std::string path_, temporary_;
  int fd_ = -1;
};

}  // namespace qdeploy

#endif  // QDEPLOY_RUNNER_FILES_H_
