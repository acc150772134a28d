#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"

namespace qdeploy {
namespace {

constexpr size_t kChunk = 64 << 10;

std::string Folder(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

}  // namespace

Buffer::Buffer(size_t size) : size_(size) {
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64 + 64)));
  if (!data_) FailMachine("there is no memory for " + std::to_string(size) + " bytes: end other programs");
}

InputFile::InputFile(const std::string& path, std::string_view what) : path_(path) {
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not block the opening
  struct stat info;
  if (fd_ < 0 || fstat(fd_, &info) != 0) {
    const int reason = errno;
    if (fd_ >= 0) close(fd_);
    Fail("cannot read " + std::string(what) + " " + path + ": " + std::strerror(reason));
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd_);
    Fail(path + " is no file: name " + std::string(what));
  }
  size_ = info.st_size;
}

InputFile::~InputFile() { close(fd_); }

bool InputFile::Read(int64_t offset, void* data, size_t size) const {
  uint8_t* to = static_cast<uint8_t*>(data);
  while (size) {
    const ssize_t got = pread(fd_, to, size, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) Fail("cannot read " + path_ + ": " + std::strerror(errno));
    if (got == 0) return false;
    to += got, offset += got, size -= static_cast<size_t>(got);
  }
  return true;
}

std::string ReadFile(const std::string& path, std::string_view what, int64_t limit) {
  const InputFile file(path, what);
  if (file.size() > limit) Fail(path + " has more than " + std::to_string(limit) + " bytes: fetch it again");
  std::string data(static_cast<size_t>(file.size()), '\0');
  if (!file.Read(0, data.data(), data.size())) Fail("cannot read " + path + ": it became shorter");
  return data;
}

void ReadChunks(const std::string& path, std::string_view what, const std::function<void(std::string_view)>& chunk) {
  const InputFile file(path, what);
  std::string data(kChunk, '\0');
  for (int64_t at = 0; at < file.size(); at += static_cast<int64_t>(kChunk)) {
    const size_t size = std::min<size_t>(kChunk, static_cast<size_t>(file.size() - at));
    if (!file.Read(at, data.data(), size)) Fail("cannot read " + path + ": it became shorter");
    chunk(std::string_view(data).substr(0, size));
  }
}

bool IsFile(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

bool IsFolder(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

OutputFile::OutputFile(const std::string& path) : path_(path), temporary_(path + ".tmp-XXXXXX") {
  struct stat info;  // what is no file must not be replaced by one: a device, a pipe
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) Fail(path + " is no file: name one for the output");
  fd_ = mkostemp(temporary_.data(), O_CLOEXEC);
  if (fd_ < 0) {
    temporary_.clear();
    Wrong();
  }
  if (fchmod(fd_, 0644) != 0) Wrong();
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

void OutputFile::Wrong() const { Fail("cannot write " + path_ + ": " + std::strerror(errno)); }

void OutputFile::Write(const void* data, size_t size) {
  const uint8_t* from = static_cast<const uint8_t*>(data);
  while (size) {
    const ssize_t done = write(fd_, from, size);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) Wrong();
    from += done, size -= static_cast<size_t>(done);
  }
}

void OutputFile::Commit() {
  if (fsync(fd_) != 0 && errno != EINVAL) Wrong();
  if (rename(temporary_.c_str(), path_.c_str()) != 0) Wrong();
  temporary_.clear();
  const int folder = open(Folder(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder >= 0) {
    fsync(folder);
    close(folder);
  }
}

}  // namespace qdeploy
