// What to say where a file that is mapped into memory becomes shorter: its pages are gone, and the
// system sends a signal to who reads them.
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <unistd.h>
#endif

namespace nlm {

// While `on`, such a read ends the process with one sentence and exit code 1.
inline void explain_bus_errors(bool on) {
#if defined(__unix__) || defined(__APPLE__)
  static struct sigaction before = {};
  if (!on) {
    sigaction(SIGBUS, &before, nullptr);
    return;
  }
  struct sigaction action = {};
  action.sa_handler = [](int) {
    static constexpr char kSentence[] =
        "nlm: an input must stay as it is while it is read, got a file that became shorter\n";
    const auto written = write(STDERR_FILENO, kSentence, sizeof(kSentence) - 1);
    _exit(written < 0 ? 2 : 1);
  };
  sigaction(SIGBUS, &action, &before);
#else
  (void)on;
#endif
}

}  // namespace nlm
