/* A shared file system that is slow, and says ESTALE once: LD_PRELOAD of this before the processes of a job.
 *
 * SLOW_DIR   every open and stat below it takes SLOW_MICROSECONDS
 * STALE_DIR  holds empty files; one of the same name as a file that is read or looked at is taken away, and the call
 *            fails with ESTALE
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int is_stale(const char *path) {
    const char *slow = getenv("SLOW_DIR"), *stale = getenv("STALE_DIR"), *name;
    char token[PATH_MAX];
    if (!path || !slow || strncmp(path, slow, strlen(slow)))
        return 0;
    if (getenv("SLOW_MICROSECONDS"))
        usleep(atoi(getenv("SLOW_MICROSECONDS")));
    if (!stale || !(name = strrchr(path, '/')) || !name[1])
        return 0;
    snprintf(token, sizeof token, "%s%s", stale, name);
    if (unlink(token))
        return 0;
    errno = ESTALE;
    return 1;
}

#define OPEN(NAME)                                                                                                     \
    int NAME(const char *path, int flags, ...) {                                                                       \
        static int (*real)(const char *, int, ...);                                                                    \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = va_arg(more, mode_t);                                                                            \
        va_end(more);                                                                                                  \
        if (!real)                                                                                                     \
            real = dlsym(RTLD_NEXT, #NAME);                                                                            \
        return !(flags & O_CREAT) && is_stale(path) ? -1 : real(path, flags, mode);                                                          \
    }
#define STAT(NAME, KIND)                                                                                               \
    int NAME(const char *restrict path, struct KIND *restrict found) {                                                 \
        static int (*real)(const char *, struct KIND *);                                                               \
        if (!real)                                                                                                     \
            real = dlsym(RTLD_NEXT, #NAME);                                                                            \
        return is_stale(path) ? -1 : real(path, found);                                                                \
    }

OPEN(open)
OPEN(open64)
STAT(stat, stat)
STAT(stat64, stat64)
