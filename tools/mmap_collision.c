/*
 * Direct I/O into a file's pages while the file's layout changes: scenario S68, after the idea of xfstests' t_mmap_collision.
 *
 *     cc -Wall -pthread -I daxfs/include -o mmap_collision tools/mmap_collision.c
 *     mmap_collision FILE SOURCE            the target is an mmap of FILE
 *     mmap_collision FILE SOURCE IMAGE      the target are the blocks of FILE, pinned and mapped from the image
 *
 * Four loops, one second each: punch a hole, zero the range, truncate to nothing, and collapse (FUSE has none: truncate by open).
 * In each loop two threads read SOURCE into the target with O_DIRECT and then change the layout under each other's reads, while a
 * neighbour writes files of its own (FILE.neighbour-N) over and over, which get the blocks that become free, and reads them back.
 *
 * It ends with 1 at the first byte that is not the neighbour's in one of those files, at a byte in a pinned block that is
 * neither SOURCE's nor zero, and at an error that no race explains. Output: a line for each loop with the number of its rounds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "daxfs.h"

#define BLOCK 4096
#define LENGTH (4 * BLOCK)
#define NEIGHBOUR_FILES 8
#define NEIGHBOUR_BLOCKS_MAX 8
#define SOURCE_BYTE 0xa5
#define NEIGHBOUR_BYTE 0x5a

static const char *path;
static int source, image = -1;
static char *mapping;
static atomic_bool over;
static atomic_long rounds, neighbours;

static void fail(const char *what)
{
	fprintf(stderr, "mmap_collision: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* -- where the bytes go ------------------------------------------------------------------------------------------- */

struct target {
	struct daxfs_pin pin;
	char *at;
};

/* The file may be shorter than the range at this moment: then there is nothing to pin. */
static int pin(int file, struct target *t)
{
	struct daxfs_run_page runs = {0};
	char *at;

	t->pin = (struct daxfs_pin){.length = LENGTH, .flags = DAXFS_FOLL_PIN | DAXFS_FOLL_WRITE};
	if (ioctl(file, DAXFS_IOC_PIN, &t->pin) < 0) {
		if (errno == ENXIO)
			return 0;
		fail("PIN");
	}
	runs.page.key = t->pin.id;
	if (ioctl(file, DAXFS_IOC_PIN_RUNS, &runs) < 0)
		fail("PIN_RUNS");
	t->at = at = mmap(NULL, LENGTH, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (at == MAP_FAILED)
		fail("mmap");
	for (unsigned n = 0; n < runs.page.count; n++) {
		size_t size = runs.records[n].count * BLOCK;

		if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, image, runs.records[n].start_block * BLOCK) == MAP_FAILED)
			fail("mmap of a run");
		at += size;
	}
	return 1;
}

static void unpin(int file, struct target *t)
{
	struct daxfs_unpin unpin = {.id = t->pin.id, .flags = DAXFS_UNPIN_DIRTY};

	munmap(t->at, LENGTH);
	if (ioctl(file, DAXFS_IOC_UNPIN, &unpin) < 0)
		fail("UNPIN");
}

static void check(const char *at)
{
	for (int n = 0; n < LENGTH; n++) {
		unsigned char byte = at[n];

		if (byte != 0 && byte != SOURCE_BYTE) {
			fprintf(stderr, "mmap_collision: byte %d of the pinned blocks is %#x: somebody else wrote it\n", n, byte);
			exit(1);
		}
	}
}

/* Read the source to an address. Whether all of it came. */
static int read_source(char *to)
{
	ssize_t done = 0, got;

	while (done < LENGTH) {
		got = pread(source, to + done, LENGTH - done, done);
		if (got <= 0)
			return 0;
		done += got;
	}
	return 1;
}

/* `may_fail`: the loop makes the file short, so that a page beyond its end may be met. */
static void transfer(int file, int may_fail)
{
	struct target t;

	if (image < 0) {
		if (!read_source(mapping) && !may_fail)
			fail("read into the mapping");
		return;
	}
	if (!pin(file, &t)) {
		if (!may_fail)
			fail("PIN");
		return;
	}
	for (int n = 0; n < 8; n++) { /* long enough for the other thread to take the blocks away meanwhile */
		if (!read_source(t.at))
			fail("read into pinned blocks");
		usleep(400);
		check(t.at);
	}
	unpin(file, &t);
}

/* -- what changes the layout -------------------------------------------------------------------------------------- */

static void punch(int file)
{
	if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, LENGTH) < 0)
		fail("punch");
}

static void zero(int file)
{
	if (fallocate(file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 0, LENGTH) < 0)
		fail("zero range");
}

static void truncate_down(int file)
{
	if (ftruncate(file, 0) < 0 || fallocate(file, 0, 0, LENGTH) < 0)
		fail("truncate");
}

static void collapse(int file)
{
	int fd;

	if (fallocate(file, FALLOC_FL_COLLAPSE_RANGE, 0, BLOCK) < 0) {
		if (errno != EOPNOTSUPP && errno != EINVAL) /* EINVAL: the other thread has made it too short */
			fail("collapse");
		fd = open(path, O_WRONLY | O_TRUNC);
		if (fd < 0)
			fail("truncate by open");
		close(fd);
	}
	if (fallocate(file, 0, 0, LENGTH) < 0)
		fail("allocate");
}

static const struct loop {
	const char *name;
	void (*change)(int file);
	int may_fail;
} loops[] = {
	{"punch", punch, 0}, {"zero", zero, 0}, {"truncate", truncate_down, 1}, {"collapse", collapse, 1},
};

/* -- the threads -------------------------------------------------------------------------------------------------- */

static void *collide(void *argument)
{
	const struct loop *loop = argument;
	unsigned seed = (unsigned)(size_t)&seed;
	int file = open(path, O_RDWR); /* its own description: a layout change never waits for pins of the same one */

	if (file < 0)
		fail(path);
	while (!over) {
		transfer(file, loop->may_fail);
		loop->change(file);
		rounds++;
		usleep(rand_r(&seed) % 2000);
	}
	close(file);
	return NULL;
}

/* Files of random lengths, so that they get blocks from wherever some have become free. */
static void *neighbour(void *argument)
{
	static char data[NEIGHBOUR_BLOCKS_MAX * BLOCK];
	size_t lengths[NEIGHBOUR_FILES] = {0};
	unsigned seed = 1;
	int *files = argument;

	while (!over) {
		int which = rand_r(&seed) % NEIGHBOUR_FILES;

		if (pread(files[which], data, sizeof(data), 0) != (ssize_t)lengths[which])
			fail("read of the neighbour");
		for (size_t n = 0; n < lengths[which]; n++) {
			if (data[n] != NEIGHBOUR_BYTE) {
				fprintf(stderr, "mmap_collision: byte %zu of the neighbour is %#x\n", n, (unsigned char)data[n]);
				exit(1);
			}
		}
		lengths[which] = (1 + rand_r(&seed) % NEIGHBOUR_BLOCKS_MAX) * BLOCK;
		memset(data, NEIGHBOUR_BYTE, sizeof(data));
		if (ftruncate(files[which], 0) < 0 || pwrite(files[which], data, lengths[which], 0) != (ssize_t)lengths[which])
			fail("write of the neighbour");
		neighbours++;
	}
	return NULL;
}

static void run(int file, const struct loop *loop)
{
	pthread_t threads[3];
	int files[NEIGHBOUR_FILES];
	char name[4096];

	over = 0;
	rounds = neighbours = 0;
	if (ftruncate(file, 0) < 0 || fallocate(file, 0, 0, LENGTH) < 0)
		fail("begin");
	for (int n = 0; n < NEIGHBOUR_FILES; n++) {
		snprintf(name, sizeof(name), "%s.neighbour-%d", path, n);
		if ((files[n] = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600)) < 0)
			fail(name);
	}
	for (int n = 0; n < 3; n++)
		if ((errno = pthread_create(&threads[n], NULL, n < 2 ? collide : neighbour, n < 2 ? (void *)loop : files)))
			fail("pthread_create");
	sleep(1);
	over = 1;
	for (int n = 0; n < 3; n++)
		pthread_join(threads[n], NULL);
	for (int n = 0; n < NEIGHBOUR_FILES; n++)
		close(files[n]);
	printf("%s %ld %ld\n", loop->name, rounds, neighbours);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	char data[LENGTH];
	int file;

	if (argc < 3 || argc > 4) {
		fprintf(stderr, "usage: mmap_collision FILE SOURCE [IMAGE]\n");
		return 2;
	}
	path = argv[1];
	if ((file = open(path, O_RDWR | O_CREAT, 0600)) < 0)
		fail(path);
	memset(data, SOURCE_BYTE, sizeof(data));
	if ((source = open(argv[2], O_RDWR | O_CREAT, 0600)) < 0 || write(source, data, sizeof(data)) != sizeof(data) || close(source) < 0)
		fail(argv[2]);
	if ((source = open(argv[2], O_RDONLY | O_DIRECT)) < 0)
		fail(argv[2]);
	if (argc == 4 && (image = open(argv[3], O_RDWR)) < 0)
		fail(argv[3]);
	if (image < 0 && (mapping = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)) == MAP_FAILED)
		fail("mmap");
	for (size_t n = 0; n < sizeof(loops) / sizeof(*loops); n++)
		run(file, &loops[n]);
	return 0;
}
