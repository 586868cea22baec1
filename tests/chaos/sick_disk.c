/* A disk that is sick on command: a library to preload, between a program and libc.

   cc -shared -fPIC -o sick_disk.so sick_disk.c -ldl
   SICK_CONTROL=FILE LD_PRELOAD=./sick_disk.so python main.py ...

   While FILE contains "28 checkpoints/4", every write to a path with "checkpoints/4" in it fails with errno 28, no
   space; 30 is a read-only file system and 5 an I/O error. "0 TEXT" makes writes slow. While FILE is empty all is well.

   Reads fail where a word comes first, and a count: "open 5 0 TEXT" fails to open a file for reading, "middle 5 0 TEXT"
   to read its second half, "stat 5 0 TEXT" to find out whether it is there, "list 5 0 TEXT" to list a folder; and
   "short 0 0 TEXT" reads half of what is asked for. With a count above 0, only the first so many fail. Each failure
   appends a line to FILE.fired. What is read through a memory map, after it was opened, does not fail. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITES, MAKES, REMOVES };

/* The first bytes of FILE or FILE.fired as text; whether there are any. */
static int contents(const char *suffix, char *text, size_t most) {
    const char *control = getenv("SICK_CONTROL");
    char name[4096];
    if (!control) return 0;
    snprintf(name, sizeof name, "%s%s", control, suffix);
    int fd = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t size = syscall(SYS_read, fd, text, most - 1);
    syscall(SYS_close, fd);
    text[size > 0 ? size : 0] = 0;
    return size > 0;
}

/* The errno with which this write is to fail, or 0. */
static int sick(const char *path, int what) {
    char text[512];
    if (!path || !contents("", text, sizeof text) || text[0] > '9') return 0; /* a word: it is about reads */
    text[strcspn(text, "\n")] = 0;
    char *part = strchr(text, ' ');
    if (!part || !strstr(path, part + 1)) return 0;
    int number = atoi(text);
    if (!number) {
        struct timespec moment = {0, 50000000};
        nanosleep(&moment, NULL);
        return 0;
    }
    return number == ENOSPC && what == REMOVES ? 0 : number;
}

/* The path of an open file; whether it has one. */
static int path_of(int fd, char *path, size_t most) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, most - 1);
    path[size > 0 ? size : 0] = 0;
    return size > 0;
}

static int sick_fd(int fd) {
    char path[4096];
    return path_of(fd, path, sizeof path) ? sick(path, WRITES) : 0;
}

/* What FILE asks reads to suffer: a word, an errno, a count, a part of a path. */
struct order {
    char word[16], part[448];
    int number, count;
};

/* Whether FILE orders one of the `words`. */
static int ordered(struct order *order, const char *words) {
    char text[512];
    if (!contents("", text, sizeof text)) return 0;
    int found = sscanf(text, "%15[a-z] %d %d %447[^\n]", order->word, &order->number, &order->count, order->part);
    return found == 4 && strstr(words, order->word);
}

/* Whether an order is for this path, and not used up; it is then noted in FILE.fired. */
static int strikes(const struct order *order, const char *path) {
    char fired[65536], line[4200];
    if (!path || !strstr(path, order->part)) return 0;
    if (order->count && contents(".fired", fired, sizeof fired)) {
        int lines = 0;
        for (char *at = fired; (at = strchr(at, '\n')); at++) lines++;
        if (lines >= order->count) return 0;
    }
    snprintf(line, sizeof line, "%s.fired", getenv("SICK_CONTROL"));
    int fd = syscall(SYS_openat, AT_FDCWD, line, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int size = snprintf(line, sizeof line, "%s %s\n", order->word, path);
    if (fd >= 0) syscall(SYS_write, fd, line, size), syscall(SYS_close, fd);
    return 1;
}

/* The errno with which to fail to open, find or list (`word`) a path, or 0. */
static int unreadable(const char *path, const char *word) {
    struct order order;
    return ordered(&order, word) && strikes(&order, path) ? order.number : 0;
}

/* How many of `size` bytes from `at` on, -1 for the file's position, can be read; 0, with errno, where none can. */
static size_t readable(int fd, size_t size, off_t at) {
    struct order order;
    struct stat found;
    char path[4096];
    if (!size || !ordered(&order, "middle short") || !path_of(fd, path, sizeof path)) return size;
    if (!strstr(path, order.part) || syscall(SYS_fstat, fd, &found) || !S_ISREG(found.st_mode)) return size;
    if (at < 0) at = lseek(fd, 0, SEEK_CUR);
    if (order.word[0] == 's') return size > 1 && at < found.st_size && strikes(&order, path) ? size / 2 : size;
    off_t middle = found.st_size / 2;
    if (at + (off_t)size <= middle || at >= found.st_size) return size;
    if (at < middle) return middle - at;
    if (!strikes(&order, path)) return size;
    errno = order.number;
    return 0;
}

#define FAIL_IF(number) \
    do { \
        int failed = (number); \
        if (failed) { \
            errno = failed; \
            return -1; \
        } \
    } while (0)
#define REAL(name, ...) ((name##_t)dlsym(RTLD_NEXT, #name))(__VA_ARGS__)
#define ON_FD(type, name, arguments, ...) \
    typedef type(*name##_t) arguments; \
    type name arguments { \
        FAIL_IF(sick_fd(fd)); \
        return REAL(name, __VA_ARGS__); \
    }
#define ON_PATH(name, what, arguments, ...) \
    typedef int(*name##_t) arguments; \
    int name arguments { \
        FAIL_IF(sick(path, what)); \
        return REAL(name, __VA_ARGS__); \
    }
ON_FD(ssize_t, write, (int fd, const void *data, size_t size), fd, data, size)
ON_FD(ssize_t, writev, (int fd, const struct iovec *parts, int count), fd, parts, count)
ON_FD(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off_t at), fd, data, size, at)
ON_FD(int, fsync, (int fd), fd)
ON_FD(int, fdatasync, (int fd), fd)
ON_PATH(mkdir, MAKES, (const char *path, mode_t mode), path, mode)
ON_PATH(rename, REMOVES, (const char *old, const char *path), old, path)
ON_PATH(unlink, REMOVES, (const char *path), path)
ON_PATH(rmdir, REMOVES, (const char *path), path)
ON_PATH(unlinkat, REMOVES, (int folder, const char *path, int flags), folder, path, flags)

#define READS(name, at, arguments, ...) \
    typedef ssize_t(*name##_t) arguments; \
    ssize_t name arguments { \
        size_t asked = size; \
        size = readable(fd, size, at); \
        return asked && !size ? -1 : REAL(name, __VA_ARGS__); \
    }
READS(read, -1, (int fd, void *data, size_t size), fd, data, size)
READS(pread, at, (int fd, void *data, size_t size, off_t at), fd, data, size, at)
READS(pread64, at, (int fd, void *data, size_t size, off_t at), fd, data, size, at)

#define FINDS(name, type) \
    typedef int (*name##_t)(const char *, type *); \
    int name(const char *path, type *found) { \
        FAIL_IF(unreadable(path, "stat")); \
        return REAL(name, path, found); \
    }
FINDS(stat, struct stat)
FINDS(lstat, struct stat)
FINDS(stat64, struct stat64)
FINDS(lstat64, struct stat64)
#define FINDS_AT(name, type) \
    typedef int (*name##_t)(int, const char *, type *, int); \
    int name(int folder, const char *path, type *found, int flags) { \
        FAIL_IF(unreadable(path, "stat")); \
        return REAL(name, folder, path, found, flags); \
    }
FINDS_AT(fstatat, struct stat)
FINDS_AT(fstatat64, struct stat64)
#define FINDS_OLD(name) /* what programs call that were linked with an older libc */ \
    typedef int (*name##_t)(int, const char *, void *); \
    int name(int version, const char *path, void *found) { \
        FAIL_IF(unreadable(path, "stat")); \
        return REAL(name, version, path, found); \
    }
FINDS_OLD(__xstat)
FINDS_OLD(__lxstat)
FINDS_OLD(__xstat64)
FINDS_OLD(__lxstat64)

#define OPENS(name, type, word, arguments, ...) \
    typedef type *(*name##_t)arguments; \
    type *name arguments { \
        int failed = unreadable(path, word); \
        errno = failed; \
        return failed ? NULL : REAL(name, __VA_ARGS__); \
    }
OPENS(opendir, DIR, "list", (const char *path), path)
OPENS(fopen, FILE, "open", (const char *path, const char *mode), path, mode)
OPENS(fopen64, FILE, "open", (const char *path, const char *mode), path, mode)

typedef int (*open_t)(const char *, int, ...);
typedef int (*open64_t)(const char *, int, ...);
typedef int (*openat_t)(int, const char *, int, ...);
#define BODY(real) \
    va_list list; \
    va_start(list, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0; \
    va_end(list); \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL_IF(sick(path, MAKES)); \
    else FAIL_IF(unreadable(path, flags & O_DIRECTORY ? "list" : "open")); \
    return real;
int open(const char *path, int flags, ...) { BODY(REAL(open, path, flags, mode)) }
int open64(const char *path, int flags, ...) { BODY(REAL(open64, path, flags, mode)) }
int openat(int folder, const char *path, int flags, ...) { BODY(REAL(openat, folder, path, flags, mode)) }
