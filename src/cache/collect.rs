//! Garbage collection: what no pipeline reaches goes, the longest unused first.
//!
//! Safe beside running stages: a run touches the record that it reuses (see [`Cache::keep`]), and
//! nothing that was made or touched within [`GRACE`] is removed, which is looked at again once the
//! file is out of reach of whoever could touch it; records go before the objects that only they
//! need, which are looked up afterwards.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::roots::FORGOTTEN;
use super::survey::{Held, Kept, bytes_below, files_at};
use super::{Acquired, Cache, CacheError, durable, unix_seconds};
use crate::digest::{Digest, Fingerprint};
use crate::record::Record;

/// What is younger than this stays, whatever else holds.
pub const GRACE: Duration = Duration::from_secs(3600);
/// A run looks at the size of the cache this often at most.
const INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// Unpublished work, checkpoints of killed runs, and what was damaged stay this long.
const LEFTOVERS: Duration = Duration::from_secs(14 * 24 * 3600);
/// What a run did can be looked up for so long.
const HISTORY: Duration = Duration::from_secs(365 * 24 * 3600);
/// A collection that failed is tried again after so long.
const RETRY: Duration = Duration::from_secs(3600);
/// The cap where nobody says otherwise.
pub const DEFAULT_CAP: u64 = 200 << 30;

/// What may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GcOptions {
    /// What was not used for so long goes, whatever the size.
    pub older_than: Option<Duration>,
    /// Checkpoints of unfinished work and records go, the longest unused first, until no more than
    /// so many bytes of them and objects are left.
    pub max_bytes: Option<u64>,
    /// Says what would go and removes nothing.
    pub dry_run: bool,
}

/// What went, or would.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Records removed: stage, and what its record is called.
    pub records: Vec<(String, String)>,
    /// Objects removed.
    pub objects: usize,
    /// Other files and folders removed: scratch, logs, working files, quarantine.
    pub leftovers: usize,
    /// Bytes of all that.
    pub bytes: u64,
    /// Bytes of the objects that are left.
    pub bytes_left: u64,
    /// Records that this user may not read, themselves or the listing of an output. What they need is
    /// not known, so that no object goes while there are any.
    pub closed: usize,
    /// Files that say what pipelines and runs use and that this user may not read. No record goes
    /// while there are any.
    pub hidden: usize,
}

pub(super) fn age(time: SystemTime) -> Duration {
    SystemTime::now().duration_since(time).unwrap_or_default()
}

pub(super) fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

impl Cache {
    /// Marks a record as in use; false where it has been removed since it was read.
    pub fn keep(&self, record: &Record) -> bool {
        let path = self.record_path(&record.identity.kind, record.fingerprint);
        let Ok(meta) = fs::metadata(&path) else { return false };
        if meta.modified().is_ok_and(|used| age(used) < GRACE / 2) {
            return true;
        }
        // Where the record may not be written it is left as it is.
        durable::touch(&path).is_ok() || path.exists()
    }

    /// Makes an object young that a record yet to come needs: nothing refers to it before.
    ///
    /// # Errors
    /// [`CacheError`] where it is gone, or can be neither touched nor replaced.
    #[cfg_attr(not(feature = "remote"), allow(dead_code, reason = "only remotes find objects"))]
    pub(crate) fn renew(&self, digest: Digest) -> Result<(), CacheError> {
        let path = self.object_path(digest);
        if modified(&path).is_some_and(|stored| age(stored) < GRACE / 2) {
            return Ok(());
        }
        // Objects are read-only, so that only the owner may touch one: another's is replaced by
        // its equal.
        durable::touch(&path)
            .or_else(|_| {
                let copy = self.tmp_dir().join(durable::unique_name());
                durable::create_parent(&copy)?;
                let put = || {
                    fs::copy(&path, &copy)?;
                    fs::File::open(&copy)?.sync_all()?;
                    durable::rename(&copy, &path)
                };
                put().inspect_err(|_| drop(fs::remove_file(&copy)))
            })
            .map_err(|e| CacheError::io("renew", &path, e))
    }

    /// Days since gc removed the record of a fingerprint that is needed now; counts that.
    pub fn missed(&self, fingerprint: Fingerprint) -> Option<u64> {
        let path = self.evicted_path(fingerprint);
        let evicted: u64 = fs::read_to_string(&path).ok()?.trim().parse().ok()?;
        let needed = self.root.join("evicted-needed").join(fingerprint.to_hex());
        let moved = durable::create_parent(&needed).and_then(|()| fs::rename(&path, &needed));
        if let Err(error) = moved {
            tracing::debug!(%error, "could not count an eviction that was needed");
        }
        Some(unix_seconds().saturating_sub(evicted) / 86_400)
    }

    /// How often something was needed again after gc had removed it.
    ///
    /// # Errors
    /// [`CacheError`] where the folder cannot be listed.
    pub fn missed_count(&self) -> Result<usize, CacheError> {
        Ok(files_at(&self.root.join("evicted-needed"), 1)?.len())
    }

    fn evicted_path(&self, fingerprint: Fingerprint) -> PathBuf {
        self.root.join("evicted").join(fingerprint.to_hex())
    }

    /// Collects where the last look is more than a day ago and the cache is larger than `cap`. Who
    /// may not write down that they looked leaves it to others.
    ///
    /// # Errors
    /// [`CacheError`] as [`Cache::collect`].
    pub fn collect_if_due(&self, cap: u64) -> Result<Option<Collected>, CacheError> {
        let stamp = self.root.join("gc-stamp");
        if modified(&stamp).is_some_and(|looked| age(looked) < INTERVAL) {
            return Ok(None);
        }
        if let Err(error) = durable::replace(&self.tmp_dir(), &stamp, b"") {
            tracing::debug!(%error, "not looked through: {} cannot be written", stamp.display());
            return Ok(None);
        }
        let options = GcOptions { older_than: None, max_bytes: Some(cap), dry_run: false };
        self.collect(options).map(Some).inspect_err(|_| {
            let soon = SystemTime::now() - INTERVAL + RETRY;
            let _ = fs::File::open(&stamp).and_then(|file| file.set_modified(soon));
        })
    }

    /// Removes what `options` allow and no pipeline, pin or running stage needs.
    ///
    /// # Errors
    /// [`CacheError`] where a folder cannot be listed or a file not removed.
    pub fn collect(&self, options: GcOptions) -> Result<Collected, CacheError> {
        let mut collected = Collected::default();
        let scratch = self.collect_scratch(options, &mut collected)?;
        let gone = self.collect_records(options, scratch, &mut collected)?;
        let held = self.held()?;
        self.collect_objects(options, &gone, held, &mut collected)?;
        self.collect_leftovers(options, &gone, &mut collected)?;
        Ok(collected)
    }

    /// Checkpoints of executions that never ended; returns the bytes of those that stay.
    fn collect_scratch(
        &self,
        options: GcOptions,
        collected: &mut Collected,
    ) -> Result<u64, CacheError> {
        let mut all = Vec::new();
        for path in files_at(&self.root.join("scratch"), 1)? {
            all.extend(newest(&path).map(|used| (used, bytes_below(&path), path)));
        }
        all.sort();
        let mut left = all.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        let objects = self.held()?.iter().map(|o| o.bytes).sum::<u64>();
        for (used, bytes, path) in all {
            let old = age(used) > options.older_than.unwrap_or(LEFTOVERS).min(LEFTOVERS);
            let large = options.max_bytes.is_some_and(|limit| objects + left > limit);
            if !(old || large) || age(used) < GRACE {
                continue;
            }
            let fingerprint = path.file_name().and_then(|n| n.to_str()?.parse().ok());
            let lease =
                fingerprint.filter(|_| !options.dry_run).map(|f| self.lease(f)).transpose()?;
            if matches!(lease, Some(Acquired::Held(_))) {
                continue;
            }
            left -= bytes;
            collected.leftovers += 1;
            collected.bytes += bytes;
            remove(&path, options)?;
        }
        Ok(left)
    }

    fn collect_records(
        &self,
        options: GcOptions,
        scratch: u64,
        collected: &mut Collected,
    ) -> Result<BTreeSet<Fingerprint>, CacheError> {
        let roots = self.roots_and_hidden(&mut collected.hidden)?;
        let running = self.used_by_runs(&mut collected.hidden)?;
        let pins = self.pins()?;
        if collected.hidden > 0 {
            return Ok(BTreeSet::new());
        }
        let mut kept = self.kept()?;
        kept.sort_by_key(|k| k.used);
        let (mut references, mut bytes) = (std::collections::BTreeMap::new(), scratch);
        let held: std::collections::BTreeMap<Digest, u64> =
            self.held()?.iter().filter_map(|o| Some((o.digest?, o.bytes))).collect();
        for record in kept.iter().filter_map(|k| k.record.as_ref().ok()) {
            for digest in self.needed(record).into_keys() {
                let count = references.entry(digest).or_insert(0usize);
                *count += 1;
                bytes += if *count == 1 { held.get(&digest).copied().unwrap_or(0) } else { 0 };
            }
        }
        let (mut gone, mut folders) = (BTreeSet::new(), BTreeSet::new());
        for Kept { path, used, record, .. } in &kept {
            let Ok(record) = record else { continue };
            let fingerprint = record.fingerprint;
            let old = options.older_than.is_some_and(|limit| age(*used) > limit);
            let large = options.max_bytes.is_some_and(|limit| bytes > limit);
            let needed = roots.contains_key(&fingerprint)
                || running.contains(&fingerprint)
                || pins.contains(&fingerprint);
            if !(old || large) || needed || age(*used) < GRACE {
                continue;
            }
            let needed = self.needed(record);
            if !options.dry_run && !self.evict(path, fingerprint)? {
                continue;
            }
            for digest in needed.into_keys() {
                let count = references.entry(digest).or_insert(1);
                *count -= 1;
                bytes -= if *count == 0 { held.get(&digest).copied().unwrap_or(0) } else { 0 };
            }
            gone.insert(fingerprint);
            folders.extend(path.parent());
            collected.records.push((record.stage.clone(), fingerprint.to_hex()));
        }
        // Before their objects: a power cut must not leave a record without them.
        for folder in folders.iter().filter(|_| !options.dry_run) {
            durable::sync_dir(folder).map_err(|e| CacheError::io("flush", folder, e))?;
        }
        Ok(gone)
    }

    /// Removes a record unless a run has touched it or works on it.
    fn evict(&self, path: &Path, fingerprint: Fingerprint) -> Result<bool, CacheError> {
        let Acquired::Mine(_lease) = self.lease(fingerprint)? else { return Ok(false) };
        if modified(path).is_none_or(|used| age(used) < GRACE) {
            return Ok(false);
        }
        // First: flushing takes long, and the record may be touched meanwhile.
        let tombstone = self.evicted_path(fingerprint);
        let text = unix_seconds().to_string();
        durable::replace(&self.tmp_dir(), &tombstone, text.as_bytes())
            .map_err(|e| CacheError::io("write", &tombstone, e))?;
        let removed = self.remove_unless_young(path);
        if !matches!(removed, Ok(true)) {
            let _ = fs::remove_file(&tombstone);
        }
        removed
    }

    /// Removes a file unless it was touched within [`GRACE`]. Whoever touches it either comes
    /// before it is set aside, which shows in its time, or finds it gone.
    fn remove_unless_young(&self, path: &Path) -> Result<bool, CacheError> {
        let io = |e| CacheError::io("remove", path, e);
        let aside = self.tmp_dir().join(durable::unique_name());
        durable::create_parent(&aside).map_err(io)?;
        match durable::rename(path, &aside) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            moved => moved.map_err(io)?,
        }
        // What an opened file says is what the server of a network file system says.
        let opened = fs::File::open(&aside).and_then(|f| f.metadata()?.modified()).ok();
        let young = opened.or_else(|| modified(&aside)).is_some_and(|used| age(used) < GRACE);
        if young && durable::rename_exclusive(&aside, path).map_err(io)? {
            // A power cut must not leave it where it was set aside.
            let folder = path.parent().unwrap_or(&self.root);
            durable::sync_dir(folder).map_err(|e| CacheError::io("flush", folder, e))?;
        } else {
            // Old, or an equal has taken its place meanwhile.
            remove_whatever(&aside).map_err(io)?;
        }
        Ok(!young)
    }

    /// `held` may be as old as it likes: what was touched since stays.
    pub(super) fn collect_objects(
        &self,
        options: GcOptions,
        gone: &BTreeSet<Fingerprint>,
        held: Vec<Held>,
        collected: &mut Collected,
    ) -> Result<(), CacheError> {
        let mut needed = BTreeSet::new();
        for kept in self.kept()? {
            match kept.record {
                Ok(record) if gone.contains(&record.fingerprint) => {}
                Ok(record) => {
                    let (digests, closed) = self.needed_and_closed(&record);
                    needed.extend(digests.into_keys());
                    collected.closed += usize::from(closed);
                }
                Err(_) if kept.closed => collected.closed += 1,
                // What a damaged record needs is not known.
                Err(_) => {}
            }
        }
        for object in held {
            let unneeded = object.digest.is_none_or(|digest| !needed.contains(&digest));
            let goes = unneeded && collected.closed == 0 && age(object.stored) >= GRACE;
            if !goes || !(options.dry_run || self.remove_unless_young(&object.path)?) {
                collected.bytes_left += object.bytes;
                continue;
            }
            collected.objects += 1;
            collected.bytes += object.bytes;
        }
        Ok(())
    }

    fn collect_leftovers(
        &self,
        options: GcOptions,
        gone: &BTreeSet<Fingerprint>,
        collected: &mut Collected,
    ) -> Result<(), CacheError> {
        // Listings by digest, and what pipelines last ran as, lie deeper: `newest` looks below.
        let short = ["tmp", "logs", "quarantine", "listings-v1", "evicted", "leases", "running"];
        let long = [("roots", FORGOTTEN), ("last", FORGOTTEN)];
        let longest = ["runs", "evicted-needed"].map(|folder| (folder, HISTORY));
        let long = long.into_iter().chain(longest);
        for (folder, limit) in short.map(|folder| (folder, LEFTOVERS)).into_iter().chain(long) {
            for path in files_at(&self.root.join(folder), 1)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let fingerprint: Option<Fingerprint> = name.parse().ok();
                let is_log = folder == "logs";
                let orphaned = is_log && fingerprint.is_some_and(|f| gone.contains(&f));
                // The log of a record lives as long as the record.
                let is_kept = is_log && fingerprint.is_some();
                let left_behind = !is_kept && newest(&path).is_some_and(|time| age(time) > limit);
                if orphaned || left_behind {
                    collected.leftovers += 1;
                    collected.bytes += bytes_below(&path);
                    remove(&path, options)?;
                }
            }
        }
        Ok(())
    }
}

/// The newest time of anything below a path.
fn newest(path: &Path) -> Option<SystemTime> {
    let own = fs::symlink_metadata(path).ok()?;
    let mut time = own.modified().ok()?;
    if own.is_dir() {
        for entry in fs::read_dir(path).ok()?.flatten() {
            time = time.max(newest(&entry.path())?);
        }
    }
    Some(time)
}

fn remove(path: &Path, options: GcOptions) -> Result<(), CacheError> {
    if options.dry_run {
        return Ok(());
    }
    remove_whatever(path).map_err(|e| CacheError::io("remove", path, e))
}

/// Removes a file or a folder, which may be gone already.
fn remove_whatever(path: &Path) -> std::io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
