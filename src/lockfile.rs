//! `pipeline.lock`: what the sources of a pipeline were resolved to, so that later runs need no
//! network and everyone gets the same bytes.
//!
//! JSON with sorted keys, named after the pipeline file, and written only when an entry changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cache::unique_name;

const VERSION: u32 = 1;
/// Nobody waits longer than this for another run that pins a source.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a source is pinned again where another run, unseen, has just written without it.
const ATTEMPTS: usize = 16;

/// The sources that a pipeline pins.
#[derive(Clone, Debug)]
pub struct Lockfile {
    path: PathBuf,
    sources: BTreeMap<String, Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    sources: BTreeMap<String, Value>,
}

/// A lock file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The file system refused.
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        /// Completes "could not".
        doing: &'static str,
        /// File.
        path: PathBuf,
        /// What the file system said.
        source: std::io::Error,
    },
    /// The file does not parse, after a merge conflict for example.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Content {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
}

impl Lockfile {
    /// Reads the lock file beside `pipeline`; an absent one is empty.
    ///
    /// # Errors
    /// [`LockError`] where it is there and cannot be read.
    pub fn beside(pipeline: &Path) -> Result<Self, LockError> {
        Self::at(&pipeline.with_extension("lock"))
    }

    /// Reads a lock file; an absent or empty one pins nothing.
    ///
    /// # Errors
    /// [`LockError`] where it is there and cannot be read.
    pub fn at(path: &Path) -> Result<Self, LockError> {
        let path = path.to_owned();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::empty(path));
            }
            Err(source) => return Err(LockError::Io { doing: "read", path, source }),
        };
        Self::parse(path, &text)
    }

    /// A lock file that is not there.
    pub fn empty(path: PathBuf) -> Self {
        Self { path, sources: BTreeMap::new() }
    }

    /// Reads the text of a lock file; `path` is for messages.
    ///
    /// # Errors
    /// [`LockError::Content`] where it does not parse.
    pub fn parse(path: PathBuf, text: &[u8]) -> Result<Self, LockError> {
        // What git hands a merge driver where a side has no such file.
        if text.is_empty() {
            return Ok(Self::empty(path));
        }
        let content = |line, column, message| LockError::Content {
            path: path.clone(),
            line,
            column,
            message,
        };
        let parsed: Content = serde_json::from_slice(text).map_err(|e| {
            content(
                e.line(),
                e.column(),
                format!(
                    "{e}; `pipe lock --help` says how to merge; deleting the file resolves anew"
                ),
            )
        })?;
        if parsed.version != VERSION {
            let message = format!("written by another version of pipe (layout {})", parsed.version);
            return Err(content(1, 1, message));
        }
        Ok(Self { path, sources: parsed.sources })
    }

    /// Both sides of a merge in one: every source of either. Where both pin a source and differ,
    /// the side that left `base` wins; where both left it, `ours` does and the key is returned.
    pub fn merged(base: &Self, ours: &Self, theirs: &Self) -> (Self, Vec<String>) {
        let keys: BTreeSet<&String> = ours.sources.keys().chain(theirs.sources.keys()).collect();
        let (mut sources, mut both) = (BTreeMap::new(), Vec::new());
        for key in keys {
            let (old, a, b) = (base.get(key), ours.get(key), theirs.get(key));
            let pinned = match (a, b) {
                (Some(a), Some(b)) if a != b && old == Some(a) => Some(b),
                (Some(a), Some(b)) if a != b && old != Some(b) => {
                    both.push(key.clone());
                    Some(a)
                }
                // Left out on one side: gone if that side had it, new on the other if not.
                (Some(a), None) => Some(a).filter(|a| old != Some(*a)),
                (None, Some(b)) => Some(b).filter(|b| old != Some(*b)),
                (a, _) => a,
            };
            sources.extend(pinned.map(|value| (key.clone(), value.clone())));
        }
        (Self { path: ours.path.clone(), sources }, both)
    }

    /// What a key is pinned to.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.sources.get(key)
    }

    /// Pins a key, durably; the file is left alone where nothing changes, and what other runs have
    /// pinned meanwhile stays in it.
    ///
    /// # Errors
    /// [`LockError`] when the disk refuses, or the file no longer parses.
    pub fn set(&mut self, key: &str, value: Value) -> Result<(), LockError> {
        if self.sources.get(key) == Some(&value) {
            return Ok(());
        }
        let value = sorted(value);
        let _guard = guard(self.folder());
        // Where the guard is none, as on some network file systems, what was lost shows afterwards.
        for _ in 0..ATTEMPTS {
            let mut now = Self::at(&self.path)?;
            for (key, value) in &self.sources {
                now.sources.entry(key.clone()).or_insert_with(|| value.clone());
            }
            now.sources.insert(key.to_owned(), value.clone());
            now.write()?;
            if Self::at(&self.path)?.get(key) == Some(&value) {
                break;
            }
        }
        self.sources.insert(key.to_owned(), value);
        Ok(())
    }

    fn folder(&self) -> &Path {
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty());
        folder.unwrap_or(Path::new("."))
    }

    /// Writes the file, durably.
    ///
    /// # Errors
    /// [`LockError::Io`] when the disk refuses.
    pub fn write(&self) -> Result<(), LockError> {
        let io = |source| LockError::Io { doing: "write", path: self.path.clone(), source };
        let content = Content { version: VERSION, sources: self.sources.clone() };
        let mut text = serde_json::to_vec_pretty(&content).map_err(|e| io(e.into()))?;
        text.push(b'\n');
        let staged = self.path.with_extension(format!("lock.{}.tmp", unique_name()));
        let write = || {
            let mut file = fs::File::create(&staged)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&staged, &self.path)?;
            fs::File::open(self.folder())?.sync_all()
        };
        write().map_err(|e| {
            let _ = fs::remove_file(&staged);
            io(e)
        })
    }
}

/// Keeps other runs from writing a lock file in a folder while the returned file is open. The
/// kernel lets go of it when a process dies, so that nobody has to clean up.
fn guard(folder: &Path) -> Option<fs::File> {
    let file = fs::File::open(folder).ok()?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Some(file),
            Err(fs::TryLockError::WouldBlock) if since.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(_) => return None,
        }
    }
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<String, Value> =
                map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn entries_survive_and_an_equal_one_leaves_the_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let pipeline = dir.path().join("quick.yaml");
        let mut lock = Lockfile::beside(&pipeline).unwrap();
        lock.set("hf:x", json!({"z": 1, "a": 2})).unwrap();
        let path = dir.path().join("quick.lock");
        let before = fs::read_to_string(&path).unwrap();
        assert!(before.find("\"a\"").unwrap() < before.find("\"z\"").unwrap());
        fs::remove_file(&path).unwrap();
        lock.set("hf:x", json!({"a": 2, "z": 1})).unwrap();
        assert!(!path.exists(), "an equal entry must not write");
        fs::write(&path, &before).unwrap();
        assert_eq!(
            Lockfile::beside(&pipeline).unwrap().get("hf:x"),
            Some(&json!({"a": 2, "z": 1}))
        );
    }

    #[test]
    fn two_runs_that_pin_at_the_same_time_keep_both() {
        let dir = tempfile::tempdir().unwrap();
        let pipeline = dir.path().join("p.yaml");
        let mut one = Lockfile::beside(&pipeline).unwrap();
        let mut two = Lockfile::beside(&pipeline).unwrap();
        one.set("a", json!(1)).unwrap();
        two.set("b", json!(2)).unwrap();
        let kept = Lockfile::beside(&pipeline).unwrap();
        assert_eq!((kept.get("a"), kept.get("b")), (Some(&json!(1)), Some(&json!(2))));
    }

    #[test]
    fn threads_that_pin_at_the_same_time_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let pipeline = dir.path().join("p.yaml");
        let (threads, keys) = (8, 10);
        let start = std::sync::Barrier::new(threads);
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let (pipeline, start) = (&pipeline, &start);
                scope.spawn(move || {
                    let mut lock = Lockfile::beside(pipeline).unwrap();
                    start.wait();
                    for key in 0..keys {
                        lock.set(&format!("{thread}-{key}"), json!(key)).unwrap();
                    }
                });
            }
        });
        assert_eq!(Lockfile::beside(&pipeline).unwrap().sources.len(), threads * keys);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary files are gone");
    }

    #[test]
    fn what_another_run_pinned_anew_is_not_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let pipeline = dir.path().join("p.yaml");
        Lockfile::beside(&pipeline).unwrap().set("a", json!(1)).unwrap();
        let mut one = Lockfile::beside(&pipeline).unwrap();
        Lockfile::beside(&pipeline).unwrap().set("a", json!(2)).unwrap();
        one.set("b", json!(1)).unwrap();
        assert_eq!(Lockfile::beside(&pipeline).unwrap().get("a"), Some(&json!(2)));
    }

    #[test]
    fn merge_takes_every_change_and_names_what_both_sides_changed() {
        let lock = |sources: Value| Lockfile {
            path: "p.lock".into(),
            sources: serde_json::from_value(sources).unwrap(),
        };
        let base = lock(json!({"kept": 1, "ours": 1, "theirs": 1, "both": 1, "dropped": 1}));
        let ours =
            lock(json!({"kept": 1, "ours": 2, "theirs": 1, "both": 2, "mine": 1, "same": 5}));
        let theirs =
            lock(json!({"kept": 1, "ours": 1, "theirs": 3, "both": 3, "dropped": 1, "same": 5}));
        let (merged, both) = Lockfile::merged(&base, &ours, &theirs);
        let wanted = json!({"kept": 1, "ours": 2, "theirs": 3, "both": 2, "mine": 1, "same": 5});
        assert_eq!(serde_json::to_value(&merged.sources).unwrap(), wanted);
        assert_eq!(both, ["both"]);
    }

    #[test]
    fn merge_conflict_is_located() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("p.lock"), "{\n<<<<<<< ours\n").unwrap();
        let error = Lockfile::beside(&dir.path().join("p.yaml")).unwrap_err().to_string();
        assert!(error.contains("p.lock:2:1"), "{error}");
    }
}
