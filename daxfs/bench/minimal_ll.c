/* A minimal file system in memory on libfuse's low-level API: what a plain single-threaded C server costs.

   Textbook code: one thread in fuse_session_loop, one buffer for each file, one table of names, answers through
   fuse_reply_buf. Files are opened with direct_io, as those of daxfs are; the kernel may keep names and attributes.

   Not here: links, symlinks, xattrs, holes, locks, anything that survives the process.
   Build: cc -O2 -o minimal_ll minimal_ll.c $(pkg-config --cflags --libs fuse3)
   Run: minimal_ll MOUNTPOINT (in the foreground; ends on SIGTERM and on unmount) */

#define FUSE_USE_VERSION 35

#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_S 3600.0 /* one process owns all names: the kernel may keep what it learnt */

struct node {
    struct stat stat;
    uint64_t lookups; /* that the kernel has not forgotten */
    char *data;
    size_t room;
    struct node *parent, *next; /* of its bucket */
    char *name;
    size_t slot; /* in its parent */
    struct node **entries; /* of a directory, in the order of their making; NULL where one was removed */
    size_t slots, slots_room, children;
};

static struct node root;
static struct node **buckets;
static size_t bucket_count, name_count;
static ino_t last_ino = FUSE_ROOT_ID;

static struct node *node_of(fuse_ino_t ino)
{
    return ino == FUSE_ROOT_ID ? &root : (struct node *)(uintptr_t)ino;
}

static void *must(void *memory)
{
    if (!memory) {
        fputs("minimal_ll: out of memory\n", stderr);
        abort();
    }
    return memory;
}

/* Names */

static struct node **bucket_of(const struct node *parent, const char *name)
{
    uint64_t hash = 14695981039346656037u ^ parent->stat.st_ino;

    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 1099511628211u;
    return &buckets[hash & (bucket_count - 1)];
}

static struct node **find(const struct node *parent, const char *name)
{
    struct node **at = bucket_of(parent, name);

    while (*at && ((*at)->parent != parent || strcmp((*at)->name, name)))
        at = &(*at)->next;
    return at;
}

static void grow_table(void)
{
    struct node **old = buckets, *node, *next;
    size_t count = bucket_count, i;

    bucket_count = count ? 2 * count : 1024;
    buckets = must(calloc(bucket_count, sizeof *buckets));
    for (i = 0; i < count; i++)
        for (node = old[i]; node; node = next) {
            struct node **at = bucket_of(node->parent, node->name);

            next = node->next;
            node->next = *at;
            *at = node;
        }
    free(old);
}

static void enter(struct node *parent, const char *name, struct node *node)
{
    struct node **at;

    if (name_count >= bucket_count)
        grow_table();
    node->parent = parent;
    node->name = must(strdup(name));
    at = bucket_of(parent, name);
    node->next = *at;
    *at = node;
    name_count++;
    if (parent->slots == parent->slots_room) {
        parent->slots_room = parent->slots_room ? 2 * parent->slots_room : 16;
        parent->entries = must(realloc(parent->entries, parent->slots_room * sizeof *parent->entries));
    }
    node->slot = parent->slots++;
    parent->entries[node->slot] = node;
    parent->children++;
    parent->stat.st_nlink += S_ISDIR(node->stat.st_mode) != 0;
    clock_gettime(CLOCK_REALTIME, &parent->stat.st_mtim);
    parent->stat.st_ctim = parent->stat.st_mtim;
}

static void leave(struct node **at)
{
    struct node *node = *at, *parent = node->parent;

    *at = node->next;
    name_count--;
    free(node->name);
    node->name = NULL;
    parent->entries[node->slot] = NULL;
    while (parent->slots && !parent->entries[parent->slots - 1])
        parent->slots--;
    parent->children--;
    parent->stat.st_nlink -= S_ISDIR(node->stat.st_mode) != 0;
    clock_gettime(CLOCK_REALTIME, &parent->stat.st_mtim);
    parent->stat.st_ctim = parent->stat.st_mtim;
}

static void drop(struct node *node) /* a node that has neither a name nor a user */
{
    if (node->stat.st_nlink || node->lookups || node == &root)
        return;
    free(node->data);
    free(node->entries);
    free(node);
}

static void describe(struct fuse_entry_param *entry, struct node *node)
{
    memset(entry, 0, sizeof *entry);
    entry->ino = node == &root ? FUSE_ROOT_ID : (uintptr_t)node;
    entry->attr = node->stat;
    entry->attr_timeout = entry->entry_timeout = TIMEOUT_S;
}

static struct node *make(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    const struct fuse_ctx *caller = fuse_req_ctx(req);
    struct node *node = must(calloc(1, sizeof *node));

    node->stat.st_ino = ++last_ino;
    node->stat.st_mode = mode;
    node->stat.st_nlink = S_ISDIR(mode) ? 2 : 1;
    node->stat.st_uid = caller->uid;
    node->stat.st_gid = caller->gid;
    node->stat.st_blksize = 4096;
    clock_gettime(CLOCK_REALTIME, &node->stat.st_mtim);
    node->stat.st_atim = node->stat.st_ctim = node->stat.st_mtim;
    enter(node_of(parent), name, node);
    node->lookups = 1;
    return node;
}

static void ll_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct node *node = *find(node_of(parent), name);
    struct fuse_entry_param entry;

    if (!node) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    node->lookups++;
    describe(&entry, node);
    fuse_reply_entry(req, &entry);
}

static void ll_forget(fuse_req_t req, fuse_ino_t ino, uint64_t count)
{
    node_of(ino)->lookups -= count;
    drop(node_of(ino));
    fuse_reply_none(req);
}

static void ll_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
    struct fuse_entry_param entry;

    if (*find(node_of(parent), name)) {
        fuse_reply_err(req, EEXIST);
        return;
    }
    describe(&entry, make(req, parent, name, S_IFREG | (mode & 07777)));
    fi->direct_io = 1;
    fuse_reply_create(req, &entry, fi);
}

static void ll_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
    struct fuse_entry_param entry;

    if (*find(node_of(parent), name)) {
        fuse_reply_err(req, EEXIST);
        return;
    }
    describe(&entry, make(req, parent, name, S_IFDIR | (mode & 07777)));
    fuse_reply_entry(req, &entry);
}

static void remove_name(fuse_req_t req, fuse_ino_t parent, const char *name)
{
    struct node **at = find(node_of(parent), name), *node = *at;

    if (!node) {
        fuse_reply_err(req, ENOENT);
        return;
    }
    if (node->children) {
        fuse_reply_err(req, ENOTEMPTY);
        return;
    }
    leave(at);
    node->stat.st_nlink = 0;
    drop(node);
    fuse_reply_err(req, 0);
}

static void ll_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent, const char *newname,
                      unsigned int flags)
{
    struct node **at = find(node_of(parent), name), *node = *at, **there, *old;

    if (flags || !node) {
        fuse_reply_err(req, flags ? EINVAL : ENOENT);
        return;
    }
    there = find(node_of(newparent), newname);
    old = *there;
    if (old == node) {
        fuse_reply_err(req, 0);
        return;
    }
    if (old && old->children) {
        fuse_reply_err(req, ENOTEMPTY);
        return;
    }
    if (old) {
        leave(there);
        old->stat.st_nlink = 0;
        drop(old);
        at = find(node_of(parent), name); /* they may have been neighbours in their bucket */
    }
    leave(at);
    enter(node_of(newparent), newname, node);
    fuse_reply_err(req, 0);
}

static void list(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, int plus)
{
    struct node *directory = node_of(ino), *node;
    char *buffer = must(malloc(size));
    struct fuse_entry_param entry;
    size_t used = 0, needed, i;

    for (i = off; i < directory->slots; i++) {
        if (!(node = directory->entries[i]))
            continue;
        describe(&entry, node);
        needed = plus ? fuse_add_direntry_plus(req, buffer + used, size - used, node->name, &entry, i + 1)
                      : fuse_add_direntry(req, buffer + used, size - used, node->name, &entry.attr, i + 1);
        if (needed > size - used)
            break;
        used += needed;
        node->lookups += plus;
    }
    fuse_reply_buf(req, buffer, used);
    free(buffer);
}

static void ll_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    (void)fi;
    list(req, ino, size, off, 0);
}

static void ll_readdirplus(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    (void)fi;
    list(req, ino, size, off, 1);
}

/* Attributes */

static void set_size(struct node *node, size_t size)
{
    if (size > node->room) {
        size_t room = size > 2 * node->room ? size : 2 * node->room;

        node->data = must(realloc(node->data, room));
        node->room = room;
    }
    if (size > (size_t)node->stat.st_size)
        memset(node->data + node->stat.st_size, 0, size - node->stat.st_size);
    node->stat.st_size = size;
    node->stat.st_blocks = (size + 511) / 512;
    clock_gettime(CLOCK_REALTIME, &node->stat.st_mtim);
    node->stat.st_ctim = node->stat.st_mtim;
}

static void ll_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    (void)fi;
    fuse_reply_attr(req, &node_of(ino)->stat, TIMEOUT_S);
}

static void ll_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi)
{
    struct node *node = node_of(ino);

    (void)fi;
    if (to_set & FUSE_SET_ATTR_SIZE)
        set_size(node, attr->st_size);
    if (to_set & FUSE_SET_ATTR_MODE)
        node->stat.st_mode = (node->stat.st_mode & S_IFMT) | (attr->st_mode & 07777);
    if (to_set & FUSE_SET_ATTR_UID)
        node->stat.st_uid = attr->st_uid;
    if (to_set & FUSE_SET_ATTR_GID)
        node->stat.st_gid = attr->st_gid;
    if (to_set & FUSE_SET_ATTR_ATIME)
        node->stat.st_atim = attr->st_atim;
    if (to_set & FUSE_SET_ATTR_MTIME)
        node->stat.st_mtim = attr->st_mtim;
    clock_gettime(CLOCK_REALTIME, &node->stat.st_ctim);
    fuse_reply_attr(req, &node->stat, TIMEOUT_S);
}

static void ll_statfs(fuse_req_t req, fuse_ino_t ino)
{
    struct statvfs fs = {.f_bsize = 4096, .f_frsize = 4096, .f_blocks = 1 << 20, .f_bfree = 1 << 20, .f_bavail = 1 << 20,
                         .f_files = 1 << 20, .f_ffree = 1 << 20, .f_favail = 1 << 20, .f_namemax = 255};

    (void)ino;
    fuse_reply_statfs(req, &fs);
}

/* Data */

static void ll_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    if (fi->flags & O_TRUNC)
        set_size(node_of(ino), 0);
    fi->direct_io = 1;
    fuse_reply_open(req, fi);
}

static void ll_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
    struct node *node = node_of(ino);

    (void)fi;
    if (off >= node->stat.st_size)
        fuse_reply_buf(req, NULL, 0);
    else
        fuse_reply_buf(req, node->data + off,
                       size < (size_t)(node->stat.st_size - off) ? size : (size_t)(node->stat.st_size - off));
}

static void ll_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t off, struct fuse_file_info *fi)
{
    struct node *node = node_of(ino);

    (void)fi;
    if (off + size > (size_t)node->stat.st_size)
        set_size(node, off + size);
    else
        clock_gettime(CLOCK_REALTIME, &node->stat.st_mtim);
    memcpy(node->data + off, data, size);
    fuse_reply_write(req, size);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = ll_lookup,
    .forget = ll_forget,
    .getattr = ll_getattr,
    .setattr = ll_setattr,
    .mkdir = ll_mkdir,
    .unlink = remove_name,
    .rmdir = remove_name,
    .rename = ll_rename,
    .open = ll_open,
    .read = ll_read,
    .write = ll_write,
    .statfs = ll_statfs,
    .readdir = ll_readdir,
    .create = ll_create,
    .readdirplus = ll_readdirplus,
};

int main(int argc, char **argv)
{
    char *options[] = {argv[0], "-o", "fsname=minimal_ll,subtype=minimal_ll,default_permissions"};
    struct fuse_args args = FUSE_ARGS_INIT(3, options);
    struct fuse_session *session;
    int result = 1;

    if (argc != 2) {
        fputs("usage: minimal_ll MOUNTPOINT\n", stderr);
        return 2;
    }
    root.stat.st_ino = FUSE_ROOT_ID;
    root.stat.st_mode = S_IFDIR | 0755;
    root.stat.st_nlink = 2;
    root.stat.st_uid = getuid();
    root.stat.st_gid = getgid();
    clock_gettime(CLOCK_REALTIME, &root.stat.st_mtim);
    root.stat.st_atim = root.stat.st_ctim = root.stat.st_mtim;
    grow_table();

    session = fuse_session_new(&args, &operations, sizeof operations, NULL);
    if (session && !fuse_set_signal_handlers(session)) {
        if (!fuse_session_mount(session, argv[1])) {
            result = fuse_session_loop(session) < 0;
            fuse_session_unmount(session);
        }
        fuse_remove_signal_handlers(session);
    }
    if (session)
        fuse_session_destroy(session);
    fuse_opt_free_args(&args);
    return result;
}
