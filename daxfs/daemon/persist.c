#include "persist.h"

#include <stdint.h>
#include <string.h>

#ifdef __x86_64__

#include <cpuid.h>
#include <emmintrin.h>

#define LINE 64

static void flush_clflush(const char *at, const char *end)
{
    for (; at < end; at += LINE)
        _mm_clflush(at);
}

/* By their bytes: not every assembler and compiler option knows them. Both are a prefix before an older instruction. */
static void flush_clflushopt(const char *at, const char *end)
{
    for (; at < end; at += LINE)
        __asm__ volatile(".byte 0x66; clflush %0" : : "m"(*at) : "memory");
}

static void flush_clwb(const char *at, const char *end)
{
    for (; at < end; at += LINE)
        __asm__ volatile(".byte 0x66; xsaveopt %0" : : "m"(*at) : "memory");
}

static void flush_first(const char *at, const char *end);
static void (*flush_lines)(const char *at, const char *end) = flush_first;

/* Looks at the CPU, once. */
static void flush_first(const char *at, const char *end)
{
    unsigned a, b = 0, c, d;

    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    flush_lines = b & 1u << 24 ? flush_clwb : b & 1u << 23 ? flush_clflushopt : flush_clflush;
    flush_lines(at, end);
}

void dx_flush(const void *at, size_t n)
{
    const char *first = (const char *)((uintptr_t)at & -(uintptr_t)LINE);

    if (n)
        flush_lines(first, (const char *)at + n);
}

static void store_part(char *to, const char *from, size_t n)
{
    memcpy(to, from, n);
    dx_flush(to, n);
}

void dx_store(void *target, const void *source, size_t n)
{
    char *to = target;
    const char *from = source;
    size_t head = -(uintptr_t)to & (LINE - 1);

    if (head > n)
        head = n;
    if (head) {
        store_part(to, from, head);
        to += head;
        from += head;
        n -= head;
    }
    for (; n >= LINE; n -= LINE, to += LINE, from += LINE) {
        __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)from + 1);
        __m128i c = _mm_loadu_si128((const __m128i *)from + 2), d = _mm_loadu_si128((const __m128i *)from + 3);

        _mm_stream_si128((__m128i *)to, a);
        _mm_stream_si128((__m128i *)to + 1, b);
        _mm_stream_si128((__m128i *)to + 2, c);
        _mm_stream_si128((__m128i *)to + 3, d);
    }
    if (n)
        store_part(to, from, n);
}

void dx_fence(void)
{
    _mm_sfence();
}

#else

void dx_store(void *to, const void *from, size_t n)
{
    memcpy(to, from, n);
}

void dx_flush(const void *at, size_t n)
{
    (void)at;
    (void)n;
}

void dx_fence(void)
{
    __sync_synchronize();
}

#endif
