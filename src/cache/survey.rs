//! Looking at a whole cache: every record and object, what is damaged, what takes the room.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use contract::OutputForm;
use serde::Serialize;

use super::object::{Unsound, hash};
use super::{Cache, CacheError, durable};
use crate::digest::{Digest, Fingerprint};
use crate::record::Record;

/// A record file as it lies there.
#[derive(Clone, Debug)]
pub struct Kept {
    /// Where.
    pub path: PathBuf,
    /// When it was made or last reused, to the hour.
    pub used: SystemTime,
    /// What it says, or what is wrong with it.
    pub record: Result<Record, String>,
    /// Nothing is known to be wrong with it: this user may not read it, or cannot just now.
    pub closed: bool,
}

/// An object file as it lies there.
#[derive(Clone, Debug)]
pub struct Held {
    /// Where.
    pub path: PathBuf,
    /// What its name says.
    pub digest: Option<Digest>,
    /// Size in bytes.
    pub bytes: u64,
    /// When it was stored.
    pub stored: SystemTime,
}

/// Something in a cache that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// File, below the cache.
    pub file: String,
    /// What is wrong, for people.
    pub what: String,
    /// It was moved to the quarantine.
    pub quarantined: bool,
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Records looked at.
    pub records: usize,
    /// Objects read.
    pub objects: usize,
    /// Bytes of these.
    pub bytes: u64,
    /// What is wrong.
    pub damage: Vec<Damage>,
    /// What this user may not read.
    pub unreadable: Vec<Unreadable>,
}

/// Something in a cache that nothing can be said about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// File, below the cache.
    pub file: String,
    /// What keeps this user out.
    pub what: String,
}

/// Files below a folder that are `depth` levels down; a folder that is not there has none.
pub(super) fn files_at(root: &Path, depth: usize) -> Result<Vec<PathBuf>, CacheError> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(CacheError::io("list", root, e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| CacheError::io("list", root, e))?;
        if !entry.file_name().to_str().is_some_and(durable::is_left_open) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    if depth == 1 {
        return Ok(paths);
    }
    let mut found = Vec::new();
    for path in paths.iter().filter(|p| p.is_dir()) {
        found.extend(files_at(path, depth - 1)?);
    }
    Ok(found)
}

/// Bytes of every file below a path, each inode once.
pub(super) fn bytes_below(path: &Path) -> u64 {
    let (mut open, mut seen, mut bytes) = (vec![path.to_owned()], BTreeSet::new(), 0);
    while let Some(path) = open.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            open.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|e| e.path()));
        } else if seen.insert((meta.dev(), meta.ino())) {
            bytes += meta.len();
        }
    }
    bytes
}

impl Cache {
    /// Every record file, damaged ones included.
    ///
    /// # Errors
    /// [`CacheError`] where a folder cannot be listed.
    pub fn kept(&self) -> Result<Vec<Kept>, CacheError> {
        let files = files_at(&self.root.join("records-v1"), 2)?;
        let kept = |path: PathBuf| {
            // Gone since it was listed.
            let used = fs::metadata(&path).and_then(|m| m.modified()).ok()?;
            let read = sound_record(&path);
            let closed = matches!(read, Err(Unsound::Denied(_) | Unsound::Passing(_)));
            let record = read.map_err(|unsound| unsound.to_string());
            Some(Kept { path, used, record, closed })
        };
        Ok(files.into_iter().filter_map(kept).collect())
    }

    /// Every object file.
    ///
    /// # Errors
    /// [`CacheError`] where a folder cannot be listed.
    pub fn held(&self) -> Result<Vec<Held>, CacheError> {
        let files = files_at(&self.root.join("objects-v1"), 2)?;
        let held = |path: PathBuf| {
            let meta = fs::metadata(&path).ok()?;
            let prefix = path.parent()?.file_name()?.to_str()?;
            let digest = format!("{prefix}{}", path.file_name()?.to_str()?).parse().ok();
            let stored = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            Some(Held { digest, bytes: meta.len(), stored, path })
        };
        Ok(files.into_iter().filter_map(held).collect())
    }

    /// The objects that a record needs, with their sizes: outputs, and the files of trees.
    pub fn needed(&self, record: &Record) -> BTreeMap<Digest, Option<u64>> {
        self.needed_and_closed(record).0
    }

    /// The same, and whether a listing cannot be read by this user or just now: there may be more.
    pub(super) fn needed_and_closed(
        &self,
        record: &Record,
    ) -> (BTreeMap<Digest, Option<u64>>, bool) {
        let mut closed = false;
        let mut needed = BTreeMap::new();
        for output in record.outputs.values() {
            if output.form == OutputForm::File {
                needed.insert(output.digest, Some(output.bytes));
                continue;
            }
            needed.insert(output.digest, None);
            let listed = self.read_tree(output.digest);
            closed |= matches!(listed, Err(Unsound::Denied(_) | Unsound::Passing(_)));
            for entry in listed.unwrap_or_default() {
                needed.insert(entry.digest, Some(entry.bytes));
            }
        }
        (needed, closed)
    }

    /// Reads every record and object and says what is not what its name says. With `repair` damaged
    /// files, and records that lack an object, are moved to the quarantine, so that the next run
    /// makes them anew; what cannot be read stays. Calls `progress` with bytes done and all bytes.
    ///
    /// # Errors
    /// [`CacheError`] where a folder cannot be listed.
    pub fn verify_all(
        &self,
        repair: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Verified, CacheError> {
        let (kept, held) = (self.kept()?, self.held()?);
        let mut verified =
            Verified { records: kept.len(), objects: held.len(), ..Verified::default() };
        let below =
            |path: &Path| path.strip_prefix(&self.root).unwrap_or(path).display().to_string();
        let mut report = |path: &Path, unsound: Unsound| match unsound {
            Unsound::Damaged(what) => {
                if repair {
                    self.quarantine(path);
                }
                let quarantined = repair && !path.exists();
                verified.damage.push(Damage { file: below(path), what, quarantined });
            }
            unreadable => {
                let what = unreadable.to_string();
                verified.unreadable.push(Unreadable { file: below(path), what });
            }
        };
        let total = held.iter().map(|o| o.bytes).sum();
        // What may be sound counts as such.
        let (mut sound, mut done) = (BTreeMap::new(), 0);
        for object in &held {
            let found = wrong_with(object);
            if !matches!(found, Err(Unsound::Damaged(_))) {
                sound.extend(object.digest.map(|digest| (digest, object.bytes)));
            }
            if let Err(unsound) = found {
                report(&object.path, unsound);
            }
            done += object.bytes;
            progress(done, total);
        }
        for kept in &kept {
            if let Some(unsound) = self.wrong_with_record(kept, &sound) {
                report(&kept.path, unsound);
            }
        }
        verified.bytes = total;
        Ok(verified)
    }

    fn wrong_with_record(&self, kept: &Kept, sound: &BTreeMap<Digest, u64>) -> Option<Unsound> {
        match &kept.record {
            Ok(record) => self.lacks(record, sound).map(Unsound::Damaged),
            Err(_) => sound_record(&kept.path).err(),
        }
    }

    /// What of a record is not among the sound objects.
    fn lacks(&self, record: &Record, sound: &BTreeMap<Digest, u64>) -> Option<String> {
        let lacks = |(digest, bytes): (&Digest, &Option<u64>)| match sound.get(digest) {
            None => Some(format!("object {} of it is missing or damaged", digest.short())),
            Some(found) if bytes.is_some_and(|b| b != *found) => {
                Some(format!("object {} of it has another size", digest.short()))
            }
            Some(_) => None,
        };
        let what = self.needed(record).iter().find_map(lacks)?;
        Some(format!("stage `{}`: {what}", record.stage))
    }

    /// Bytes of what is neither an object nor a record, by folder.
    pub fn folders(&self) -> BTreeMap<String, u64> {
        let names = ["scratch", "logs", "tmp", "quarantine", "listings-v1", "runs"];
        let bytes = |name: &str| (name.to_owned(), bytes_below(&self.root.join(name)));
        names.into_iter().map(bytes).collect()
    }

    /// Fingerprints that the user pinned.
    ///
    /// # Errors
    /// [`CacheError`] where the folder cannot be listed.
    pub fn pins(&self) -> Result<BTreeSet<Fingerprint>, CacheError> {
        let files = files_at(&self.root.join("pins"), 1)?;
        let parse = |path: &PathBuf| path.file_name()?.to_str()?.parse().ok();
        Ok(files.iter().filter_map(parse).collect())
    }

    /// Keeps a record from gc, or lets go of it again. Whether that changed anything.
    ///
    /// # Errors
    /// [`CacheError`] where the cache cannot be written.
    pub fn set_pinned(&self, fingerprint: Fingerprint, pinned: bool) -> Result<bool, CacheError> {
        let path = self.root.join("pins").join(fingerprint.to_hex());
        let io = |e| CacheError::io("write", &path, e);
        if pinned {
            durable::create_synced_parent(&path).map_err(io)?;
            return match File::options().write(true).create_new(true).open(&path) {
                Ok(_) => Ok(true),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(io(e)),
            };
        }
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(io(e)),
        }
    }
}

/// The record in a file, which must be the one that its name says.
fn sound_record(path: &Path) -> Result<Record, Unsound> {
    let text = durable::read(path).map_err(|e| Unsound::unreadable(path, &e))?;
    let record = Record::from_text(&text).map_err(Unsound::Damaged)?;
    let (kind, name) = (path.parent().and_then(Path::file_name), path.file_stem());
    let hex = record.fingerprint.to_hex();
    if name.is_none_or(|n| n != hex.as_str())
        || kind.is_none_or(|k| k != record.identity.kind.as_str())
    {
        return Err(Unsound::Damaged("is not the record that its name says".to_owned()));
    }
    Ok(record)
}

fn wrong_with(object: &Held) -> Result<(), Unsound> {
    let damaged = |what: &str| Err(Unsound::Damaged(what.to_owned()));
    let Some(digest) = object.digest else {
        return damaged("is no name of an object");
    };
    match File::open(&object.path).and_then(|f| hash(&f)) {
        Ok(found) if found == digest => Ok(()),
        Ok(_) => damaged("holds other bytes than its digest says"),
        Err(e) => Err(Unsound::unreadable(&object.path, &e)),
    }
}
