#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "spare.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

static size_t wanted; /* bytes; 0: nothing is ever kept */
static _Atomic(void *) kept;
static PyMemAllocatorEx raw;
static PyObjectArenaAllocator arenas;

static void *space(void)
{
    void *memory = mmap(NULL, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return memory == MAP_FAILED ? NULL : memory;
}

int dx_spare_gone(void)
{
    return wanted && !atomic_load_explicit(&kept, memory_order_relaxed);
}

int dx_spare_give(size_t size)
{
    void *memory = size < wanted ? atomic_exchange(&kept, NULL) : NULL;

    return memory && munmap(memory, wanted) == 0;
}

int dx_spare_regain(void)
{
    if (dx_spare_gone())
        atomic_store(&kept, space());
    return !dx_spare_gone();
}

void dx_spare_complain(void)
{
    static const char line[] = "ERROR daxfs: out of memory: what happened could not be logged\n";
    ssize_t written = write(2, line, sizeof(line) - 1);

    (void)written;
}

/* -- in front of Python's allocators ----------------------------------------------------------------------------------- */

static void *raw_malloc(void *context, size_t size)
{
    void *memory = raw.malloc(context, size);

    return memory || !dx_spare_give(size) ? memory : raw.malloc(context, size);
}

static void *raw_calloc(void *context, size_t count, size_t size)
{
    void *memory = raw.calloc(context, count, size);

    return memory || !dx_spare_give(count * size) ? memory : raw.calloc(context, count, size);
}

static void *raw_realloc(void *context, void *old, size_t size)
{
    void *memory = raw.realloc(context, old, size);

    return memory || !dx_spare_give(size) ? memory : raw.realloc(context, old, size);
}

static void *arena(void *context, size_t size)
{
    void *memory = arenas.alloc(context, size);

    return memory || !dx_spare_give(size) ? memory : arenas.alloc(context, size);
}

int dx_spare_keep(size_t size)
{
    PyMemAllocatorEx first;
    PyObjectArenaAllocator first_arena;

    if (wanted)
        return -EBUSY;
    wanted = size;
    atomic_store(&kept, space());
    if (!atomic_load(&kept)) {
        wanted = 0;
        return -ENOMEM;
    }
    PyMem_GetAllocator(PYMEM_DOMAIN_RAW, &raw);
    first = (PyMemAllocatorEx){raw.ctx, raw_malloc, raw_calloc, raw_realloc, raw.free};
    PyMem_SetAllocator(PYMEM_DOMAIN_RAW, &first);
    PyObject_GetArenaAllocator(&arenas);
    first_arena = (PyObjectArenaAllocator){arenas.ctx, arena, arenas.free};
    PyObject_SetArenaAllocator(&first_arena);
    return 0;
}
