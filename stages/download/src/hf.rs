//! Source `hf`: files of a repository on a hub.
//!
//! The network comes last. A file is taken from this run's scratch, then from the Hugging Face
//! cache, and only then fetched; with a lock entry nothing is asked of the hub but missing bytes.

use std::collections::BTreeSet;
use std::fs;

use crate::digest::hash_file;
use crate::error::DownloadError;
use crate::glob::Patterns;
use crate::hub::{Hub, describe, page, resolve_url};
use crate::hub_cache::HubCache;
use crate::lock::{Expected, Lock, Pins};
use crate::meter::Meter;
use crate::name::hint;
use crate::params::HfSource;
use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::transfer::{Remote, Transfer};
use crate::{Fetched, Landed, fetch_one};

/// A file to get.
struct Wanted {
    path: String,
    size: Option<u64>,
    expected: Option<Expected>,
    /// Other name of its blob in the Hugging Face cache.
    oid: Option<String>,
}

/// Which files, and of which revision.
struct Selection {
    revision: String,
    files: Vec<Wanted>,
}

/// Gets files of a hub's repository.
pub(crate) struct HfFetcher<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) source: &'a HfSource,
    pub(crate) pins: &'a Pins,
    pub(crate) scratch: &'a Scratch,
}

impl HfFetcher<'_> {
    /// Gets all files; `named` are their names where the params pin every one of them.
    pub(crate) fn fetch(
        &self,
        named: Option<BTreeSet<String>>,
        meter: &mut Meter<'_>,
    ) -> Result<Fetched, DownloadError> {
        let transfer = Transfer::new(self.settings)?;
        let selection = match (&self.pins.lock, named) {
            (Some(lock), _) => self.select_locked(lock)?,
            (None, Some(names)) => self.select_named(names),
            (None, None) if self.settings.offline => self.select_cached(meter)?,
            (None, None) => self.select_listed(&transfer)?,
        };
        let sizes = selection.files.iter().map(|wanted| wanted.size);
        meter.expect(sizes.sum::<Option<u64>>().unwrap_or(0));
        let mut files = Vec::new();
        for wanted in &selection.files {
            meter.start(&wanted.path);
            let landed = self.land(&transfer, &selection.revision, wanted, meter)?;
            meter.finish(landed.size);
            files.push(landed);
        }
        Ok(Fetched { revision: Some(selection.revision), files })
    }

    fn select_locked(&self, lock: &Lock) -> Result<Selection, DownloadError> {
        let revision = lock
            .revision
            .clone()
            .ok_or_else(|| DownloadError::Lock { why: "names no revision".to_owned() })?;
        Ok(self.select_known(revision, lock.files.keys().cloned()))
    }

    fn select_named(&self, names: BTreeSet<String>) -> Selection {
        self.select_known(self.source.revision.clone(), names)
    }

    fn select_known(&self, revision: String, names: impl IntoIterator<Item = String>) -> Selection {
        let files = names
            .into_iter()
            .map(|path| Wanted {
                size: self.pins.size(&path),
                expected: self.pins.expected(&path),
                oid: None,
                path,
            })
            .collect();
        Selection { revision, files }
    }

    fn select_listed(&self, transfer: &Transfer) -> Result<Selection, DownloadError> {
        let listing = Hub::new(self.settings, self.source)?.listing()?;
        let names: Vec<String> = listing.files.iter().map(|file| file.path.clone()).collect();
        let chosen: BTreeSet<String> = self.choose(&names, &describe(self.source))?;
        let mut files = Vec::new();
        for file in listing.files.into_iter().filter(|file| chosen.contains(&file.path)) {
            let mut expected = self.pins.expected(&file.path);
            if expected.is_none() && file.is_large {
                let remote = self.remote(&listing.commit, &file.path, Some(file.size), false)?;
                let sha256 = transfer.head(&remote)?.sha256;
                expected = sha256.map(|sha256| Expected { sha256, by: "the hub" });
            }
            let oid = (!file.is_large).then_some(file.oid);
            files.push(Wanted { path: file.path, size: Some(file.size), expected, oid });
        }
        Ok(Selection { revision: listing.commit, files })
    }

    /// Offline without a lock entry: the files of the cached commit, as the Hugging Face tools do.
    fn select_cached(&self, meter: &mut Meter<'_>) -> Result<Selection, DownloadError> {
        let cache = HubCache::of(self.settings, self.source);
        let commit = cache.commit(&self.source.revision);
        let names = cache.snapshot(&commit);
        if names.is_empty() {
            return Err(self.not_cached(&describe(self.source)));
        }
        let place = format!("the Hugging Face cache of {}", describe(self.source));
        let chosen = self.choose(&names, &place)?;
        meter.warn(format!(
            "offline: took the {} matching files that are cached of commit `{commit}`",
            chosen.len()
        ));
        let files: Vec<Wanted> = chosen
            .into_iter()
            .map(|path| Wanted { size: None, expected: self.pins.expected(&path), oid: None, path })
            .collect();
        for wanted in files.iter().filter(|wanted| wanted.path.ends_with(".safetensors.index.json"))
        {
            self.require_shards(&cache, &commit, &wanted.path, &files)?;
        }
        Ok(Selection { revision: commit, files })
    }

    /// A cached index whose shards are not all cached comes from a cut download.
    fn require_shards(
        &self,
        cache: &HubCache,
        commit: &str,
        index: &str,
        files: &[Wanted],
    ) -> Result<(), DownloadError> {
        let Some(path) = cache.candidates(commit, index, &[]).into_iter().next() else {
            return Ok(());
        };
        let text = fs::read(&path).map_err(DownloadError::io("read", &path))?;
        let parsed: serde_json::Value = serde_json::from_slice(&text).unwrap_or_default();
        let folder = index.rsplit_once('/').map_or("", |(folder, _)| folder);
        let shards = parsed["weight_map"].as_object().into_iter().flat_map(|map| map.values());
        let include = compile(&self.source.include)?;
        for shard in shards.filter_map(|shard| shard.as_str()).collect::<BTreeSet<_>>() {
            let shard =
                if folder.is_empty() { shard.to_owned() } else { format!("{folder}/{shard}") };
            let is_wanted = self.source.include.is_empty() || include.matches(&shard);
            if is_wanted && !files.iter().any(|wanted| wanted.path == shard) {
                return Err(self.not_cached(&self.what(&shard)));
            }
        }
        Ok(())
    }

    /// The names that the patterns select.
    fn choose(&self, names: &[String], place: &str) -> Result<BTreeSet<String>, DownloadError> {
        let include = compile(&self.source.include)?;
        let exclude = compile(&self.source.exclude)?;
        if let Some(pattern) = include.first_without_match(names) {
            return Err(DownloadError::NoMatch {
                message: format!("`{pattern}` matches no file of {place}"),
                help: hint(pattern, names),
            });
        }
        let everything = self.source.include.is_empty();
        let chosen: BTreeSet<String> = names
            .iter()
            .filter(|name| everything || include.matches(name))
            .filter(|name| !exclude.matches(name))
            .cloned()
            .collect();
        if chosen.is_empty() {
            return Err(DownloadError::NoMatch {
                message: format!("`include` and `exclude` leave no file of {place}"),
                help: hint("", names),
            });
        }
        Ok(chosen)
    }

    /// Gets one file from the nearest place that has it.
    fn land(
        &self,
        transfer: &Transfer,
        revision: &str,
        wanted: &Wanted,
        meter: &mut Meter<'_>,
    ) -> Result<Landed, DownloadError> {
        if let Some(landed) = self.find_cached(revision, wanted, meter)? {
            return Ok(landed);
        }
        if self.settings.offline {
            return Err(self.not_cached(&self.what(&wanted.path)));
        }
        let is_pinned = wanted.expected.is_some();
        let remote = self.remote(revision, &wanted.path, wanted.size, is_pinned)?;
        let expected = wanted.expected.as_ref();
        fetch_one(transfer, &remote, &wanted.path, expected, self.scratch, meter)
            .map_err(|error| self.name_files(&wanted.path, error))
    }

    /// A file that is gone, with the names near it.
    fn name_files(&self, path: &str, error: DownloadError) -> DownloadError {
        let DownloadError::Missing { what, said, .. } = error else { return error };
        let help = match Hub::new(self.settings, self.source).and_then(|hub| hub.listing()) {
            Ok(listing) => {
                let names: Vec<String> = listing.files.into_iter().map(|file| file.path).collect();
                hint(path, &names)
            }
            Err(DownloadError::Missing { help, .. }) => help,
            Err(_) => "check the repository, the revision and the name".to_owned(),
        };
        DownloadError::Missing { what, said, help }
    }

    fn find_cached(
        &self,
        revision: &str,
        wanted: &Wanted,
        meter: &mut Meter<'_>,
    ) -> Result<Option<Landed>, DownloadError> {
        let cache = HubCache::of(self.settings, self.source);
        let sha256 = wanted.expected.as_ref().map(|expected| expected.sha256.as_str());
        let blobs: Vec<&str> = sha256.into_iter().chain(wanted.oid.as_deref()).collect();
        let commit = cache.commit(revision);
        for path in cache.candidates(&commit, &wanted.path, &blobs) {
            let blob = path.canonicalize().map_err(DownloadError::io("read", &path))?;
            let hashed = hash_file(&blob).map_err(DownloadError::io("read", &blob))?;
            let name = blob.file_name().and_then(|name| name.to_str()).unwrap_or("");
            let is_whole = match sha256 {
                Some(sha256) => hashed.sha256 == sha256,
                // A large file's blob is named by its sha256.
                None if name.len() == 64 => hashed.sha256 == name,
                None => wanted.size.is_none_or(|size| size == hashed.size),
            };
            if is_whole {
                meter.linked += hashed.size;
                meter.log(format!("{}: already in the Hugging Face cache", wanted.path));
                return Ok(Some(Landed::new(&wanted.path, blob, hashed)));
            }
            meter.log(format!("{}: the cached file is another one or damaged", wanted.path));
        }
        Ok(None)
    }

    fn remote(
        &self,
        revision: &str,
        path: &str,
        size: Option<u64>,
        is_pinned: bool,
    ) -> Result<Remote<'_>, DownloadError> {
        Ok(Remote {
            url: resolve_url(self.settings, self.source, revision, path)?,
            token: self.settings.token.as_ref(),
            what: self.what(path),
            page: Some(page(self.settings, self.source)),
            size,
            is_pinned,
        })
    }

    fn what(&self, path: &str) -> String {
        format!("file `{path}` of {}", describe(self.source))
    }

    fn not_cached(&self, what: &str) -> DownloadError {
        let cache = self.settings.hub_cache.clone();
        DownloadError::NotCached { what: what.to_owned(), cache }
    }
}

/// Patterns that the params were checked with.
fn compile(texts: &[String]) -> Result<Patterns, DownloadError> {
    Patterns::new(texts).map_err(|error| DownloadError::Internal(error.to_string()))
}
