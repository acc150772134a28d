// qdeploy-run: a compiled network on a device, without Python (docs/runner.md).

#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "artifact.h"
#include "cpu.h"
#include "device.h"
#include "error.h"
#include "files.h"
#include "images.h"
#include "json.h"
#include "options.h"
#include "program.h"
#include "report.h"

namespace qdeploy {
namespace {

using Clock = std::chrono::steady_clock;

int64_t Nanoseconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(to - from).count();
}

double Milliseconds(Clock::time_point from, Clock::time_point to) {
  return static_cast<double>(Nanoseconds(from, to)) / 1e6;
}

// The levels of a run, in order, and how each comes to be packed.
class Levels {
 public:
  Levels(const Options& options, const Program& program, const DeviceFolder* device)
      : program_(program), device_(device) {
    if (!device) {
      if (!options.level.empty() || !options.climb.empty()) {
        Fail(options.folder + " is an artifact with one level of its own: --level and --climb need a pulled folder");
      }
      names_ = {""};
      return;
    }
    names_ = {options.level.empty() ? device->level() : options.level};
    names_.insert(names_.end(), options.climb.begin(), options.climb.end());
    for (const std::string& name : names_) device->manifest().At(name);
  }

  const std::vector<std::string>& names() const { return names_; }

  // The parameters of level number `k`; `over` are those of the level before, whose memory is taken. Until all that
  // the level needs has been read and verified, `over` stays as it is.
  Packed Pack(size_t k, Packed over = Packed()) const {
    if (!device_) return program_.StoredLevel();
    const std::vector<Buffer> params = device_->Assemble(names_[k], program_);
    malloc_trim(0);  // what the assembly needed beside them goes back to the system before packing needs memory
    return program_.Prepare(params, std::move(over));
  }

 private:
  const Program& program_;
  const DeviceFolder* device_;
  std::vector<std::string> names_;
};

// Where the outputs of all passes go: a file, a comparison, or nowhere.
class Sink {
 public:
  Sink(const Options& options, const Artifact& artifact, int64_t images, size_t passes) {
    const std::string dtype = options.codes ? artifact.codes : "float32";
    std::vector<int64_t> shape = artifact.output.shape;
    shape[0] = images;
    if (!options.climb.empty()) shape.insert(shape.begin(), static_cast<int64_t>(passes));
    if (!options.expect.empty()) expected_ = std::make_unique<Expected>(options.expect, dtype, shape);
    if (options.output.empty()) return;
    file_ = std::make_unique<OutputFile>(options.output);
    const bool npy = options.output.size() > 4 && options.output.compare(options.output.size() - 4, 4, ".npy") == 0;
    if (!npy) return;
    const std::string head = NpyHeadBytes(dtype, shape);
    file_->Write(head.data(), head.size());
  }

  void Rows(const uint8_t* rows, size_t size) {
    if (file_) file_->Write(rows, size);
    if (expected_) expected_->Compare(rows, size);
  }

  void Finish(Report* report) {
    if (file_) file_->Commit();
    if (expected_) report->compared = expected_->compared(), report->differing = expected_->differing();
  }

 private:
  std::unique_ptr<OutputFile> file_;
  std::unique_ptr<Expected> expected_;
};

// All images at one level: each batch `repeat` times, the last one filled up with its last image.
void RunPass(const Options& options, Program* program, Images* images, const Packed& packed, Sink* sink, Pass* pass) {
  const Artifact& artifact = program->artifact();
  const int64_t batch = artifact.input.shape[0];
  const size_t sample = static_cast<size_t>(artifact.input.count() / batch);
  const size_t row = static_cast<size_t>(artifact.output.count() / batch) * (options.codes ? 1 : 4);
  const Buffer input(static_cast<size_t>(artifact.input.count()) * 4), output(row * static_cast<size_t>(batch));
  float* x = reinterpret_cast<float*>(input.data());
  for (int64_t first = 0; first < images->count(); first += batch) {
    const int64_t n = std::min(batch, images->count() - first);
    images->Read(first, n, x);
    for (int64_t i = n; i < batch; ++i) {
      std::memcpy(x + static_cast<size_t>(i) * sample, x + static_cast<size_t>(n - 1) * sample, sample * 4);
    }
    for (int64_t i = 0; i < options.repeat; ++i) {
      const auto began = Clock::now();
      if (options.profile) {
        program->Profile(x, packed, output.data(), &pass->ticks);
      } else {
        program->Run(x, packed, options.codes, output.data());
      }
      pass->times.push_back(Nanoseconds(began, Clock::now()));
    }
    sink->Rows(output.data(), row * static_cast<size_t>(n));
  }
}

struct Prepared {
  Packed packed;
  double ms;
};

Prepared Prepare(const Levels& levels, size_t k, Packed over = Packed()) {
  const auto began = Clock::now();
  Packed packed = levels.Pack(k, std::move(over));
  malloc_trim(0);  // what the assembly needed goes back to the system
  return {std::move(packed), Milliseconds(began, Clock::now())};
}

// One pass a level. While one runs, the next is prepared in another thread (swap), or inference rests and the next is
// packed over it (in-place). Either way every batch is computed by exactly one level.
Report RunAll(const Options& options, Program* program, const Levels& levels, Images* images) {
  const size_t count = levels.names().size();
  Sink sink(options, program->artifact(), images->count(), count);
  Report report;
  report.gpu = program->gpu();
  report.images = images->count();
  Prepared now = Prepare(levels, 0);
  double pause_ms = 0;
  for (size_t k = 0; k < count; ++k) {
    std::future<Prepared> next;
    const bool last = k + 1 == count;
    if (!last && !options.in_place) {
      next = std::async(std::launch::async, [&levels, k] { return Prepare(levels, k + 1); });
    }
    report.passes.push_back({levels.names()[k], now.ms, pause_ms, {}, {}});
    RunPass(options, program, images, now.packed, &sink, &report.passes.back());
    if (last) {
      report.memory = MeasureMemory();
      break;
    }
    const auto stopped = Clock::now();
    now = next.valid() ? next.get() : Prepare(levels, k + 1, std::move(now.packed));
    pause_ms = Milliseconds(stopped, Clock::now());
  }
  sink.Finish(&report);
  return report;
}

// TVM reads these when it starts its workers; an artifact for several threads brings their number.
void ChooseThreads(const Options& options, const Artifact& artifact) {
  if (options.threads) {
    setenv("TVM_NUM_THREADS", std::to_string(options.threads).c_str(), 1);
  } else if (artifact.threads > 1 && !std::getenv("TVM_NUM_THREADS") && !std::getenv("OMP_NUM_THREADS")) {
    setenv("TVM_NUM_THREADS", std::to_string(artifact.threads).c_str(), 1);
  }
}

std::string CpuReport(bool json) {
  const std::vector<std::string> known = KnownFeatures(), present = PresentFeatures();
  if (json) {
    const auto list = [](const std::vector<std::string>& names) {
      std::vector<Json> items;
      for (const std::string& name : names) items.push_back(Json::Text(name));
      return Json::List(std::move(items));
    };
    return Json::Object({{"arch", Json::Text(Architecture())}, {"features", list(present)}, {"known", list(known)}})
        .Canonical();
  }
  std::string text = Architecture() + ":";
  for (const std::string& name : present) text += " " + name;
  return text + "\n";
}

int Main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  if (options.help || options.cpu) {
    std::fputs((options.help ? std::string(kUsage) : CpuReport(options.json)).c_str(), stdout);
    return kDone;
  }
  std::unique_ptr<DeviceFolder> device;
  std::string folder = options.folder;
  if (IsFile(folder + "/current.json")) {
    device = std::make_unique<DeviceFolder>(folder);
    folder = options.artifact.empty() ? device->UnpackArtifact() : options.artifact;
  } else if (!options.artifact.empty()) {
    Fail(folder + " is no device folder, so --artifact means nothing: name a pulled folder first");
  } else if (!IsFile(folder + "/artifact.json")) {
    Fail(folder + " is neither an artifact folder nor a pulled device folder: name one of them");
  }
  Artifact artifact = OpenArtifact(folder);
  if (options.codes && artifact.codes.empty()) {
    Fail("the network's output is not quantized, so it has no codes: leave out --codes");
  }
  ChooseThreads(options, artifact);
  Program program(std::move(artifact));
  const Levels levels(options, program, device.get());
  Report report;
  if (options.inputs.empty()) {
    const Prepared level = Prepare(levels, 0);
    report.gpu = program.gpu();
    report.passes.push_back({levels.names()[0], level.ms, 0, {}, {}});
    report.memory = MeasureMemory();
  } else {
    const std::vector<int64_t>& shape = program.artifact().input.shape;
    Images images(options.inputs, {shape.begin() + 1, shape.end()});
    report = RunAll(options, &program, levels, &images);
  }
  const std::string text = options.json ? JsonReport(program.artifact(), report) : TextReport(program.artifact(), report);
  if (std::fputs(text.c_str(), stdout) < 0 || std::fflush(stdout) != 0) Fail("cannot write to standard output");
  return report.differing ? kDiffers : kDone;
}

// One line on standard error; names from files may hold anything, so control characters become '?'.
int Complain(std::string text, int code) {
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, '?');
  std::fprintf(stderr, "error: %s\n", text.c_str());
  return code;
}

}  // namespace
}  // namespace qdeploy

int main(int argc, char** argv) {
  // one heap for all threads, and large blocks go back to the system when they are freed
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, 128 << 10);
  try {
    return qdeploy::Main(argc, argv);
  } catch (const qdeploy::Error& e) {
    return qdeploy::Complain(e.what(), e.code());
  } catch (const std::bad_alloc&) {
    return qdeploy::Complain("there is not enough memory: end other programs", qdeploy::kMachine);
  } catch (const std::exception& e) {
    return qdeploy::Complain(e.what(), qdeploy::kMachine);
  }
}
