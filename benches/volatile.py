"""Files in memory that know which of their bytes and names were synced, and can lose the others.

The rules are those of POSIX and no file system's own: `fsync` of a file keeps its bytes and mode, `fsync`
of a folder keeps its names. Nothing else is kept, and what is not may be there after a power cut or not,
bytes page by page, names in any order.
"""

import errno
import random
import stat
import time

PAGE = 4096


class Node:
    """A file, folder or link: as processes see it, and as the disk has it."""

    def __init__(self, ino, mode, uid, gid, target=None):
        self.ino, self.mode, self.uid, self.gid, self.target = ino, mode, uid, gid, target
        folder = stat.S_ISDIR(mode)
        self.entries = {} if folder else None
        self.data = bytearray() if stat.S_ISREG(mode) else None
        self.nlink = 2 if folder else 0
        self.atime = self.mtime = self.ctime = time.time_ns()
        self.kept_entries, self.kept_data, self.kept_mode = {}, b"", mode
        # Since the last sync: of a folder (step, rename, name, node or None); of a file (offset, bytes) or a size.
        self.changes = []


class Files:
    def __init__(self, coarse=False):
        self.coarse, self.step, self.renames = coarse, 0, 0
        root = Node(1, stat.S_IFDIR | 0o755, 0, 0)
        self.nodes, self.last, self.kept_renames = {1: root}, 1, set()

    def find(self, parent, name):
        ino = self.nodes[parent].entries.get(name)
        return None if ino is None else self.nodes[ino]

    def now(self):
        now = time.time_ns()
        return now // 10**9 * 10**9 if self.coarse else now

    def put(self, parent, name, ino, rename=0):
        """Changes a name of a folder; `ino` is none where it goes."""
        folder = self.nodes[parent]
        self.step += 1
        old = folder.entries.get(name)
        if ino is None:
            del folder.entries[name]
        else:
            folder.entries[name] = ino
        folder.changes.append((self.step, rename, name, ino if ino is not None else -old))
        folder.mtime = folder.ctime = self.now()

    def make(self, parent, name, mode, uid, gid, target=None):
        folder = self.nodes[parent]
        if name in folder.entries:
            raise OSError(errno.EEXIST, "")
        if not folder.nlink:
            raise OSError(errno.ENOENT, "")
        if folder.mode & stat.S_ISGID:
            gid = folder.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        self.last += 1
        node = self.nodes[self.last] = Node(self.last, mode, uid, gid, target)
        node.atime = node.mtime = node.ctime = self.now()
        node.nlink = max(node.nlink, 1)
        self.put(parent, name, node.ino)
        return node

    def drop(self, ino):
        node = self.nodes[ino]
        node.nlink -= 2 if node.entries is not None else 1
        node.ctime = self.now()

    def unlink(self, parent, name):
        node = self.find(parent, name)
        if node is None:
            raise OSError(errno.ENOENT, "")
        if node.entries is not None:
            raise OSError(errno.EISDIR, "")
        self.put(parent, name, None)
        self.drop(node.ino)

    def rmdir(self, parent, name):
        node = self.find(parent, name)
        if node is None:
            raise OSError(errno.ENOENT, "")
        if node.entries is None:
            raise OSError(errno.ENOTDIR, "")
        if node.entries:
            raise OSError(errno.ENOTEMPTY, "")
        self.put(parent, name, None)
        self.drop(node.ino)

    def rename(self, parent, name, target, new, exclusive=False):
        node, there = self.find(parent, name), self.find(target, new)
        if node is None:
            raise OSError(errno.ENOENT, "")
        if there is not None:
            if exclusive:
                raise OSError(errno.EEXIST, "")
            if there is node:
                return
            if there.entries:
                raise OSError(errno.ENOTEMPTY, "")
        self.renames += 1
        self.put(target, new, node.ino, self.renames)
        self.put(parent, name, None, self.renames)
        if there is not None:
            self.drop(there.ino)
        node.ctime = self.now()

    def link(self, ino, parent, name):
        node = self.nodes[ino]
        if name in self.nodes[parent].entries:
            raise OSError(errno.EEXIST, "")
        self.put(parent, name, ino)
        node.nlink += 1
        node.ctime = self.now()
        return node

    def write(self, ino, offset, data):
        node = self.nodes[ino]
        if offset > len(node.data):
            node.data += bytes(offset - len(node.data))
        node.data[offset:offset + len(data)] = data
        node.changes.append((offset, data))
        node.mtime = node.ctime = self.now()

    def change(self, ino, mode=None, uid=None, gid=None, size=None, atime=None, mtime=None):
        node = self.nodes[ino]
        node.mode = node.mode if mode is None else stat.S_IFMT(node.mode) | mode & 0o7777
        node.uid, node.gid = uid if uid is not None else node.uid, gid if gid is not None else node.gid
        if size is not None:
            if size < len(node.data):
                del node.data[size:]
            else:
                node.data += bytes(size - len(node.data))
            node.changes.append(size)
            node.mtime = self.now()
        node.atime, node.mtime = atime if atime is not None else node.atime, mtime if mtime is not None else node.mtime
        node.ctime = self.now()

    def sync(self, ino):
        node = self.nodes[ino]
        if node.entries is not None:
            self.kept_renames.update(change[1] for change in node.changes)
            node.kept_entries = dict(node.entries)
        elif node.data is not None:
            node.kept_data = bytes(node.data)
        node.kept_mode, node.changes = node.mode, []

    def sync_all(self):
        """Keeps everything, and forgets what no name leads to."""
        for ino in self.nodes:
            self.sync(ino)
        self.forget()

    def forget(self):
        """Drops nodes without a name, and counts the names of the others."""
        for node in self.nodes.values():
            node.nlink = 2 if node.entries is not None else 0
        seen, open_ = {1}, [1]
        while open_:
            for ino in self.nodes[open_.pop()].entries.values():
                node = self.nodes[ino]
                if node.entries is None:
                    node.nlink += 1
                if ino not in seen:
                    seen.add(ino)
                    if node.entries is not None:
                        open_.append(ino)
        self.nodes = {ino: self.nodes[ino] for ino in seen}
        self.kept_renames = set()

    def cut(self, seed):
        """Loses what was not synced, in one of many ways; says in which."""
        dice = random.Random(seed)
        way = dice.choice(["nothing else", "names without bytes", "bytes without names", "in order", "any", "any", "torn renames"])
        share = dice.choice([0.1, 0.5, 0.9])
        last = dice.randint(self.step - min(self.step, 60), self.step)
        kept, lost = {}, 0

        def survives(step, rename):
            if way == "in order":
                return step <= last
            if way in ("nothing else", "bytes without names"):
                survived = False
            elif way == "names without bytes":
                survived = True
            elif rename and way != "torn renames":
                # A rename is one step for every file system with a journal.
                survived = kept.setdefault(rename, dice.random() < share)
            else:
                survived = dice.random() < share
            return survived or (rename in self.kept_renames and rename and way != "torn renames")

        for node in self.nodes.values():
            if node.entries is not None:
                entries = dict(node.kept_entries)
                for step, rename, name, ino in node.changes:
                    if not survives(step, rename):
                        lost += 1
                    elif ino > 0:
                        entries[name] = ino
                    elif entries.get(name) == -ino:
                        del entries[name]
                node.entries = entries
            elif node.data is not None and node.changes:
                lost += 1
                node.data = self.torn(node, dice, way, share)
                node.mode = dice.choice([node.mode, node.kept_mode])
        # A name whose node the disk never had.
        for node in self.nodes.values():
            if node.entries is not None:
                node.entries = {name: ino for name, ino in node.entries.items() if ino in self.nodes}
        self.forget()
        for ino in self.nodes:
            self.sync(ino)
        return way, lost

    def torn(self, node, dice, way, share):
        """What of a file's bytes the disk has."""
        if way == "nothing else":
            return bytearray(node.kept_data)
        if way == "bytes without names":
            return node.data
        data = bytearray(node.kept_data)
        whole = way == "names without bytes" and dice.random() < 0.5
        for change in node.changes:
            if isinstance(change, int):
                if dice.random() < share:
                    del data[change:]
                continue
            offset, piece = change
            for start in range(0, len(piece), PAGE):
                if way != "names without bytes" and dice.random() < share:
                    page = piece[start:start + PAGE]
                    if offset + start > len(data):
                        data += bytes(offset + start - len(data))
                    data[offset + start:offset + start + len(page)] = page
        if whole or dice.random() < 0.3:
            # The size reached the disk, the bytes did not.
            data += bytes(max(0, len(node.data) - len(data)))
        return data
