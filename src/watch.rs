//! Waits for files to change, by looking at them: unlike notifications of the kernel that works on
//! network file systems, across mounts and for any number of files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Shortest time between two looks.
const INTERVAL: Duration = Duration::from_millis(300);
/// A look may take this share of the time.
const SHARE: u32 = 10;
/// Files that stay as they are for this long are no longer being written.
const SETTLED: Duration = Duration::from_millis(150);
/// Files that never settle are not waited for longer than this.
const PATIENCE: Duration = Duration::from_secs(5);
/// Folders nested deeper than this are not looked into, as in inputs of stages.
const MAX_DEPTH: usize = 64;

/// Device, inode, size, time of the last change of the content, mode.
type Stamp = [u64; 5];

/// The state of some files and folders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<PathBuf, Stamp>);

impl Snapshot {
    /// Looks at files and folders, all that is inside included; what is not there has no state.
    /// What lies below `except` is left out.
    pub fn of<'a>(paths: impl IntoIterator<Item = &'a PathBuf>, except: &Path) -> Self {
        let mut found = BTreeMap::new();
        let mut open: Vec<(PathBuf, usize)> = paths.into_iter().map(|p| (p.clone(), 0)).collect();
        while let Some((path, depth)) = open.pop() {
            if path.starts_with(except) || depth > MAX_DEPTH {
                continue;
            }
            let Ok(meta) = fs::metadata(&path) else { continue };
            if meta.is_dir() {
                let entries = fs::read_dir(&path).into_iter().flatten().flatten();
                open.extend(entries.map(|entry| (entry.path(), depth + 1)));
                continue;
            }
            let time = meta.mtime().wrapping_mul(1_000_000_000).wrapping_add(meta.mtime_nsec());
            let mode = u64::from(meta.mode());
            found.insert(path, [meta.dev(), meta.ino(), meta.size(), time as u64, mode]);
        }
        Self(found)
    }

    /// Both states together.
    #[must_use]
    pub fn with(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// The files by which two states differ, sorted.
    pub fn changes(&self, later: &Self) -> Vec<PathBuf> {
        let gone = self.0.keys().filter(|path| !later.0.contains_key(*path));
        let other = later.0.iter().filter(|(path, stamp)| self.0.get(*path) != Some(*stamp));
        let mut changed: Vec<PathBuf> = gone.chain(other.map(|(path, _)| path)).cloned().collect();
        changed.sort();
        changed
    }

    /// Waits until files differ from this state and have settled, and returns which; none once
    /// `stop` says so.
    pub fn wait(&self, look: &dyn Fn() -> Self, stop: &dyn Fn() -> bool) -> Option<Vec<PathBuf>> {
        let mut pause = INTERVAL;
        loop {
            if !sleep(pause, stop) {
                return None;
            }
            let started = Instant::now();
            let mut now = look();
            pause = INTERVAL.max(started.elapsed() * SHARE);
            if now == *self {
                continue;
            }
            let noticed = Instant::now();
            loop {
                if !sleep(SETTLED, stop) {
                    return None;
                }
                let next = look();
                let settled = next == now || noticed.elapsed() > PATIENCE;
                now = next;
                if settled {
                    break;
                }
            }
            // A file may have been put back meanwhile.
            let changes = self.changes(&now);
            if !changes.is_empty() {
                return Some(changes);
            }
        }
    }
}

/// Whether the whole time went by without a reason to stop.
fn sleep(time: Duration, stop: &dyn Fn() -> bool) -> bool {
    let until = Instant::now() + time;
    while !stop() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(Duration::from_millis(50)));
    }
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn changed_new_and_removed_files_are_named_and_the_exception_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["data/deep", "data/cache"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in ["data/same", "data/deep/changed", "data/removed", "data/cache/x"] {
            fs::write(at(file), "one").unwrap();
        }
        let look = || Snapshot::of(&[at("data"), at("missing")], &at("data/cache"));
        let before = look();
        assert_eq!(before.changes(&look()), Vec::<PathBuf>::new());
        fs::write(at("data/deep/changed"), "longer").unwrap();
        fs::write(at("data/cache/x"), "longer").unwrap();
        fs::remove_file(at("data/removed")).unwrap();
        fs::write(at("missing"), "now there").unwrap();
        let expected = [at("data/deep/changed"), at("data/removed"), at("missing")];
        assert_eq!(before.changes(&look()), expected);
        assert_eq!(before.wait(&look, &|| false), Some(expected.to_vec()));
        assert_eq!(look().wait(&look, &|| true), None);
    }
}
