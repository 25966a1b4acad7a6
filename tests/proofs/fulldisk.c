/* A disk that is full from a chosen call on: loaded before libc, it counts the calls that write below one folder.

   The counters lie in memory that the caller shares between processes: {calls, refused}, the first call that was refused,
   and all of them by their numbers. Nothing is counted before `disk_full_at`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define LISTED 1024

struct book {
    long calls, refused;
    char first[240], list[LISTED][120];
};

static struct book *book;
static char folder[PATH_MAX];
static long first_call;
static int only_once;

void disk_full_at(const char *below, long call, int once, void *shared) {
    snprintf(folder, sizeof folder, "%s", below);
    first_call = call;
    only_once = once;
    book = shared;
}

static int refused(const char *call, const char *path) {
    size_t length = strlen(folder);
    if (strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    long number = __atomic_add_fetch(&book->calls, 1, __ATOMIC_SEQ_CST);
    if (number <= LISTED) snprintf(book->list[number - 1], sizeof book->list[0], "%s %s", call, path + length);
    if (only_once ? number != first_call : number < first_call) return 0;
    if (__atomic_add_fetch(&book->refused, 1, __ATOMIC_SEQ_CST) == 1)
        snprintf(book->first, sizeof book->first, "%s %s", call, path + length);
    errno = ENOSPC;
    return 1;
}

static int refused_at(const char *call, int directory, const char *path) {
    if (!book) return 0;
    char whole[PATH_MAX], link[64];
    if (path && path[0] == '/') return refused(call, path);
    if (directory == AT_FDCWD) {
        if (!getcwd(whole, sizeof whole)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, whole, sizeof whole - 1);
        if (length < 0) return 0;
        whole[length] = 0;
    }
    if (path) {
        size_t length = strlen(whole);
        snprintf(whole + length, sizeof whole - length, "/%s", path);
    }
    return refused(call, whole);
}

/* A call on an open file. */
#define ON_FILE(type, name, failure, parameters, arguments)                   \
    type name parameters {                                                    \
        static type(*real) parameters;                                        \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);        \
        return refused_at(#name, file, NULL) ? failure : real arguments;      \
    }

ON_FILE(ssize_t, write, -1, (int file, const void *data, size_t size), (file, data, size))
ON_FILE(ssize_t, writev, -1, (int file, const struct iovec *parts, int count), (file, parts, count))
ON_FILE(ssize_t, pwrite, -1, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
ON_FILE(ssize_t, pwrite64, -1, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
ON_FILE(ssize_t, sendfile, -1, (int file, int from, off_t *at, size_t size), (file, from, at, size))
ON_FILE(ssize_t, sendfile64, -1, (int file, int from, off64_t *at, size_t size), (file, from, at, size))
ON_FILE(int, ftruncate, -1, (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, -1, (int file, off64_t size), (file, size))
ON_FILE(int, posix_fallocate, ENOSPC, (int file, off_t at, off_t size), (file, at, size))
ON_FILE(int, posix_fallocate64, ENOSPC, (int file, off64_t at, off64_t size), (file, at, size))
ON_FILE(int, fallocate, -1, (int file, int mode, off_t at, off_t size), (file, mode, at, size))
ON_FILE(int, fallocate64, -1, (int file, int mode, off64_t at, off64_t size), (file, mode, at, size))
ON_FILE(int, fsync, -1, (int file), (file))
ON_FILE(int, fdatasync, -1, (int file), (file))

ssize_t copy_file_range(int from, off64_t *at, int file, off64_t *to, size_t size, unsigned flags) {
    static ssize_t (*real)(int, off64_t *, int, off64_t *, size_t, unsigned);
    if (!real) real = (ssize_t(*)(int, off64_t *, int, off64_t *, size_t, unsigned))dlsym(RTLD_NEXT, "copy_file_range");
    return refused_at("copy_file_range", file, NULL) ? -1 : real(from, at, file, to, size, flags);
}

/* A call on a name. */
#define ON_NAME(name, directory, parameters, arguments)                       \
    int name parameters {                                                     \
        static int(*real) parameters;                                         \
        if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #name);         \
        return refused_at(#name, directory, path) ? -1 : real arguments;      \
    }

ON_NAME(mkdir, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_NAME(mkdirat, directory, (int directory, const char *path, mode_t mode), (directory, path, mode))
ON_NAME(rename, AT_FDCWD, (const char *from, const char *path), (from, path))
ON_NAME(renameat, to, (int at, const char *from, int to, const char *path), (at, from, to, path))
ON_NAME(renameat2, to, (int at, const char *from, int to, const char *path, unsigned flags), (at, from, to, path, flags))
ON_NAME(creat, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_NAME(creat64, AT_FDCWD, (const char *path, mode_t mode), (path, mode))

/* Opening is refused where it would make a file. */
static mode_t mode_of(int flags, va_list more) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(more, mode_t) : 0;
}

#define OPENS(name)                                                           \
    int name(const char *path, int flags, ...) {                              \
        static int (*real)(const char *, int, ...);                           \
        if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list more;                                                         \
        va_start(more, flags);                                                \
        mode_t mode = mode_of(flags, more);                                   \
        va_end(more);                                                         \
        return flags & O_CREAT && refused_at(#name, AT_FDCWD, path) ? -1 : real(path, flags, mode); \
    }
#define OPENS_AT(name)                                                        \
    int name(int directory, const char *path, int flags, ...) {               \
        static int (*real)(int, const char *, int, ...);                      \
        if (!real) real = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list more;                                                         \
        va_start(more, flags);                                                \
        mode_t mode = mode_of(flags, more);                                   \
        va_end(more);                                                         \
        return flags & O_CREAT && refused_at(#name, directory, path) ? -1 : real(directory, path, flags, mode); \
    }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
