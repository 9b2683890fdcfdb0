/* Copies that leave the processor's cache alone: what is staged or loaded is not read again soon.

   A plain store first reads the line that it overwrites; a non-temporal one does not, which saves a third of the memory
   traffic. One page after the other would keep few of the memory's banks busy, so four are copied side by side. libc's
   memmove does both, but only for blocks above three quarters of the shared cache: 100 MB and more on servers, where a
   tensor has 3.

   Plain C without Python's headers; ckpt/native.py calls it through ctypes, which releases Python's lock. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum { LINE = 64, FOUR_LINES = 4 * LINE, PAGE = 4096, FOUR_PAGES = 4 * PAGE };

/* Copies 256 bytes; `target` lies at the start of a line. */
typedef void copy_lines(char *target, const char *source);

static inline __attribute__((always_inline)) void copy_lines_sse2(char *target, const char *source) {
    for (int at = 0; at < FOUR_LINES; at += LINE)
        _mm_prefetch(source + FOUR_LINES + at, _MM_HINT_T0);
    for (int at = 0; at < FOUR_LINES; at += 16)
        _mm_stream_si128((__m128i *)(target + at), _mm_loadu_si128((const __m128i *)(source + at)));
}

static inline __attribute__((always_inline, target("avx512f"))) void copy_lines_avx512(char *target,
                                                                                      const char *source) {
    for (int at = 0; at < FOUR_LINES; at += LINE)
        _mm512_stream_si512((__m512i *)(target + at), _mm512_loadu_si512(source + at));
}

static inline __attribute__((always_inline)) void copy_pages(char *target, const char *source, size_t size,
                                                             copy_lines *copy) {
    size_t lead = -(uintptr_t)target & (LINE - 1);
    memcpy(target, source, lead);
    target += lead, source += lead, size -= lead;
    for (; size >= FOUR_PAGES; target += FOUR_PAGES, source += FOUR_PAGES, size -= FOUR_PAGES)
        for (int at = 0; at < PAGE; at += FOUR_LINES)
            for (int page = 0; page < FOUR_PAGES; page += PAGE)
                copy(target + page + at, source + page + at);
    memcpy(target, source, size);
    _mm_sfence(); /* what was stored becomes visible in any order, but before what follows */
}

static void copy_pages_sse2(char *target, const char *source, size_t size) {
    copy_pages(target, source, size, copy_lines_sse2);
}

static __attribute__((target("avx512f"))) void copy_pages_avx512(char *target, const char *source, size_t size) {
    copy_pages(target, source, size, copy_lines_avx512);
}

static void copy_block(char *target, const char *source, size_t size) {
    if (size < 2 * FOUR_PAGES)
        memcpy(target, source, size);
    else if (__builtin_cpu_supports("avx512f"))
        copy_pages_avx512(target, source, size);
    else
        copy_pages_sse2(target, source, size);
}
#else
static void copy_block(char *target, const char *source, size_t size) { memcpy(target, source, size); }
#endif

/* Copy `size` bytes; the blocks must not overlap. */
void ckpt_copy(char *target, const char *source, size_t size) { copy_block(target, source, size); }

/* Copy `count` blocks from anywhere to base + at[i], in ascending order; tell in `staged`, about every `often` bytes,
   up to which position everything is there. */
void ckpt_stage(char *base, int64_t count, const int64_t *at, const uint64_t *sources, const int64_t *sizes,
                uint64_t *staged, int64_t often) {
    int64_t told = count ? at[0] : 0;
    for (int64_t i = 0; i < count; i++) {
        copy_block(base + at[i], (const char *)(uintptr_t)sources[i], (size_t)sizes[i]);
        if (at[i] + sizes[i] - told >= often) {
            told = at[i] + sizes[i];
            __atomic_store_n(staged, (uint64_t)told, __ATOMIC_RELEASE);
        }
    }
}
