//! One remote of one invocation: opened at the first question, given up at the first silence.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use object_store::path::Path;
use object_store::{GetResult, ObjectStoreExt};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::disk::Disk;
use super::store::{Patience, Store, open, told, unavailable};
use super::{Answer, Offered, RemoteError, Settings, Watch, disk, download, sign, upload};
use crate::cache::Cache;
use crate::digest::{Digest, Fingerprint};
use crate::record::{OutputRecord, Record};

/// A remote that has never answered is given up after this long, whatever it does.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// A question to one that has.
const ANSWER: Duration = Duration::from_secs(10);
/// A transfer that has moved nothing for this long asks whether anybody is still there.
const QUIET: Duration = Duration::from_secs(5);
/// Records are small; anything beyond this is none.
const MAX_RECORD: u64 = 64 << 20;
/// How often a transfer looks for an interrupt.
const TICK: Duration = Duration::from_millis(50);

/// A remote.
#[derive(Debug)]
pub struct Remote {
    settings: Settings,
    open: OnceLock<Open>,
    opening: Mutex<()>,
    answered: AtomicBool,
    given_up: AtomicBool,
    /// Said that records cannot be signed.
    unsignable: AtomicBool,
    /// Objects found damaged or missing: the only ones that an upload replaces.
    pub(super) damaged: Mutex<BTreeSet<Digest>>,
}

#[derive(Debug)]
struct Open {
    runtime: Runtime,
    asking: Store,
    moving: Store,
}

/// A record as it lies on the remote.
pub(super) struct Found {
    pub(super) value: Value,
    pub(super) version: object_store::UpdateVersion,
}

impl Remote {
    /// A remote that nobody has asked yet; no network is touched.
    ///
    /// # Errors
    /// [`RemoteError`] never in this build.
    pub fn open(settings: Settings) -> Result<Self, RemoteError> {
        Ok(Self {
            settings,
            open: OnceLock::new(),
            opening: Mutex::new(()),
            answered: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            unsignable: AtomicBool::new(false),
            damaged: Mutex::default(),
        })
    }

    /// What it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Asks for the record of a fingerprint.
    ///
    /// # Errors
    /// [`RemoteError::Unavailable`] once, then [`RemoteError::GivenUp`].
    pub fn ask(&self, kind: &str, fingerprint: Fingerprint) -> Result<Answer, RemoteError> {
        let found = self.question(|store| async move {
            let path = store.record(kind, fingerprint);
            get_record(&store, &path).await
        })?;
        let Some(Found { value, .. }) = found else { return Ok(Answer::Absent) };
        Ok(match self.usable(value, fingerprint) {
            Ok(record) => Answer::Found(Box::new(record)),
            Err(why) => Answer::Refused(why),
        })
    }

    /// Whether a record of the remote may be used, as far as it says itself.
    pub(super) fn usable(&self, value: Value, of: Fingerprint) -> Result<Record, String> {
        sign::check(&value, &self.settings.trusted_keys)?;
        let record: Record = serde_json::from_value(value).map_err(|e| format!("{e}"))?;
        if record.fingerprint != of || record.identity.fingerprint() != of {
            return Err("it is of another execution".to_owned());
        }
        // These become paths when inputs are laid out.
        let plain = |o: &OutputRecord| {
            let name = o.file_name.as_str();
            !["", ".", ".."].contains(&name) && !name.contains(['/', '\0'])
        };
        match record.outputs.iter().find(|(_, output)| !plain(output)) {
            Some((name, _)) => Err(format!("its output `{name}` has a file name that is a path")),
            None => Ok(record),
        }
    }

    /// Brings every object of a record into the cache: the bytes that had to come.
    ///
    /// # Errors
    /// [`RemoteError::Damaged`] where the remote lacks an object or has other bytes.
    pub fn fetch(
        &self,
        cache: &Cache,
        record: &Record,
        watch: Watch<'_>,
    ) -> Result<u64, RemoteError> {
        let (disk, arriving) = Disk::new();
        std::thread::scope(|scope| {
            let kept = scope.spawn(|| disk::keep(cache, arriving));
            let fetched = self.transfer(record, watch, async move |store, watch| {
                download::record(self, &store, cache, record, disk, watch).await
            });
            // Why the disk gave up says more than that it did; what has come stays in any case.
            kept.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            fetched
        })
    }

    /// Adds a record and its objects, which must be whole in the cache. `verify` asks for every
    /// object although the remote has the record.
    ///
    /// # Errors
    /// [`RemoteError`]; then the record is not there, unless it was before.
    pub fn offer(
        &self,
        cache: &Cache,
        record: &Record,
        verify: bool,
        watch: Watch<'_>,
    ) -> Result<Offered, RemoteError> {
        let signer = self.signer().map_err(|error| {
            let told = self.unsignable.swap(true, Ordering::SeqCst);
            if told { RemoteError::GivenUp { remote: self.settings.shown() } } else { error }
        })?;
        // Finds out within seconds whether anybody is there.
        let path = |store: &Store| store.record(&record.identity.kind, record.fingerprint);
        let found =
            self.question(|store| async move { get_record(&store, &path(&store)).await })?;
        self.transfer(record, watch, async move |store, watch| {
            upload::record(self, &store, cache, record, signer.as_ref(), found, verify, watch).await
        })
    }

    /// What signs records; none where nobody asks for signatures.
    fn signer(&self) -> Result<Option<sign::Signer>, RemoteError> {
        let signer = sign::Signer::of(&self.settings)?;
        let trusted = &self.settings.trusted_keys;
        let own = signer.as_ref().map(sign::Signer::public);
        if !trusted.is_empty() && own.is_none_or(|key| !trusted.contains(&key)) {
            return Err(RemoteError::config(
                "nobody would believe a record that is not signed by one of `trusted_keys`",
                "name the key file as `sign: FILE`, or put the key into PIPE_SIGN_KEY",
            ));
        }
        Ok(signer)
    }

    fn inner(&self) -> Result<&Open, RemoteError> {
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        let _one = self.opening.lock();
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|e| unavailable(&self.settings, e.to_string()))?;
        let asking = open(&self.settings, Patience::Little)?;
        let moving = open(&self.settings, Patience::Much)?;
        Ok(self.open.get_or_init(|| Open { runtime, asking, moving }))
    }

    /// A short exchange, within a time limit.
    fn question<T, F>(&self, ask: impl FnOnce(Store) -> F) -> Result<T, RemoteError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        self.check_given_up()?;
        let open = self.inner().map_err(|error| self.give_up(error))?;
        let answered = self.answered.load(Ordering::Relaxed);
        let (store, limit) =
            if answered { (&open.moving, ANSWER) } else { (&open.asking, FIRST_ANSWER) };
        let asked =
            open.runtime.block_on(async { tokio::time::timeout(limit, ask(store.clone())).await });
        let failed = match asked {
            Ok(Ok(answer)) => {
                self.answered.store(true, Ordering::Relaxed);
                return Ok(answer);
            }
            Ok(Err(error)) => told(&error),
            Err(_) => format!("no answer within {} s", limit.as_secs()),
        };
        Err(self.give_up(unavailable(&self.settings, failed)))
    }

    /// A long exchange about a record, until the user interrupts or the remote is gone. However
    /// patiently its requests are repeated, somebody must be there to hear them.
    fn transfer<T>(
        &self,
        record: &Record,
        watch: Watch<'_>,
        work: impl AsyncFnOnce(Store, Watch<'_>) -> Result<T, RemoteError>,
    ) -> Result<T, RemoteError> {
        self.check_given_up()?;
        let open = self.inner()?;
        let interrupted = async {
            while watch.interrupts.load(Ordering::Relaxed) == 0 {
                tokio::time::sleep(TICK).await;
            }
        };
        let moved = AtomicU64::new(0);
        let progress = |done, total| {
            moved.store(done, Ordering::Relaxed);
            (watch.progress)(done, total);
        };
        let watched = Watch { progress: &progress, interrupts: watch.interrupts };
        let path = open.asking.record(&record.identity.kind, record.fingerprint);
        let result = open.runtime.block_on(async {
            tokio::select! {
                result = work(open.moving.clone(), watched) => result,
                () = interrupted => Err(RemoteError::Interrupted),
                what = gone(&open.asking, &path, &moved) => Err(unavailable(&self.settings, what)),
            }
        });
        result.map_err(|error| match error {
            RemoteError::Unavailable { .. } => self.give_up(error),
            other => other,
        })
    }

    fn check_given_up(&self) -> Result<(), RemoteError> {
        if self.given_up.load(Ordering::SeqCst) {
            return Err(RemoteError::GivenUp { remote: self.settings.shown() });
        }
        Ok(())
    }

    /// Of several threads that find the remote unusable, one tells why.
    fn give_up(&self, why: RemoteError) -> RemoteError {
        if self.given_up.swap(true, Ordering::SeqCst) {
            return RemoteError::GivenUp { remote: self.settings.shown() };
        }
        why
    }

    /// An error of the store during a transfer.
    pub(super) fn failed(&self, error: &object_store::Error) -> RemoteError {
        unavailable(&self.settings, told(error))
    }

    /// Remembers that an object of the remote must be replaced.
    pub(super) fn mark_damaged(&self, digest: Digest) {
        if let Ok(mut damaged) = self.damaged.lock() {
            damaged.insert(digest);
        }
    }
}

/// Returns, with what is wrong, once nothing has moved for a while and nobody answers.
async fn gone(store: &Store, path: &Path, moved: &AtomicU64) -> String {
    loop {
        let before = moved.load(Ordering::Relaxed);
        tokio::time::sleep(QUIET).await;
        if moved.load(Ordering::Relaxed) != before {
            continue;
        }
        match tokio::time::timeout(FIRST_ANSWER, store.store.head(path)).await {
            Err(_) => return format!("no answer within {} s", FIRST_ANSWER.as_secs()),
            // What is refused is refused by somebody; the transfer learns that by itself.
            Ok(Err(error @ object_store::Error::Generic { .. })) => return told(&error),
            Ok(_) => {}
        }
    }
}

/// A record as it lies there; `None` where there is none. One that does not parse is `null`.
pub(super) async fn get_record(store: &Store, path: &Path) -> object_store::Result<Option<Found>> {
    let got: GetResult = match store.store.get(path).await {
        Ok(got) => got,
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let version = object_store::UpdateVersion {
        e_tag: got.meta.e_tag.clone(),
        version: got.meta.version.clone(),
    };
    if got.meta.size > MAX_RECORD {
        return Ok(Some(Found { value: Value::Null, version }));
    }
    let value = serde_json::from_slice(&got.bytes().await?).unwrap_or_default();
    Ok(Some(Found { value, version }))
}
