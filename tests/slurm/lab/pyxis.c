// A stand-in for the pyxis plugin: the same options, and mounts that are really bound, in a mount namespace of the task.
// The image is a text file: `hide PATH` = a path the container does not have, `env NAME=VALUE` = what its image sets.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(pyxis, 1)

enum { IMAGE, MOUNTS, WORKDIR, NAME, WRITABLE, REMAP, NO_HOME, HOME, COUNT };
static char *given[COUNT];

static int take(int which, const char *argument, int remote) {
    (void)remote;
    given[which] = strdup(argument ? argument : "1");
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "image file", 1, IMAGE, take},
    {"container-mounts", "SRC:DST[:FLAGS],...", "bind mounts", 1, MOUNTS, take},
    {"container-workdir", "PATH", "working directory", 1, WORKDIR, take},
    {"container-name", "NAME", "name of the filesystem", 1, NAME, take},
    {"container-writable", NULL, "writable filesystem", 0, WRITABLE, take},
    {"container-remap-root", NULL, "be root inside", 0, REMAP, take},
    {"no-container-mount-home", NULL, "without the home directory", 0, NO_HOME, take},
    {"container-mount-home", NULL, "with the home directory", 0, HOME, take},
    SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int count, char **arguments) {
    (void)count, (void)arguments;
    for (int i = 0; options[i].name; i++)
        if (spank_option_register(spank, &options[i]) != ESPANK_SUCCESS) return -1;
    return 0;
}

static int fail(const char *what, const char *path) {
    slurm_error("pyxis: %s %s: %s", what, path, strerror(errno));
    return -1;
}

static void make_directories(const char *path) {
    char *copy = strdup(path);
    for (char *at = copy + 1; (at = strchr(at, '/')); *at++ = '/') *at = 0, mkdir(copy, 0755);
    mkdir(copy, 0755);
    free(copy);
}

static int apply_image(spank_t spank, FILE *image) {
    char line[4096];
    while (fgets(line, sizeof line, image)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "hide ", 5) && access(line + 5, F_OK) == 0 && mount("none", line + 5, "tmpfs", 0, NULL))
            return fail("cannot hide", line + 5);
        char *value = strchr(line, '=');
        if (!strncmp(line, "env ", 4) && value) {
            *value = 0;
            spank_setenv(spank, line + 4, value + 1, 1);
        }
    }
    return 0;
}

struct binding {
    char *target, *flags;
    int source;
};

static int read_mounts(struct binding *mounts, int most) {
    int count = 0;
    char *list = given[MOUNTS], *entry;
    while (list && count < most && (entry = strsep(&list, ","))) {
        char *source = strsep(&entry, ":");
        mounts[count].target = entry ? strsep(&entry, ":") : source;
        mounts[count].flags = entry ? entry : "";
        mounts[count].source = open_tree(AT_FDCWD, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE);
        if (mounts[count++].source < 0) return fail("cannot open mount source", source);
    }
    return count;
}

static int bind(const struct binding *binding) {
    struct stat status;
    if (fstat(binding->source, &status) == 0 && S_ISDIR(status.st_mode)) make_directories(binding->target);
    if (move_mount(binding->source, "", AT_FDCWD, binding->target, MOVE_MOUNT_F_EMPTY_PATH)) return fail("cannot mount on", binding->target);
    if (!strcmp(binding->flags, "ro") && mount(NULL, binding->target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
        return fail("cannot make read-only", binding->target);
    return 0;
}

int slurm_spank_task_init_privileged(spank_t spank, int argc, char **arguments) {
    (void)argc, (void)arguments;
    if (!given[IMAGE]) return 0;
    FILE *image = fopen(given[IMAGE], "r");
    if (!image) return fail("cannot open image", given[IMAGE]);
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) return fail("cannot unshare", "/");
    // Sources are taken before anything is hidden, as the real one binds from outside the container.
    struct binding mounts[64];
    int count = read_mounts(mounts, 64);
    if (count < 0 || apply_image(spank, image)) return -1;
    for (int i = 0; i < count; i++)
        if (bind(&mounts[i])) return -1;
    return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments) {
    (void)spank, (void)count, (void)arguments;
    if (given[WORKDIR] && chdir(given[WORKDIR])) return fail("working directory", given[WORKDIR]);
    return 0;
}
