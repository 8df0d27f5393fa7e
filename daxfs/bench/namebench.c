/* Calls on names, one process, one after the other: how many of each a directory takes per second.

   namebench names DIRECTORY FILES SERVER   makes FILES files, uses them in every way that has a row, removes them
   namebench list DIRECTORY SERVER          reads the directory, one stat for each entry
   namebench fill DIRECTORY FILES           makes the files of a directory that is to be listed

   One line per row: its name, calls, nanoseconds, nanoseconds of CPU that the process SERVER used meanwhile (0: none). In C,
   because a loop in Python would be most of what it measures. A failing call ends it: one line on stderr, exit code 1. */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NAME_BYTES 24
#define BLOCK 4096
#define REPEATED_NS 50000000LL /* a row of very short calls goes over the files again until then */

static const char *doing;
static clockid_t server_clock;
static int has_server, files;
static char (*names)[NAME_BYTES], (*renamed)[NAME_BYTES];
static char block[BLOCK];

static void check(int ok)
{
    if (ok)
        return;
    fprintf(stderr, "%s: %s\n", doing, strerror(errno));
    exit(1);
}

static int64_t now(clockid_t clock)
{
    struct timespec time;

    check(!clock_gettime(clock, &time));
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int64_t began, server_began;

static void begin(const char *name)
{
    doing = name;
    server_began = has_server ? now(server_clock) : 0;
    began = now(CLOCK_MONOTONIC);
}

static void end(long calls)
{
    int64_t took = now(CLOCK_MONOTONIC) - began, served = has_server ? now(server_clock) - server_began : 0;

    printf("%s\t%ld\t%lld\t%lld\n", doing, calls, (long long)took, (long long)served);
}

static int opened(const char *name, int flags)
{
    int fd = open(name, flags | O_CLOEXEC, 0644);

    check(fd >= 0);
    return fd;
}

static void create(void)
{
    for (int i = 0; i < files; i++)
        check(!close(opened(names[i], O_CREAT | O_EXCL | O_WRONLY)));
}

static void stat_repeated(void)
{
    struct stat stat;
    long calls = 0;

    begin("stat, repeated");
    do {
        for (int i = 0; i < files; i++)
            check(!fstatat(AT_FDCWD, names[i], &stat, 0));
        calls += files;
    } while (now(CLOCK_MONOTONIC) - began < REPEATED_NS);
    end(calls);
}

static void stat_served(void)
{
    struct statx stat;

    begin("stat, asked of the server");
    for (int i = 0; i < files; i++)
        check(!statx(AT_FDCWD, names[i], AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &stat));
    end(files);
}

static void open_write_close(void)
{
    begin("open+write 4k+close");
    for (int i = 0; i < files; i++) {
        int fd = opened(names[i], O_WRONLY);

        check(write(fd, block, BLOCK) == BLOCK);
        check(!close(fd));
    }
    end(files);
}

static void open_read_close(void)
{
    begin("open+read 4k+close");
    for (int i = 0; i < files; i++) {
        int fd = opened(names[i], O_RDONLY);

        check(read(fd, block, BLOCK) == BLOCK);
        check(!close(fd));
    }
    end(files);
}

static void rename_all(void)
{
    begin("rename");
    for (int i = 0; i < files; i++)
        check(!rename(names[i], renamed[i]));
    end(files);
}

static void truncate_all(void)
{
    begin("truncate");
    for (int i = 0; i < files; i++)
        check(!truncate(renamed[i], 0));
    end(files);
}

static void unlink_all(void)
{
    begin("unlink");
    for (int i = 0; i < files; i++)
        check(!unlink(renamed[i]));
    end(files);
}

static void mkdir_rmdir(void)
{
    begin("mkdir+rmdir");
    for (int i = 0; i < files; i++) {
        check(!mkdir(names[i], 0755));
        check(!rmdir(names[i]));
    }
    end(files);
}

static void list(void)
{
    struct dirent *entry;
    struct stat stat;
    long calls = 0;
    DIR *directory;

    begin("list");
    directory = opendir(".");
    check(directory != NULL);
    while ((errno = 0, entry = readdir(directory))) {
        check(!fstatat(dirfd(directory), entry->d_name, &stat, AT_SYMLINK_NOFOLLOW));
        calls++;
    }
    check(!errno);
    check(!closedir(directory));
    end(calls);
}

int main(int argc, char **argv)
{
    int filling = argc == 4 && !strcmp(argv[1], "fill"), naming = argc == 5 && !strcmp(argv[1], "names");
    long server;

    if (!filling && !naming && !(argc == 4 && !strcmp(argv[1], "list"))) {
        fputs("usage: namebench names|list|fill DIRECTORY ...\n", stderr);
        return 2;
    }
    doing = argv[2];
    check(!chdir(argv[2]));
    server = filling ? 0 : atol(argv[argc - 1]);
    has_server = server > 0;
    server_clock = (~(clockid_t)server << 3) | 2; /* what clock_getcpuclockid(3) gives: all its threads, in ns */
    files = filling || naming ? atoi(argv[3]) : 0;
    names = calloc(files + 1, sizeof *names);
    renamed = calloc(files + 1, sizeof *renamed);
    check(names && renamed);
    for (int i = 0; i < files; i++) {
        snprintf(names[i], NAME_BYTES, "file-%06d", i);
        snprintf(renamed[i], NAME_BYTES, "renamed-%06d", i);
    }
    if (filling) {
        create();
    } else if (naming) {
        begin("create");
        create();
        end(files);
        stat_repeated();
        stat_served();
        open_write_close();
        open_read_close();
        rename_all();
        truncate_all();
        unlink_all();
        mkdir_rmdir();
    } else {
        list();
    }
    return 0;
}
