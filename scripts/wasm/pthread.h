/* pthread.h - as much of it as lfm2.c needs, for WebAssembly with shared memory.
 *
 * The page starts its workers beforehand, and each waits in page_thread() of
 * scripts/page.c for pthread_create() to give it something to do. */
#ifndef PTHREAD_H
#define PTHREAD_H

#define __NEED_pthread_t
#define __NEED_pthread_mutex_t
#define __NEED_pthread_cond_t
#include <bits/alltypes.h>

#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

enum { MAX_WORKERS = 64 };
enum { WORKER_ABSENT, WORKER_READY, WORKER_BUSY };

struct page_worker { atomic_int state; void *(*run)(void *); void *arg; };

extern struct page_worker page_worker[MAX_WORKERS];
extern int page_cpus;

#define sysconf(name) page_cpus           /* _SC_NPROCESSORS_ONLN            */

/* Sleep while *what is `value`; or wake all who do. */
#define PAGE_WAIT(what, value) \
    __builtin_wasm_memory_atomic_wait32((int *)(what), value, -1)
#define PAGE_WAKE(what) \
    __builtin_wasm_memory_atomic_notify((int *)(what), MAX_WORKERS)

static inline int pthread_create(pthread_t *t, const void *attributes,
                                 void *(*run)(void *), void *arg)
{
    (void)attributes;
    for (struct page_worker *w = page_worker; w < page_worker + MAX_WORKERS;
         w++)
        if (atomic_load(&w->state) == WORKER_READY) {
            *t = (pthread_t)(void *)w;
            w->run = run;
            w->arg = arg;
            atomic_store(&w->state, WORKER_BUSY);
            PAGE_WAKE(&w->state);
            return 0;
        }
    return -1;
}

static inline int pthread_join(pthread_t t, void **result)
{
    struct page_worker *w = (void *)t;

    (void)result;
    while (atomic_load(&w->state) == WORKER_BUSY)
        PAGE_WAIT(&w->state, WORKER_BUSY);
    return 0;
}

/* Of a mutex or a condition only its first number is used: whether it is
 * locked, and how often it has changed. */
#define PAGE_NUMBER(object) ((atomic_int *)(void *)(object))

static inline int pthread_mutex_lock(pthread_mutex_t *m)
{
    while (atomic_exchange(PAGE_NUMBER(m), 1))
        PAGE_WAIT(m, 1);
    return 0;
}

static inline int pthread_mutex_unlock(pthread_mutex_t *m)
{
    atomic_store(PAGE_NUMBER(m), 0);
    PAGE_WAKE(m);
    return 0;
}

static inline int pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *m)
{
    const int before = atomic_load(PAGE_NUMBER(c));

    pthread_mutex_unlock(m);
    PAGE_WAIT(c, before);
    return pthread_mutex_lock(m);
}

static inline int pthread_cond_broadcast(pthread_cond_t *c)
{
    atomic_fetch_add(PAGE_NUMBER(c), 1);
    PAGE_WAKE(c);
    return 0;
}

#define pthread_mutex_init(m, attributes) atomic_store(PAGE_NUMBER(m), 0)
#define pthread_cond_init(c, attributes)  atomic_store(PAGE_NUMBER(c), 0)
#define pthread_mutex_destroy(m)          ((void)(m))
#define pthread_cond_destroy(c)           ((void)(c))

#endif
