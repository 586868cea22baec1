/* A disk that is sick on command: a library to preload, between a program and libc.

   cc -shared -fPIC -o sick_disk.so sick_disk.c -ldl
   SICK_CONTROL=FILE LD_PRELOAD=./sick_disk.so python main.py ...

   While FILE says "28 checkpoints/4", whatever would write to a path with "checkpoints/4" in it fails with errno 28, no
   space; 30 is a read-only file system and 5 an I/O error. "0 TEXT" makes it slow. While FILE is empty all is well. */
#define _GNU_SOURCE
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

/* The errno with which this is to fail, or 0. */
static int sick(const char *path, int what) {
    const char *control = getenv("SICK_CONTROL");
    char text[512];
    if (!control || !path) return 0;
    int fd = syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t size = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    if (size <= 0) return 0;
    text[size] = 0;
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

static int sick_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return sick(path, WRITES);
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

typedef int (*open_t)(const char *, int, ...);
typedef int (*open64_t)(const char *, int, ...);
typedef int (*openat_t)(int, const char *, int, ...);
#define BODY(real) \
    va_list list; \
    va_start(list, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(list, mode_t) : 0; \
    va_end(list); \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL_IF(sick(path, MAKES)); \
    return real;
int open(const char *path, int flags, ...) { BODY(REAL(open, path, flags, mode)) }
int open64(const char *path, int flags, ...) { BODY(REAL(open64, path, flags, mode)) }
int openat(int folder, const char *path, int flags, ...) { BODY(REAL(openat, folder, path, flags, mode)) }
