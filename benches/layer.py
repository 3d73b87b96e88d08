"""A file system in memory, served through /dev/fuse without any library, for trials: it forgets what was
not synced when told to (`benches/power_cuts.py`), and can have the defects of network file systems
(`benches/network.py`).

Every mount of one layer is another client of the same files, with caches of its own.
"""

import ctypes
import errno
import multiprocessing
import os
import selectors
import stat
import struct
import threading
import time
from collections import deque

from volatile import Files

libc = ctypes.CDLL(None, use_errno=True)
HEADER, REPLY = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
ATTR, ENTRY, ATTR_HEAD = struct.Struct("<6Q10I"), struct.Struct("<4QII"), struct.Struct("<QII")
LK = struct.Struct("<QQQQIIII")
CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000
PRIVILEGED = os.geteuid() == 0
BIG_WRITES, TRUNCATING_OPEN, FLOCKS, POSIX_LOCKS = 1 << 5, 1 << 3, 1 << 10, 1 << 1
CHANGES = {4, 6, 8, 9, 10, 11, 12, 13, 16, 20, 30, 35, 43, 45}
STALE_ENTRY, STALE_NODE = 3, 2


def call(result):
    """The result of a C function, or its error."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def private_mounts():
    """Moves this process to a mount namespace of its own, so that no mount outlives it."""
    user, group = os.getuid(), os.getgid()
    call(libc.unshare(CLONE_NEWNS | (0 if PRIVILEGED else CLONE_NEWUSER)))
    if not PRIVILEGED:
        for name, text in [("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")]:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    call(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))


class Defects:
    """What is wrong with a layer that stands for a network file system."""

    def __init__(self, keep=0.0, flock=None, coarse=False, no_exclusive_rename=False, silly=False, lies=0.0, no_links=False):
        self.keep = keep  # seconds that clients keep names, their absence and attributes
        self.flock = flock  # "lies": every lock is granted; "refuses": ENOLCK
        self.coarse = coarse  # times in whole seconds
        self.no_exclusive_rename = no_exclusive_rename  # EINVAL
        self.silly = silly  # removed open files stay as .nfsXXXX
        self.lies = lies  # share of link, rename, unlink and mkdir that succeed and report a failure
        self.no_links = no_links  # EPERM


class Mount:
    """One client: a mount point, and what its kernel is told."""

    def __init__(self, layer, path):
        self.layer, self.files, self.path = layer, layer.files, path
        # A request can be taken back before it is read, when its process is killed.
        self.fd = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK)
        others = ",allow_other" if PRIVILEGED else ""
        options = f"fd={self.fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions{others}"
        call(libc.mount(b"layer", path.encode(), b"fuse.layer", 0, options.encode()))
        self.listings, self.handles, self.open = {}, 0, {}
        self.absent, self.silly = {}, 0
        self.notices, self.told, self.unheard = deque(), threading.Condition(), 0
        threading.Thread(target=self.notify, daemon=True).start()

    def notify(self):
        """Tells the kernel what it must not believe any longer, beside the requests: it may have to wait."""
        while True:
            with self.told:
                while not self.notices:
                    self.told.wait()
                notice = self.notices.popleft()
            try:
                os.write(self.fd, notice)
            except OSError:
                pass
            with self.told:
                self.unheard -= 1
                self.told.notify_all()

    def tell(self, code, body):
        with self.told:
            self.unheard += 1
            self.notices.append(REPLY.pack(REPLY.size + len(body), code, 0) + body)
            self.told.notify_all()

    def serve(self):
        """Answers one request."""
        try:
            request = os.read(self.fd, (1 << 20) + 4096)
        except (BlockingIOError, InterruptedError, FileNotFoundError):
            return
        _, opcode, unique, node, uid, gid, _, _ = HEADER.unpack_from(request)
        body = request[HEADER.size:]
        error, answer = 0, b""
        if opcode in (2, 42):
            return
        try:
            if opcode in CHANGES:
                self.layer.count()
            if self.layer.frozen and opcode != 26:
                raise OSError(errno.EIO, "")
            handler = HANDLERS.get(opcode)
            if handler is None:
                raise OSError(errno.ENOSYS, "")
            answer = handler(self, node, body, uid, gid) or b""
        except OSError as failure:
            error = -failure.errno
        except KeyError:
            error = -errno.ESTALE
        try:
            os.write(self.fd, REPLY.pack(REPLY.size + (0 if error else len(answer)), error, unique) + (b"" if error else answer))
        except OSError:
            pass

    def lie(self):
        if self.layer.defects.lies and self.layer.dice.random() < self.layer.defects.lies:
            return True
        return False

    def attributes(self, node):
        unit = 10**9
        second = lambda t: (t // unit, 0 if self.layer.defects.coarse else t % unit)
        (a, an), (m, mn), (c, cn) = second(node.atime), second(node.mtime), second(node.ctime)
        size = len(node.data) if node.data is not None else 4096
        return ATTR.pack(node.ino, size, (size + 511) // 512, a, m, c, an, mn, cn, node.mode, node.nlink, node.uid, node.gid, 0, 4096, 0)

    def entry(self, node):
        keep = self.layer.defects.keep
        whole, rest = int(keep), int(keep % 1 * 1e9)
        return ENTRY.pack(node.ino, 0, whole, whole, rest, rest) + self.attributes(node)

    def lookup(self, parent, body, *_):
        name = body[:-1]
        node = self.files.find(parent, name)
        if node is not None:
            return self.entry(node)
        keep = self.layer.defects.keep
        if not keep:
            raise OSError(errno.ENOENT, "")
        self.absent.setdefault(parent, set()).add(name)
        return ENTRY.pack(0, 0, int(keep), 0, int(keep % 1 * 1e9), 0) + bytes(ATTR.size)

    def getattr(self, ino, body, *_):
        node = self.files.nodes[ino]
        if not node.nlink and not self.open.get(ino):
            raise OSError(errno.ESTALE, "")
        keep = self.layer.defects.keep
        return ATTR_HEAD.pack(int(keep), int(keep % 1 * 1e9), 0) + self.attributes(node)

    def setattr(self, ino, body, *_):
        valid, _, _, size, _, atime, mtime, _, an, mn, _, mode, _, uid, gid, _ = struct.unpack_from("<II6Q8I", body)
        now = time.time_ns()
        time_of = lambda flag, now_flag, seconds, nanos: now if valid & now_flag else seconds * 10**9 + nanos if valid & flag else None
        self.files.change(
            ino, mode=mode if valid & 1 else None, uid=uid if valid & 2 else None, gid=gid if valid & 4 else None,
            size=size if valid & 8 else None, atime=time_of(16, 128, atime, an), mtime=time_of(32, 256, mtime, mn))
        return self.getattr(ino, body)

    def readlink(self, ino, *_):
        return self.files.nodes[ino].target

    def symlink(self, parent, body, uid, gid):
        name, target = body.split(b"\0")[:2]
        return self.entry(self.files.make(parent, name, stat.S_IFLNK | 0o777, uid, gid, target=target))

    def mknod(self, parent, body, uid, gid):
        mode = struct.unpack_from("<I", body)[0]
        return self.entry(self.files.make(parent, body[16:-1], mode, uid, gid))

    def mkdir(self, parent, body, uid, gid):
        mode = struct.unpack_from("<I", body)[0]
        made = self.files.make(parent, body[8:-1], stat.S_IFDIR | mode, uid, gid)
        if self.lie():
            raise OSError(errno.EEXIST, "")
        return self.entry(made)

    def unlink(self, parent, body, *_):
        name = body[:-1]
        node = self.files.find(parent, name)
        if node and self.layer.defects.silly and self.open.get(node.ino) and node.nlink == 1 and not name.startswith(b".nfs"):
            self.silly += 1
            hidden = b".nfs%016x%08x" % (node.ino, self.silly)
            self.files.rename(parent, name, parent, hidden)
            self.layer.hidden[node.ino] = (parent, hidden)
            return
        self.files.unlink(parent, name)
        if self.lie():
            raise OSError(errno.ENOENT, "")

    def rmdir(self, parent, body, *_):
        self.files.rmdir(parent, body[:-1])

    def renamed(self, parent, body, flags, head):
        target = struct.unpack_from("<Q", body)[0]
        old, new = body[head:].split(b"\0")[:2]
        if flags and self.layer.defects.no_exclusive_rename:
            raise OSError(errno.EINVAL, "")
        self.files.rename(parent, old, target, new, exclusive=flags & 1)
        if self.lie():
            raise OSError(errno.ENOENT, "")

    def rename(self, parent, body, *_):
        self.renamed(parent, body, 0, 8)

    def rename2(self, parent, body, *_):
        flags = struct.unpack_from("<QI", body)[1]
        if flags & ~1:
            raise OSError(errno.EINVAL, "")
        self.renamed(parent, body, flags, 16)

    def link(self, parent, body, *_):
        if self.layer.defects.no_links:
            raise OSError(errno.EPERM, "")
        linked = self.files.link(struct.unpack_from("<Q", body)[0], parent, body[8:-1])
        if self.lie():
            raise OSError(errno.EEXIST, "")
        return self.entry(linked)

    def opened(self, ino):
        self.handles += 1
        self.open[ino] = self.open.get(ino, 0) + 1
        return struct.pack("<QII", self.handles, 0, 0)

    def open_file(self, ino, body, *_):
        node = self.files.nodes[ino]
        if not node.nlink and not self.open.get(ino):
            raise OSError(errno.ESTALE, "")
        if struct.unpack_from("<I", body)[0] & os.O_TRUNC:
            self.files.change(ino, size=0)
        if self.layer.defects.keep:
            # Opening asks the server again.
            os.write(self.fd, REPLY.pack(REPLY.size + 24, STALE_NODE, 0) + struct.pack("<Qqq", ino, -1, 0))
        return self.opened(ino)

    def create(self, parent, body, uid, gid):
        mode = struct.unpack_from("<II", body)[1]
        made = self.files.make(parent, body[16:-1], stat.S_IFREG | mode & 0o7777, uid, gid)
        return self.entry(made) + self.opened(made.ino)

    def read(self, ino, body, *_):
        _, offset, size = struct.unpack_from("<QQI", body)
        node = self.files.nodes[ino]
        if self.layer.defects.silly and not node.nlink:
            raise OSError(errno.ESTALE, "")
        return bytes(node.data[offset:offset + size])

    def write(self, ino, body, *_):
        _, offset, size = struct.unpack_from("<QQI", body)
        self.files.write(ino, offset, body[40:40 + size])
        return struct.pack("<II", size, 0)

    def release(self, ino, *_):
        left = self.open.get(ino, 1) - 1
        self.open[ino] = left
        if not left:
            del self.open[ino]
            hidden = self.layer.hidden.pop(ino, None)
            if hidden and self.files.find(*hidden) is not None:
                self.files.unlink(*hidden)

    def fsync(self, ino, *_):
        self.files.sync(ino)

    def open_folder(self, ino, *_):
        # Opening a folder asks the server again: what has appeared in it is seen from now on.
        absent = self.absent.get(ino, set())
        for name in list(absent):
            if self.files.find(ino, name) is not None:
                absent.discard(name)
                self.tell(STALE_ENTRY, struct.pack("<QII", ino, len(name), 0) + name + b"\0")
        # Not for long: what is to be told may wait for a request that only this thread can answer.
        with self.told:
            self.told.wait_for(lambda: not self.unheard, 0.05)
        node = self.files.nodes[ino]
        self.handles += 1
        self.listings[self.handles] = [(b".", ino), (b"..", 1), *node.entries.items()]
        return struct.pack("<QII", self.handles, 0, 0)

    def read_folder(self, _, body, *__):
        handle, offset, size = struct.unpack_from("<QQI", body)
        out = bytearray()
        for index, (name, ino) in enumerate(self.listings[handle][offset:], offset + 1):
            node = self.files.nodes.get(ino)
            kind = node.mode >> 12 if node else 0
            piece = struct.pack("<QQII", ino, index, len(name), kind) + name
            piece += bytes(-len(piece) % 8)
            if len(out) + len(piece) > size:
                break
            out += piece
        return bytes(out)

    def release_folder(self, _, body, *__):
        self.listings.pop(struct.unpack_from("<Q", body)[0], None)

    def lock(self, *_):
        if self.layer.defects.flock == "refuses":
            raise OSError(errno.ENOLCK, "")

    def free_lock(self, _, body, *__):
        return struct.pack("<QQII", 0, 0, 2, 0)

    def space(self, *_):
        return struct.pack("<5Q4I6I", 1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0, *[0] * 6)

    def begin(self, _, body, *__):
        major, minor, ahead, _ = struct.unpack_from("<4I", body)
        locks = FLOCKS | POSIX_LOCKS if self.layer.defects.flock else 0
        flags = BIG_WRITES | TRUNCATING_OPEN | locks
        return struct.pack("<4I2H2I2H8I", 7, min(minor, 31), ahead, flags, 64, 48, 1 << 17, 1, 32, 0, *[0] * 8)

    def nothing(self, *_):
        return b""


HANDLERS = {
    1: Mount.lookup, 3: Mount.getattr, 4: Mount.setattr, 5: Mount.readlink, 6: Mount.symlink, 8: Mount.mknod,
    9: Mount.mkdir, 10: Mount.unlink, 11: Mount.rmdir, 12: Mount.rename, 13: Mount.link, 14: Mount.open_file,
    15: Mount.read, 16: Mount.write, 17: Mount.space, 18: Mount.release, 20: Mount.fsync, 25: Mount.nothing,
    26: Mount.begin, 27: Mount.open_folder, 28: Mount.read_folder, 29: Mount.release_folder, 30: Mount.fsync,
    31: Mount.free_lock, 32: Mount.lock, 33: Mount.lock, 35: Mount.create, 36: Mount.nothing, 38: Mount.nothing,
    45: Mount.rename2,
}


class Layer:
    """The files, their mounts, and a process that serves them."""

    def __init__(self, paths, defects=None, seed=1):
        self.paths, self.defects, self.seed = [str(p) for p in paths], defects or Defects(), seed
        self.control, remote = multiprocessing.Pipe()
        ready, told = multiprocessing.Pipe(duplex=False)
        self.server = multiprocessing.get_context("fork").Process(target=self.run, args=(remote, told), daemon=True)
        self.server.start()
        error = ready.recv()
        if error:
            raise OSError(*error)

    def run(self, control, told):
        import random
        self.dice, self.frozen, self.left, self.changes = random.Random(self.seed), False, None, 0
        self.files, self.hidden = Files(coarse=self.defects.coarse), {}
        try:
            mounts = [Mount(self, path) for path in self.paths]
        except OSError as error:
            told.send((error.errno, error.strerror))
            return
        waiting = selectors.DefaultSelector()
        for mount in mounts:
            waiting.register(mount.fd, selectors.EVENT_READ, mount.serve)
        waiting.register(control, selectors.EVENT_READ, lambda: self.obey(control))
        told.send(None)
        while True:
            for key, _ in waiting.select():
                try:
                    key.data()
                except (OSError, EOFError):
                    return

    def count(self):
        """Counts a change, and freezes everything at the one that the power goes at."""
        if self.frozen:
            return
        self.changes += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.frozen = True

    def obey(self, control):
        name, *arguments = control.recv()
        if name == "arm":
            self.left, self.changes = arguments[0], 0
            answer = None
        elif name == "frozen":
            answer = self.frozen
        elif name == "changes":
            answer = self.changes
        elif name == "cut":
            answer = self.files.cut(*arguments)
            self.frozen, self.left = False, None
        elif name == "sync":
            answer = self.files.sync_all()
        control.send(answer)

    def __call__(self, *command):
        self.control.send(command)
        return self.control.recv()
