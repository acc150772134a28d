#include "report.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "json.h"

namespace qdeploy {
namespace {

struct Times {
  double least, median, most;  // milliseconds
};

Times Summary(std::vector<int64_t> times) {
  if (times.empty()) return {0, 0, 0};
  std::sort(times.begin(), times.end());
  const size_t half = times.size() / 2;
  const double middle = times.size() % 2 ? static_cast<double>(times[half])
                                         : static_cast<double>(times[half - 1] + times[half]) / 2;
  return {static_cast<double>(times.front()) / 1e6, middle / 1e6, static_cast<double>(times.back()) / 1e6};
}

// Milliseconds of a kernel in one call, on average.
double PerCall(const Pass& pass, size_t kernel) {
  return static_cast<double>(pass.ticks[kernel]) / 1e6 / static_cast<double>(pass.times.size());
}

std::string Format(const char* format, ...) __attribute__((format(printf, 1, 2)));

std::string Format(const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return text;
}

}  // namespace

Memory MeasureMemory() {
  Memory memory;
  if (std::FILE* file = std::fopen("/proc/self/status", "re")) {
    char line[256];
    while (std::fgets(line, sizeof line, file)) {
      if (std::strncmp(line, "VmRSS:", 6) == 0) memory.resident = std::atoll(line + 6) * 1024;
      if (std::strncmp(line, "VmHWM:", 6) == 0) memory.peak = std::atoll(line + 6) * 1024;
    }
    std::fclose(file);
  }
  return memory;
}

std::string JsonReport(const Artifact& artifact, const Report& report) {
  std::vector<Json> passes;
  for (const Pass& pass : report.passes) {
    const Times times = Summary(pass.times);
    std::vector<Json> kernels;
    for (size_t i = 0; i < pass.ticks.size(); ++i) {
      const CallInfo& call = artifact.calls[i];
      kernels.push_back(Json::Object({{"function", Json::Text(call.function)}, {"name", Json::Text(call.op)},
                                      {"operator", Json::Text(call.kind)}, {"ms", Json::Real(PerCall(pass, i))}}));
    }
    passes.push_back(Json::Object(
        {{"level", pass.level.empty() ? Json() : Json::Text(pass.level)},
         {"prepare_ms", Json::Real(pass.prepare_ms)},
         {"pause_ms", Json::Real(pass.pause_ms)},
         {"fetched_bytes", Json::Integer(0)},
         {"calls", Json::Integer(static_cast<int64_t>(pass.times.size()))},
         {"ms", Json::Object({{"min", Json::Real(times.least)}, {"median", Json::Real(times.median)},
                              {"max", Json::Real(times.most)}})},
         {"kernels", Json::List(std::move(kernels))}}));
  }
  const Memory& memory = report.memory;
  return Json::Object(
             {{"target", Json::Text(artifact.target)},
              {"gpu", report.gpu.empty() ? Json() : Json::Text(report.gpu)},
              {"library", Json::Text(artifact.library)},
              {"graph", Json::Text(artifact.graph)},
              {"batch", Json::Integer(artifact.input.shape[0])},
              {"images", Json::Integer(report.images)},
              {"passes", Json::List(std::move(passes))},
              {"expect", report.compared ? Json::Object({{"compared", Json::Integer(report.compared)},
                                                         {"differing", Json::Integer(report.differing)}})
                                         : Json()},
              {"memory", Json::Object({{"resident_bytes", Json::Integer(memory.resident)},
                                       {"peak_bytes", Json::Integer(memory.peak)},
                                       {"packed_bytes", Json::Integer(artifact.packed_bytes)},
                                       {"arena_bytes", Json::Integer(artifact.arena_bytes)}})}})
      .Canonical();
}

std::string TextReport(const Artifact& artifact, const Report& report) {
  std::string text = "target " + artifact.target + (report.gpu.empty() ? "" : " on " + report.gpu) + ", batch " +
                     std::to_string(artifact.input.shape[0]) + "\n";
  for (size_t k = 0; k < report.passes.size(); ++k) {
    const Pass& pass = report.passes[k];
    text += pass.level.empty() ? "own level" : "level " + pass.level;
    text += Format(": prepared in %.3f ms", pass.prepare_ms);
    if (k) text += Format(", inference paused for %.3f ms, 0 bytes fetched", pass.pause_ms);
    if (!pass.times.empty()) {
      const Times times = Summary(pass.times);
      text += Format("; %zu calls, ms: min %.4f, median %.4f, max %.4f", pass.times.size(), times.least, times.median,
                     times.most);
    }
    text += '\n';
    const int64_t sum = std::accumulate(pass.ticks.begin(), pass.ticks.end(), int64_t{0});
    for (size_t i = 0; i < pass.ticks.size(); ++i) {
      const CallInfo& call = artifact.calls[i];
      text += Format("%10.4f ms %5.1f%%  %-16.40s %.120s (%.120s)\n", PerCall(pass, i),
                     100.0 * static_cast<double>(pass.ticks[i]) / static_cast<double>(std::max<int64_t>(sum, 1)),
                     call.kind.c_str(), call.op.c_str(), call.function.c_str());
    }
  }
  if (report.compared) {
    text += Format("expected outputs: %lld of %lld differ\n", static_cast<long long>(report.differing),
                   static_cast<long long>(report.compared));
  }
  const Memory& memory = report.memory;
  text += Format("memory: %.2f MB resident, %.2f MB at most; parameters %.2f MB, arena %.2f MB%s\n",
                 static_cast<double>(memory.resident) / 1e6, static_cast<double>(memory.peak) / 1e6,
                 static_cast<double>(artifact.packed_bytes) / 1e6, static_cast<double>(artifact.arena_bytes) / 1e6,
                 report.gpu.empty() ? "" : " on the GPU");
  return text;
}

}  // namespace qdeploy
