#include "options.h"

#include <functional>
#include <map>

#include "error.h"

namespace qdeploy {

const char kUsage[] =
    R"(qdeploy-run FOLDER [options]: run a compiled network

FOLDER is an artifact folder that holds a level (compiled with --constant), or a pulled device folder. Without --input
everything is checked and loaded, and nothing runs.

  --input FILE      images: .npy (float32, or uint8 pixels) or raw float32; may be repeated, and take several files
  --output FILE     outputs of all images in order: .npy by its name, else raw; with --climb one block a level
  --codes           integer codes before the last Dequantize in place of float32 outputs
  --expect FILE     compare the outputs with FILE bit for bit
  --repeat N        run every batch N times (for times; default 1)
  --threads N       workers of the thread pool (default: what the artifact was compiled for)
  --profile         time in each kernel
  --json            one JSON object on standard output
  --level L         of a device folder: start at level L (default: the level in force)
  --climb A,B       then go to level A and run all images again, then to B: up or down, from what is held
  --mode MODE       of --climb: swap (prepare the next level aside while this one runs) or in-place (less memory)
  --artifact DIR    of a device folder: the compiled artifact in DIR instead of the release's
  --cpu             print this machine's architecture and instruction sets
  --help            print this

Exit codes: 0 done; 1 outputs differ from --expect; 2 bad input or damaged files; 3 this machine cannot run it.
)";

namespace {

int64_t Number(const std::string& option, const std::string& text, int64_t limit) {
  int64_t value = 0;
  const bool digits = !text.empty() && text.size() < 10 && text.find_first_not_of("0123456789") == std::string::npos;
  if (digits) value = std::stoll(text);
  if (value < 1 || value > limit) Fail(option + " is a number of 1 to " + std::to_string(limit) + ", not " + text);
  return value;
}

std::vector<std::string> Split(const std::string& option, const std::string& text) {
  std::vector<std::string> names;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    names.push_back(text.substr(at, end - at));
    if (names.back().empty()) Fail(option + " is a list of levels, like w2,w4");
    at = end + 1;
  }
  return names;
}

void Check(const Options& options) {
  if (options.help || options.cpu) return;
  if (options.folder.empty()) Fail("name an artifact folder or a device folder: see qdeploy-run --help");
  const char* needs = !options.output.empty()   ? "--output"
                      : !options.expect.empty() ? "--expect"
                      : !options.climb.empty()  ? "--climb"
                      : options.profile         ? "--profile"
                      : options.codes           ? "--codes"
                                                : nullptr;
  if (options.inputs.empty() && needs) Fail(std::string(needs) + " needs images: add --input FILE");
  if (options.profile && options.codes) Fail("--profile runs the float32 outputs: leave out --codes");
  if (options.in_place && options.climb.empty()) Fail("--mode says how to climb: add --climb LEVEL");
}

}  // namespace

Options ParseOptions(int argc, char** argv) {
  Options options;
  const std::map<std::string, std::function<void(const std::string&)>> valued = {
      {"--output", [&](const std::string& text) { options.output = text; }},
      {"--expect", [&](const std::string& text) { options.expect = text; }},
      {"--level", [&](const std::string& text) { options.level = text; }},
      {"--artifact", [&](const std::string& text) { options.artifact = text; }},
      {"--climb", [&](const std::string& text) { options.climb = Split("--climb", text); }},
      {"--repeat", [&](const std::string& text) { options.repeat = Number("--repeat", text, 100000000); }},
      {"--threads", [&](const std::string& text) { options.threads = Number("--threads", text, 256); }},
      {"--mode",
       [&](const std::string& text) {
         if (text != "swap" && text != "in-place") Fail("--mode is swap or in-place, not " + text);
         options.in_place = text == "in-place";
       }},
  };
  const std::map<std::string, bool*> flags = {{"--codes", &options.codes}, {"--profile", &options.profile},
                                              {"--json", &options.json},   {"--cpu", &options.cpu},
                                              {"--help", &options.help}};
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--input") {
      const size_t before = options.inputs.size();
      while (i + 1 < argc && std::string(argv[i + 1]).substr(0, 2) != "--") options.inputs.emplace_back(argv[++i]);
      if (options.inputs.size() == before) Fail("--input needs a file");
    } else if (const auto found = valued.find(word); found != valued.end()) {
      if (i + 1 == argc || !*argv[i + 1]) Fail(word + " needs a value: see qdeploy-run --help");
      found->second(argv[++i]);
    } else if (const auto flag = flags.find(word); flag != flags.end()) {
      *flag->second = true;
    } else if (word.substr(0, 1) == "-") {
      Fail("unknown option " + word + ": see qdeploy-run --help");
    } else if (options.folder.empty()) {
      options.folder = word;
    } else {
      Fail("one folder, not also " + word + ": images follow --input");
    }
  }
  Check(options);
  return options;
}

}  // namespace qdeploy
