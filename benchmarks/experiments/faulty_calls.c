// A library to preload, with which the system fails a program at one of its calls on files.
//
// nlm_fault("CALL NUMBER ACTION", FOLDER, NOTES) arms it: from the NUMBER-th such call on files
// under the folder (of each of its processes' own), ACTION is taken once: an errno, "short" (half
// of the bytes are read or written), "hold" (the call waits while there is a file PROCESS.held in
// NOTES, which it makes) or "kill" (SIGKILL before it). CALL is open, write, fsync, rename, mkdir,
// remove, read, map, lock, copy, or any. The environment's NLM_FAULT and NLM_FAULT_FOLDER arm it
// from the start. nlm_calls() counts the calls of a kind.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum { kOpen, kWrite, kFsync, kRename, kMkdir, kRemove, kRead, kMap, kLock, kCopy, kAny, kCalls };
static const char* const kNames[kCalls] = {"open", "write", "fsync", "rename", "mkdir", "remove",
                                           "read", "map",   "lock",  "copy",   "any"};
enum { kNothing, kShort };

static atomic_long counts[kCalls];
static char folder[PATH_MAX];
static char notes[PATH_MAX];
static int armed = -1;  // a call, or none
static long at;
static char action[32];

void nlm_fault(const char* text, const char* where, const char* said) {
  char call[16];
  snprintf(folder, sizeof folder, "%s", where);
  snprintf(notes, sizeof notes, "%s", said);
  for (int k = 0; k < kCalls; ++k) atomic_store(&counts[k], 0);
  armed = -1;
  if (sscanf(text, "%15s %ld %31s", call, &at, action) != 3) return;
  for (int k = 0; k < kCalls; ++k)
    if (strcmp(call, kNames[k]) == 0) armed = k;
}

long nlm_calls(const char* call) {
  for (int k = 0; k < kCalls; ++k)
    if (strcmp(call, kNames[k]) == 0) return atomic_load(&counts[k]);
  return -1;
}

__attribute__((constructor)) static void from_environment(void) {
  const char* text = getenv("NLM_FAULT");
  const char* where = getenv("NLM_FAULT_FOLDER");
  if (text && where) nlm_fault(text, where, ".");
}

// A signal would not do: whoever pauses the whole machine sends those too.
static void hold(void) {
  char file[PATH_MAX + 32];
  snprintf(file, sizeof file, "%s/%d.held", notes, getpid());
  const int made = (int)syscall(SYS_openat, AT_FDCWD, file, O_CREAT | O_WRONLY, 0600);
  if (made >= 0) close(made);
  while (access(file, F_OK) == 0) usleep(1000);
}

// What to do at a call on a path: nothing, shorten it, or fail with the errno -value.
static int at_call(int call, const char* path) {
  const size_t length = strlen(folder);
  if (!path || length == 0 || strncmp(path, folder, length) != 0) return kNothing;
  const long own = atomic_fetch_add(&counts[call], 1) + 1;
  const long all = atomic_fetch_add(&counts[kAny], 1) + 1;
  if (!(armed == call && own == at) && !(armed == kAny && all == at)) return kNothing;
  if (strcmp(action, "kill") == 0) raise(SIGKILL);
  if (strcmp(action, "hold") == 0) return hold(), kNothing;
  if (strcmp(action, "short") == 0) return kShort;
  return -atoi(action);
}

static int at_file(int call, int file) {
  char link[64], path[PATH_MAX];
  if (file < 0) return kNothing;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return kNothing;
  path[length] = 0;
  return at_call(call, path);
}

static int at_entry(int call, int directory, const char* path) {
  return path[0] == '/' || directory == AT_FDCWD ? at_call(call, path) : at_file(call, directory);
}

#define NEXT(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)
#define FAIL_AT(step)                  \
  do {                                 \
    const int what = step;             \
    if (what < 0) {                    \
      errno = -what;                   \
      return (__typeof__(result))(-1); \
    }                                  \
    is_short = what == kShort;         \
  } while (0)
#define PASS(type, step, call) \
  {                            \
    type result = 0;           \
    int is_short = 0;          \
    FAIL_AT(step);             \
    (void)is_short;            \
    result = call;             \
    return result;             \
  }
#define MODE                             \
  mode_t mode = 0;                       \
  if (flags & (O_CREAT | __O_TMPFILE)) { \
    va_list more;                        \
    va_start(more, flags);               \
    mode = va_arg(more, mode_t);         \
    va_end(more);                        \
  }

int open64(const char* path, int flags, ...) {
  MODE PASS(int, at_call(kOpen, path), NEXT(open64, path, flags, mode))
}
int open(const char* path, int flags, ...) {
  MODE PASS(int, at_call(kOpen, path), NEXT(open, path, flags, mode))
}
int openat64(int from, const char* path, int flags, ...){
    MODE PASS(int, at_entry(kOpen, from, path), NEXT(openat64, from, path, flags, mode))} ssize_t
    write(int file, const void* data, size_t size)
        PASS(ssize_t, at_file(kWrite, file),
             NEXT(write, file, data, is_short ? (size + 1) / 2 : size)) ssize_t
    read(int file, void* data, size_t size)
        PASS(ssize_t, at_file(kRead, file),
             NEXT(read, file, data, is_short ? (size + 1) / 2 : size)) int fsync(int file)
            PASS(int, at_file(kFsync, file), NEXT(fsync, file)) int rename(const char* from,
                                                                           const char* to)
                PASS(int, at_call(kRename, from),
                     NEXT(rename, from, to)) int mkdir(const char* path, mode_t mode)
                    PASS(int, at_call(kMkdir, path),
                         NEXT(mkdir, path, mode)) int unlink(const char* path)
                        PASS(int, at_call(kRemove, path),
                             NEXT(unlink, path)) int rmdir(const char* path)
                            PASS(int, at_call(kRemove, path),
                                 NEXT(rmdir, path)) int unlinkat(int from, const char* path,
                                                                 int flags)
                                PASS(int, at_entry(kRemove, from, path),
                                     NEXT(unlinkat, from, path, flags)) int flock(int file,
                                                                                  int operation)
                                    PASS(int, at_file(kLock, file),
                                         NEXT(flock, file,
                                              operation)) void* mmap64(void* address, size_t size,
                                                                       int protection, int flags,
                                                                       int file, off64_t offset)
                                        PASS(void*, at_file(kMap, file),
                                             NEXT(mmap64, address, size, protection, flags, file,
                                                  offset)) ssize_t
    sendfile64(int to, int from, off64_t* offset, size_t size)
        PASS(ssize_t, at_file(kCopy, to), NEXT(sendfile64, to, from, offset, size))
