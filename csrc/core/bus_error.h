// What to say where a file that is mapped into memory becomes shorter, or its disk fails: its pages
// are gone, and the system sends a signal to who reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <unistd.h>
#endif

namespace nlm {

// A file in the address space.
struct MappedFile {
  uintptr_t begin;
  size_t bytes;
  std::string name;
};

inline std::vector<MappedFile>& explained_files() {
  static std::vector<MappedFile> files;
  return files;
}

#if defined(__unix__) || defined(__APPLE__)
// Says which file it was and ends the process; calls nothing that a handler may not.
inline void explain_bus_error(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  bool written = true;
  const auto say = [&](const char* text, size_t size) {
    written = write(STDERR_FILENO, text, size) >= 0 && written;
  };
  static constexpr char kRule[] = "nlm: an input must stay as it is while it is read, got ";
  static constexpr char kEnd[] = ", which became shorter or cannot be read\n";
  say(kRule, sizeof(kRule) - 1);
  const MappedFile* found = nullptr;
  for (const MappedFile& each : explained_files())
    if (at >= each.begin && at - each.begin < each.bytes) found = &each;
  if (found) {
    say("'", 1);
    say(found->name.data(), found->name.size());
    say("'", 1);
  } else {
    say("a file", 6);
  }
  say(kEnd, sizeof(kEnd) - 1);
  _exit(written ? 1 : 2);
}
#endif

// While there are files, such a read of one ends the process with one sentence and exit code 1.
inline void explain_bus_errors(std::vector<MappedFile> files) {
#if defined(__unix__) || defined(__APPLE__)
  static struct sigaction before = {};
  const bool on = !files.empty();
  if (!on) sigaction(SIGBUS, &before, nullptr);
  explained_files() = std::move(files);
  if (!on) return;
  struct sigaction action = {};
  action.sa_sigaction = explain_bus_error;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, &before);
#else
  (void)files;
#endif
}

}  // namespace nlm
