// What a process does to the files below one folder: recorded in order, or cut short by SIGKILL.
//
// Preloaded into a process (LD_PRELOAD), told by its environment:
//   CRASH_FOLDER   the folder, an absolute path without links; anything elsewhere is passed on untouched
//   CRASH_LOG      a file to append records to (see recorder.py)
//   CRASH_KILL     a number n: the process kills itself before its n-th call that changes a name or makes data durable
//
// Calls are serialized, so that the log has the order in which they took effect.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char folder[PATH_MAX];
static int log_file = -1;
static long kill_at = -1, calls = 0;

enum { CREATE = 1, WRITE, TRUNCATE, SYNC, RENAME, UNLINK, MKDIR, LINK, SYMLINK };

// The same for a process that was forked: kill_call is 0 for none.
void crash_begin(const char *watched, const char *log, long kill_call) {
  snprintf(folder, sizeof folder, "%s", watched);
  log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  kill_at = kill_call ? kill_call : -1, calls = 0;
}

__attribute__((constructor)) static void start(void) {
  const char *name = getenv("CRASH_FOLDER"), *log = getenv("CRASH_LOG"), *kill_text = getenv("CRASH_KILL");
  if (name) snprintf(folder, sizeof folder, "%s", name);
  if (log) log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (kill_text) kill_at = atol(kill_text);
}

static int inside(const char *path) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

// The absolute path of a name whose folder exists; links in the folder's part are followed. 0 if it is elsewhere.
static int resolve(int at, const char *name, char *out) {
  char joined[2 * PATH_MAX], parent[PATH_MAX], link[64];
  if (!name || !*name) return 0;
  if (name[0] == '/') {
    snprintf(joined, sizeof joined, "%s", name);
  } else {
    char base[PATH_MAX];
    if (at == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return 0;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", at);
      ssize_t count = readlink(link, base, sizeof base - 1);
      if (count < 0) return 0;
      base[count] = 0;
    }
    snprintf(joined, sizeof joined, "%s/%s", base, name);
  }
  size_t length = strlen(joined);
  while (length > 1 && joined[length - 1] == '/') joined[--length] = 0;
  char *slash = strrchr(joined, '/');
  if (!slash) return 0;
  char last[NAME_MAX + 1];
  snprintf(last, sizeof last, "%s", slash + 1);
  *slash = 0;
  if (!realpath(*joined ? joined : "/", parent)) return 0;
  int size = snprintf(out, PATH_MAX, "%s/%s", strcmp(parent, "/") ? parent : "", last);
  return size < PATH_MAX && inside(out);
}

static int of_descriptor(int descriptor, struct stat *status) {
  char link[64], path[PATH_MAX];
  if (!*folder) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t count = readlink(link, path, sizeof path - 1);
  if (count < 0) return 0;
  path[count] = 0;
  return inside(path) && !fstat(descriptor, status) && (S_ISREG(status->st_mode) || S_ISDIR(status->st_mode));
}

static void record(uint32_t kind, uint64_t inode, uint64_t offset, const char *first, const char *second,
                   const void *data, uint64_t size) {
  if (log_file < 0) return;
  uint32_t lengths[2] = {first ? strlen(first) : 0, second ? strlen(second) : 0};
  struct { uint32_t kind, first, second, zero; uint64_t inode, offset, size; } head = {
      kind, lengths[0], lengths[1], 0, inode, offset, size};
  struct iovec pieces[4] = {{&head, sizeof head}, {(void *)first, lengths[0]}, {(void *)second, lengths[1]},
                            {(void *)data, size}};
  for (int i = 0; i < 4; i++) {
    char *from = pieces[i].iov_base;
    size_t left = from ? pieces[i].iov_len : 0;
    while (left) {
      ssize_t count = syscall(SYS_write, log_file, from, left);
      if (count <= 0) abort();
      from += count, left -= count;
    }
  }
}

static void count_call(void) {
  if (++calls == kill_at) syscall(SYS_kill, getpid(), SIGKILL);
}

static uint64_t inode_at(const char *path) {
  struct stat status;
  return lstat(path, &status) ? 0 : status.st_ino;
}

#define BEGIN pthread_mutex_lock(&lock)
#define END do { int error_ = errno; pthread_mutex_unlock(&lock); errno = error_; } while (0)

static int open_any(int at, const char *name, int flags, mode_t mode) {
  char path[PATH_MAX];
  if (!(flags & (O_CREAT | O_TRUNC)) || !*folder || !resolve(at, name, path))
    return syscall(SYS_openat, at, name, flags | O_LARGEFILE, mode);
  BEGIN;
  int existed = inode_at(path) != 0;
  if (!existed) count_call();
  int descriptor = syscall(SYS_openat, at, name, flags | O_LARGEFILE, mode);
  struct stat status;
  if (descriptor >= 0 && !fstat(descriptor, &status)) {
    if (!existed) record(CREATE, status.st_ino, 0, path, NULL, NULL, 0);
    else if (flags & O_TRUNC) record(TRUNCATE, status.st_ino, 0, NULL, NULL, NULL, 0);
  }
  END;
  return descriptor;
}

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
int open(const char *name, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags) return open_any(AT_FDCWD, name, flags, mode); }
int openat(int at, const char *name, int flags, ...) { MODE(flags) return open_any(at, name, flags, mode); }
int openat64(int at, const char *name, int flags, ...) { MODE(flags) return open_any(at, name, flags, mode); }
int __open_2(const char *name, int flags) { return open_any(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return open_any(AT_FDCWD, name, flags, 0); }
int __openat_2(int at, const char *name, int flags) { return open_any(at, name, flags, 0); }
int __openat64_2(int at, const char *name, int flags) { return open_any(at, name, flags, 0); }
int creat(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return open_any(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static void wrote(int descriptor, const struct stat *before, off_t offset, const struct iovec *pieces, int count,
                  ssize_t size) {
  for (int i = 0; i < count && size > 0; i++) {
    size_t length = pieces[i].iov_len < (size_t)size ? pieces[i].iov_len : (size_t)size;
    record(WRITE, before->st_ino, offset, NULL, NULL, pieces[i].iov_base, length);
    offset += length, size -= length;
  }
}

static ssize_t write_any(int descriptor, const struct iovec *pieces, int count, off_t offset) {
  struct stat status;
  int here = offset < 0;
  if (!of_descriptor(descriptor, &status))
    return here ? syscall(SYS_writev, descriptor, pieces, count)
                : syscall(SYS_pwritev, descriptor, pieces, count, offset, 0);
  BEGIN;
  fstat(descriptor, &status);
  if (here) offset = fcntl(descriptor, F_GETFL) & O_APPEND ? status.st_size : lseek(descriptor, 0, SEEK_CUR);
  ssize_t size = here ? syscall(SYS_writev, descriptor, pieces, count)
                      : syscall(SYS_pwritev, descriptor, pieces, count, offset, 0);
  wrote(descriptor, &status, offset, pieces, count, size);
  END;
  return size;
}

ssize_t write(int descriptor, const void *data, size_t size) {
  struct iovec piece = {(void *)data, size};
  struct stat status;
  if (!*folder || !of_descriptor(descriptor, &status)) return syscall(SYS_write, descriptor, data, size);
  return write_any(descriptor, &piece, 1, -1);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
  struct iovec piece = {(void *)data, size};
  return write_any(descriptor, &piece, 1, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
  struct iovec piece = {(void *)data, size};
  return write_any(descriptor, &piece, 1, offset);
}
ssize_t writev(int descriptor, const struct iovec *pieces, int count) {
  return write_any(descriptor, pieces, count, -1);
}
ssize_t pwritev(int descriptor, const struct iovec *pieces, int count, off_t offset) {
  return write_any(descriptor, pieces, count, offset);
}
ssize_t pwritev64(int descriptor, const struct iovec *pieces, int count, off64_t offset) {
  return write_any(descriptor, pieces, count, offset);
}

static int truncate_any(int descriptor, off_t size) {
  struct stat status;
  if (!of_descriptor(descriptor, &status)) return syscall(SYS_ftruncate, descriptor, size);
  BEGIN;
  int result = syscall(SYS_ftruncate, descriptor, size);
  if (!result) record(TRUNCATE, status.st_ino, size, NULL, NULL, NULL, 0);
  END;
  return result;
}
int ftruncate(int descriptor, off_t size) { return truncate_any(descriptor, size); }
int ftruncate64(int descriptor, off64_t size) { return truncate_any(descriptor, size); }

static int sync_any(int descriptor, long call) {
  struct stat status;
  if (!of_descriptor(descriptor, &status)) return syscall(call, descriptor);
  BEGIN;
  count_call();
  int result = syscall(call, descriptor);
  if (!result) record(SYNC, status.st_ino, 0, NULL, NULL, NULL, 0);
  END;
  return result;
}
int fsync(int descriptor) { return sync_any(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return sync_any(descriptor, SYS_fdatasync); }

static int rename_any(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
  char first[PATH_MAX], second[PATH_MAX];
  int inside_first = *folder && resolve(from_at, from, first), inside_second = *folder && resolve(to_at, to, second);
  if (!inside_first && !inside_second) return syscall(SYS_renameat2, from_at, from, to_at, to, flags);
  BEGIN;
  count_call();
  int result = syscall(SYS_renameat2, from_at, from, to_at, to, flags);
  if (!result) record(RENAME, inode_at(second), flags, first, second, NULL, 0);
  END;
  return result;
}
int rename(const char *from, const char *to) { return rename_any(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_at, const char *from, int to_at, const char *to) { return rename_any(from_at, from, to_at, to, 0); }
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
  return rename_any(from_at, from, to_at, to, flags);
}

static int unlink_any(int at, const char *name, int flags) {
  char path[PATH_MAX];
  if (!*folder || !resolve(at, name, path)) return syscall(SYS_unlinkat, at, name, flags);
  BEGIN;
  count_call();
  int result = syscall(SYS_unlinkat, at, name, flags);
  if (!result) record(UNLINK, 0, 0, path, NULL, NULL, 0);
  END;
  return result;
}
int unlink(const char *name) { return unlink_any(AT_FDCWD, name, 0); }
int unlinkat(int at, const char *name, int flags) { return unlink_any(at, name, flags); }
int rmdir(const char *name) { return unlink_any(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name) {
  int result = unlink(name);
  return result && errno == EISDIR ? rmdir(name) : result;
}

static int mkdir_any(int at, const char *name, mode_t mode) {
  char path[PATH_MAX];
  if (!*folder || !resolve(at, name, path)) return syscall(SYS_mkdirat, at, name, mode);
  BEGIN;
  count_call();
  int result = syscall(SYS_mkdirat, at, name, mode);
  if (!result) record(MKDIR, inode_at(path), 0, path, NULL, NULL, 0);
  END;
  return result;
}
int mkdir(const char *name, mode_t mode) { return mkdir_any(AT_FDCWD, name, mode); }
int mkdirat(int at, const char *name, mode_t mode) { return mkdir_any(at, name, mode); }

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
  char path[PATH_MAX];
  if (!*folder || !resolve(to_at, to, path)) return syscall(SYS_linkat, from_at, from, to_at, to, flags);
  BEGIN;
  count_call();
  int result = syscall(SYS_linkat, from_at, from, to_at, to, flags);
  if (!result) record(LINK, inode_at(path), 0, path, NULL, NULL, 0);
  END;
  return result;
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *target, int at, const char *name) {
  char path[PATH_MAX];
  if (!*folder || !resolve(at, name, path)) return syscall(SYS_symlinkat, target, at, name);
  BEGIN;
  count_call();
  int result = syscall(SYS_symlinkat, target, at, name);
  if (!result) record(SYMLINK, inode_at(path), 0, path, target, NULL, 0);
  END;
  return result;
}
int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
