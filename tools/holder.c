/*
 * A holder in C: pins a range of a file, maps its blocks from the image, and does what it is told until its input ends.
 *
 *     cc -Wall -I daxfs/include -o holder tools/holder.c
 *     holder [-r] [-d] IMAGE FILE OFFSET LENGTH          (-r: a read pin, -d: register on demand)
 *
 * Input, a line each:   store AT TEXT   load AT COUNT   ack   unpin [dirty]   fork
 * Output, a line each:  pinned ID RUNS BLOCKS   loaded TEXT   event TYPE PIN OFFSET LENGTH   acked   unpinned   forked
 * Mappings are this process's business: it unmaps before it unpins, since the blocks may be somebody else's right after.
 * The pin is not: it is shared by all processes that have the descriptor, and given back by the one that took it. `fork` has
 * a child that lets go of its copies and ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include "daxfs.h"

struct holder {
	int fd;
	pid_t maker; /* the process that took the pin */
	struct daxfs_pin pin;
	char *blocks; /* the pinned blocks, one after the other; NULL when they are not mapped */
};

static void fail(const char *what)
{
	fprintf(stderr, "holder: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int retried_ioctl(int fd, unsigned long number, void *argument)
{
	int result;

	do {
		result = ioctl(fd, number, argument);
	} while (result < 0 && errno == EINTR);
	return result;
}

/* Map each run of the pin over its part of a reservation. */
static char *map_blocks(const struct holder *h, const char *image, int protection)
{
	struct daxfs_run_page answer;
	struct statvfs volume;
	char *start, *at;
	uint64_t known = 0;
	int fd;

	fd = open(image, (protection & PROT_WRITE ? O_RDWR : O_RDONLY) | O_CLOEXEC);
	if (fd < 0)
		fail(image);
	if (fstatvfs(h->fd, &volume) < 0)
		fail("statvfs");
	start = at = mmap(NULL, h->pin.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (start == MAP_FAILED)
		fail("mmap");
	while (known < h->pin.runs) {
		memset(&answer, 0, sizeof(answer));
		answer.page.key = h->pin.id;
		answer.page.first = known;
		if (retried_ioctl(h->fd, DAXFS_IOC_PIN_RUNS, &answer) < 0)
			fail("PIN_RUNS");
		if (answer.page.count == 0) {
			errno = EPROTO;
			fail("PIN_RUNS");
		}
		for (uint32_t n = 0; n < answer.page.count; n++) {
			const struct daxfs_run *run = &answer.records[n];
			size_t size = run->count * volume.f_bsize;

			if (mmap(at, size, protection, MAP_SHARED | MAP_FIXED, fd, run->start_block * volume.f_bsize) == MAP_FAILED)
				fail("mmap of a run");
			at += size;
		}
		known += answer.page.count;
	}
	close(fd);
	return start;
}

static void unmap(struct holder *h)
{
	if (h->blocks != NULL)
		munmap(h->blocks, h->pin.length);
	h->blocks = NULL;
}

/* Through with the pin. A forked child gives up its copies of mapping and descriptor, and the pin stays with its parent. */
static void let_go(struct holder *h, uint32_t flags)
{
	struct daxfs_unpin unpin = {.id = h->pin.id, .flags = flags};

	unmap(h);
	if (getpid() != h->maker)
		close(h->fd);
	else if (retried_ioctl(h->fd, DAXFS_IOC_UNPIN, &unpin) < 0)
		fail("UNPIN");
}

static void print_event(struct holder *h)
{
	struct daxfs_event event = {0};

	if (retried_ioctl(h->fd, DAXFS_IOC_NEXT_EVENT, &event) < 0) {
		if (errno != EAGAIN)
			fail("NEXT_EVENT");
		return;
	}
	printf("event %" PRIu32 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", event.type, event.pin_id, event.offset, event.length);
}

static void obey(struct holder *h, char *line)
{
	unsigned long long at, count;
	int text;

	line[strcspn(line, "\n")] = '\0';
	if (sscanf(line, "store %llu %n", &at, &text) == 1) {
		if (h->blocks == NULL || at + strlen(line + text) > h->pin.length) {
			errno = EFAULT;
			fail(line);
		}
		memcpy(h->blocks + at, line + text, strlen(line + text));
	} else if (sscanf(line, "load %llu %llu", &at, &count) == 2) {
		if (h->blocks == NULL || at > h->pin.length || count > h->pin.length - at) {
			errno = EFAULT;
			fail(line);
		}
		printf("loaded %.*s\n", (int)count, h->blocks + at);
	} else if (strcmp(line, "ack") == 0) {
		struct daxfs_ack ack = {.id = h->pin.id};

		unmap(h);
		if (retried_ioctl(h->fd, DAXFS_IOC_ACK, &ack) < 0)
			fail("ACK");
		printf("acked\n");
	} else if (strncmp(line, "unpin", 5) == 0) {
		let_go(h, strcmp(line, "unpin dirty") == 0 ? DAXFS_UNPIN_DIRTY : 0);
		printf("unpinned\n");
	} else if (strcmp(line, "fork") == 0) {
		pid_t child = fork();

		if (child == 0) {
			let_go(h, 0);
			exit(0);
		}
		if (child < 0 || waitpid(child, NULL, 0) < 0)
			fail("fork");
		printf("forked\n");
	} else {
		errno = EINVAL;
		fail(line);
	}
}

static void serve(struct holder *h)
{
	struct pollfd ready[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = h->fd, .events = POLLPRI}};
	char line[8192];

	setvbuf(stdin, NULL, _IONBF, 0); /* poll(2) knows nothing of what stdio has read ahead */
	for (;;) {
		if (poll(ready, 2, -1) < 0) {
			if (errno != EINTR)
				fail("poll");
			continue;
		}
		if (ready[1].revents & POLLPRI)
			print_event(h);
		if (ready[0].revents) {
			if (fgets(line, sizeof(line), stdin) == NULL)
				return;
			obey(h, line);
		}
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	uint32_t kind = DAXFS_FOLL_PIN, access = DAXFS_FOLL_WRITE;
	struct holder h = {0};
	int option;

	while ((option = getopt(argc, argv, "rd")) != -1) {
		if (option == 'r')
			access = 0;
		else if (option == 'd')
			kind = DAXFS_PIN_ON_DEMAND;
		else
			return 2;
	}
	if (argc - optind != 4) {
		fprintf(stderr, "usage: holder [-r] [-d] IMAGE FILE OFFSET LENGTH\n");
		return 2;
	}
	h.maker = getpid();
	h.fd = open(argv[optind + 1], (access ? O_RDWR : O_RDONLY) | O_CLOEXEC | DAXFS_O_PIN);
	if (h.fd < 0)
		fail(argv[optind + 1]);
	h.pin.offset = strtoull(argv[optind + 2], NULL, 0);
	h.pin.length = strtoull(argv[optind + 3], NULL, 0);
	h.pin.flags = kind | access;
	if (retried_ioctl(h.fd, DAXFS_IOC_PIN, &h.pin) < 0)
		fail("PIN");
	h.blocks = map_blocks(&h, argv[optind], PROT_READ | (access ? PROT_WRITE : 0));
	printf("pinned %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", h.pin.id, h.pin.runs, h.pin.blocks);
	fflush(stdout);
	serve(&h);
	return 0; /* the last close releases what is still pinned */
}
