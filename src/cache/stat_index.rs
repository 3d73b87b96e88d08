//! Digests of files by path, size, times and inode, so that an unchanged file is hashed once.
//!
//! Per machine, outside the shared cache: inode numbers and clocks of one host mean nothing on
//! another. Losing the file costs time only.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cache::durable;
use crate::cache::lease::boot_id;
use crate::digest::Digest;

const MAGIC: &[u8; 8] = b"pipestA2";
/// Magic, and the boot that the entries are from.
const HEAD: usize = MAGIC.len() + 8;
/// Path hash, device, inode, size, mtime, ctime, time of hashing, digest.
const ENTRY: usize = 16 + 6 * 8 + 32;
/// A file changed this shortly before it was hashed may change again within the same tick of a
/// coarse file system clock; it is hashed again next time.
const RACY_NANOSECONDS: u64 = 2_000_000_000;
/// What was written this shortly before it was hashed need not have been on the disk yet: after a
/// power cut a user's file can have its new times and its old bytes.
const UNFLUSHED_NANOSECONDS: u64 = 120_000_000_000;
/// Beyond this many entries the index starts afresh.
const MAX_ENTRIES: usize = 2_000_000;

type Key = [u8; 16];

#[derive(Clone, Copy, PartialEq, Eq)]
struct Entry {
    /// Device, inode, size, mtime, ctime.
    stat: [u64; 5],
    hashed_at: u64,
    digest: Digest,
}

/// The index of one cache root.
#[derive(Debug)]
pub(crate) struct StatIndex {
    path: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    loaded: Option<Vec<u8>>,
    /// The file is from before the last start of this host.
    from_earlier_boot: bool,
    fresh: HashMap<Key, Entry>,
}

impl Entry {
    /// Nanoseconds between the file's last change and its hashing.
    fn age(&self) -> u64 {
        self.hashed_at.saturating_sub(self.stat[3].max(self.stat[4]))
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.digest.fmt(f)
    }
}

impl StatIndex {
    /// The index for the cache at `root`; without a home folder nothing is remembered.
    pub(crate) fn for_root(root: &Path) -> Self {
        let base = std::env::var_os("XDG_CACHE_HOME")
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let name = blake3::hash(root.as_os_str().as_bytes()).to_hex();
        let path = base.map(|b| b.join("pipe/stat-v1").join(&name[..16]));
        Self { path, state: Mutex::default() }
    }

    /// The remembered digest of a file that has not changed. `settled` files are never edited in
    /// place, so that fresh times are no reason for doubt, nor is the time of the inode's last
    /// change: every hard link that a stage reads an object through changes that.
    pub(crate) fn lookup(&self, path: &Path, meta: &Metadata, settled: bool) -> Option<Digest> {
        let key = key(path);
        let mut state = self.state.lock().ok()?;
        let (entry, unsafe_for) = if let Some(entry) = state.fresh.get(&key) {
            (*entry, RACY_NANOSECONDS)
        } else {
            let entry = search(self.load(&mut state), &key)?;
            (entry, if state.from_earlier_boot { UNFLUSHED_NANOSECONDS } else { RACY_NANOSECONDS })
        };
        let stat = stat(meta);
        let racy = entry.age() < unsafe_for;
        let content = |stat: &[u64; 5]| [stat[0], stat[1], stat[2], stat[3]];
        let same = if settled {
            content(&entry.stat) == content(&stat)
        } else {
            entry.stat == stat && !racy
        };
        same.then_some(entry.digest)
    }

    /// Remembers a digest of the bytes that `meta` (taken before hashing) describes. `settled` as
    /// for [`StatIndex::lookup`]: such files were flushed before they got their name.
    pub(crate) fn remember(&self, path: &Path, meta: &Metadata, digest: Digest, settled: bool) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let hashed_at = if settled { u64::MAX } else { now as u64 };
        let entry = Entry { stat: stat(meta), hashed_at, digest };
        if let Ok(mut state) = self.state.lock() {
            state.fresh.insert(key(path), entry);
        }
    }

    /// Writes what was learned; failing to is harmless.
    pub(crate) fn flush(&self) {
        let (Some(path), Ok(mut state)) = (&self.path, self.state.lock()) else { return };
        if state.fresh.is_empty() {
            return;
        }
        // Another process may have written meanwhile.
        state.loaded = None;
        let mut all: HashMap<Key, Entry> = entries(self.load(&mut state)).collect();
        if all.len() > MAX_ENTRIES {
            all.clear();
        }
        if state.from_earlier_boot {
            all.retain(|_, entry| entry.age() >= UNFLUSHED_NANOSECONDS);
        }
        all.extend(state.fresh.drain());
        let mut sorted: Vec<(Key, Entry)> = all.into_iter().collect();
        sorted.sort_unstable_by_key(|(key, _)| *key);
        let mut bytes = [*MAGIC, boot()].concat();
        for (key, entry) in &sorted {
            bytes.extend(key);
            for number in entry.stat.iter().chain([&entry.hashed_at]) {
                bytes.extend(number.to_le_bytes());
            }
            bytes.extend(entry.digest.0);
        }
        bytes.extend(blake3::hash(&bytes).as_bytes());
        if let Some(dir) = path.parent() {
            let staged = dir.join(durable::unique_name());
            let written = fs::create_dir_all(dir)
                .and_then(|()| fs::write(&staged, &bytes))
                .and_then(|()| fs::rename(&staged, path));
            if written.is_err() {
                let _ = fs::remove_file(&staged);
            }
        }
        (state.loaded, state.from_earlier_boot) = (Some(bytes), false);
    }

    /// The file's content; empty where it is absent or damaged.
    fn load<'a>(&self, state: &'a mut State) -> &'a [u8] {
        let State { loaded, from_earlier_boot, .. } = state;
        loaded.get_or_insert_with(|| {
            let bytes = self.path.as_ref().and_then(|p| fs::read(p).ok()).unwrap_or_default();
            let Some((body, sum)) = bytes.split_last_chunk::<32>() else { return Vec::new() };
            let whole = body.starts_with(MAGIC)
                && body.len().checked_sub(HEAD).is_some_and(|rest| rest.is_multiple_of(ENTRY))
                && blake3::hash(body) == *sum;
            *from_earlier_boot = whole && body[MAGIC.len()..HEAD] != boot();
            if whole { bytes } else { Vec::new() }
        })
    }
}

/// Tells this start of the host from others.
fn boot() -> [u8; 8] {
    let hash = blake3::hash(boot_id().as_bytes());
    hash.as_bytes().first_chunk().copied().unwrap_or_default()
}

fn body(bytes: &[u8]) -> &[u8] {
    bytes.get(HEAD..bytes.len().saturating_sub(32)).unwrap_or_default()
}

fn search(bytes: &[u8], key: &Key) -> Option<Entry> {
    let entries = body(bytes);
    let (mut low, mut high) = (0, entries.len() / ENTRY);
    while low < high {
        let middle = usize::midpoint(low, high);
        let entry = &entries[middle * ENTRY..(middle + 1) * ENTRY];
        match entry[..16].cmp(key) {
            std::cmp::Ordering::Equal => return Some(decode(entry)),
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    None
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = (Key, Entry)> {
    body(bytes).chunks_exact(ENTRY).map(|e| {
        let mut key = [0; 16];
        key.copy_from_slice(&e[..16]);
        (key, decode(e))
    })
}

fn decode(entry: &[u8]) -> Entry {
    let number = |i: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&entry[16 + 8 * i..24 + 8 * i]);
        u64::from_le_bytes(bytes)
    };
    let mut digest = [0; 32];
    digest.copy_from_slice(&entry[64..96]);
    let stat = [number(0), number(1), number(2), number(3), number(4)];
    Entry { stat, hashed_at: number(5), digest: Digest(digest) }
}

fn key(path: &Path) -> Key {
    let mut key = [0; 16];
    key.copy_from_slice(&blake3::hash(path.as_os_str().as_bytes()).as_bytes()[..16]);
    key
}

fn stat(meta: &Metadata) -> [u64; 5] {
    let time = |seconds: i64, nanos: i64| {
        (seconds as u64).wrapping_mul(1_000_000_000).wrapping_add(nanos as u64)
    };
    [
        meta.dev(),
        meta.ino(),
        meta.size(),
        time(meta.mtime(), meta.mtime_nsec()),
        time(meta.ctime(), meta.ctime_nsec()),
    ]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn index(dir: &Path) -> StatIndex {
        StatIndex { path: Some(dir.join("index")), state: Mutex::default() }
    }

    #[test]
    fn remembered_digest_survives_a_flush_and_a_changed_file_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "one").unwrap();
        let meta = fs::metadata(&file).unwrap();
        let first = index(dir.path());
        first.remember(&file, &meta, Digest::of(b"one"), false);
        first.flush();
        let second = index(dir.path());
        assert_eq!(second.lookup(&file, &meta, true), Some(Digest::of(b"one")));
        assert_eq!(second.lookup(&file, &meta, false), None, "too fresh to be trusted");
        fs::write(&file, "longer").unwrap();
        assert_eq!(second.lookup(&file, &fs::metadata(&file).unwrap(), true), None);
    }

    #[test]
    fn after_a_restart_a_file_hashed_before_it_was_flushed_is_hashed_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "one").unwrap();
        let meta = fs::metadata(&file).unwrap();
        let settled = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        for (after, before_restart, after_restart) in
            [(1, false, false), (60, true, false), (200, true, true)]
        {
            let first = index(dir.path());
            let digest = Digest::of(b"one");
            let entry =
                Entry { stat: stat(&meta), hashed_at: settled + after * 1_000_000_000, digest };
            first.state.lock().unwrap().fresh.insert(key(&file), entry);
            first.flush();
            let known = |index: StatIndex| index.lookup(&file, &meta, false).is_some();
            assert_eq!(known(index(dir.path())), before_restart, "{after}");
            let mut bytes = fs::read(dir.path().join("index")).unwrap();
            bytes.truncate(bytes.len() - 32);
            bytes[MAGIC.len()] ^= 1;
            bytes.extend(*blake3::hash(&bytes).as_bytes());
            fs::write(dir.path().join("index"), &bytes).unwrap();
            assert_eq!(known(index(dir.path())), after_restart, "{after}");
        }
    }

    #[test]
    fn damaged_index_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "one").unwrap();
        let meta = fs::metadata(&file).unwrap();
        let first = index(dir.path());
        first.remember(&file, &meta, Digest::of(b"one"), false);
        first.flush();
        let mut bytes = fs::read(dir.path().join("index")).unwrap();
        bytes[70] ^= 1;
        fs::write(dir.path().join("index"), bytes).unwrap();
        assert_eq!(index(dir.path()).lookup(&file, &meta, true), None);
    }
}
