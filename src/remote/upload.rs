//! From the cache to the remote: objects first, the record last.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use contract::OutputForm;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::{ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde_json::Value;
use tokio::sync::Semaphore;

use super::client::{Found, Remote, get_record};
use super::sign::Signer;
use super::store::{REQUESTS, Store};
use super::{Offered, RemoteError, Watch, multipart};
use crate::cache::{Cache, CacheError, differing_artifacts};
use crate::digest::Digest;
use crate::record::Record;

/// So small an object is sent without asking whether it is there: the answer comes with it.
const UNASKED: u64 = 64 << 10;
/// Objects up to this size are sent in one request.
const WHOLE: u64 = 64 << 20;
/// Requests with such objects, as far as they fit into [`MEMORY`].
const HEAVY_REQUESTS: usize = 8;
/// MiB that objects on their way may take.
const MEMORY: u32 = 128;
/// Objects that are sent in parts at the same time.
const BIG_OBJECTS: usize = 2;
/// How often a record that changes under our hands is looked at again.
const ATTEMPTS: usize = 4;

/// Objects by digest with their sizes.
type Objects = BTreeMap<Digest, u64>;

struct Transfer<'a> {
    remote: &'a Remote,
    store: &'a Store,
    cache: &'a Cache,
    watch: Watch<'a>,
    done: AtomicU64,
    total: u64,
    memory: Semaphore,
}

/// Adds a record and its objects; `found` is what the remote has in its place.
#[allow(clippy::too_many_arguments, reason = "one call, from the remote's own method")]
pub(super) async fn record(
    remote: &Remote,
    store: &Store,
    cache: &Cache,
    record: &Record,
    signer: Option<&Signer>,
    mut found: Option<Found>,
    verify: bool,
    watch: Watch<'_>,
) -> Result<Offered, RemoteError> {
    if let Err(fault) = cache.check(record) {
        let damaged = || CacheError::Damaged(format!("its output {} {}", fault.output, fault.what));
        return Err(fault.denial(&record.stage).unwrap_or_else(damaged).into());
    }
    let objects = objects(cache, record)?;
    let total = objects.values().sum();
    let (done, memory) = (AtomicU64::new(0), Semaphore::new(MEMORY as usize));
    let transfer = Transfer { remote, store, cache, watch, done, total, memory };
    let mut value = serde_json::to_value(record).map_err(|e| defect(&e))?;
    if let Some(signer) = signer {
        signer.sign(&mut value);
    }
    let mut text = serde_json::to_vec_pretty(&value).map_err(|e| defect(&e))?;
    text.push(b'\n');
    let path = store.record(&record.identity.kind, record.fingerprint);
    let mut sent = false;
    for _ in 0..ATTEMPTS {
        let mut mode = PutMode::Create;
        if let Some(Found { value, version }) = found.take() {
            if let Some(offered) = transfer.standing(record, value, verify).await? {
                return Ok(offered);
            }
            mode = PutMode::Update(version);
        }
        if !sent {
            transfer.objects(&objects).await?;
            sent = true;
        }
        let replaced = mode != PutMode::Create;
        match put(store, &path, text.clone().into(), mode).await {
            Ok(()) => return Ok(Offered::Stored { replaced }),
            // Somebody was faster: look at what they put there.
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => {
                found = get_record(store, &path).await.map_err(|e| remote.failed(&e))?;
            }
            Err(error) => return Err(remote.failed(&error)),
        }
    }
    Err(RemoteError::Damaged("others keep replacing the record on the remote".to_owned()))
}

fn defect(error: &serde_json::Error) -> RemoteError {
    CacheError::Unfit(format!("the record cannot be written: {error}")).into()
}

/// Every object of a record, listings included.
fn objects(cache: &Cache, record: &Record) -> Result<Objects, RemoteError> {
    let mut objects = Objects::new();
    for output in record.outputs.values() {
        if output.form == OutputForm::File {
            objects.insert(output.digest, output.bytes);
            continue;
        }
        objects.insert(output.digest, cache.object_bytes(output.digest)?);
        let listing = format!("listing {}", output.digest.short());
        let entries = cache.read_tree(output.digest).map_err(|e| e.of(&listing))?;
        objects.extend(entries.iter().map(|e| (e.digest, e.bytes)));
    }
    Ok(objects)
}

/// A folder knows no conditional replacement; there, the last of two that replace the same
/// incomplete record wins, and both are whole.
async fn put(
    store: &Store,
    path: &object_store::path::Path,
    text: PutPayload,
    mode: PutMode,
) -> object_store::Result<()> {
    let options = |mode| PutOptions { mode, ..PutOptions::default() };
    match store.store.put_opts(path, text.clone(), options(mode)).await {
        Err(object_store::Error::NotImplemented { .. }) => {
            store.store.put_opts(path, text, options(PutMode::Overwrite)).await.map(drop)
        }
        result => result.map(drop),
    }
}

impl Transfer<'_> {
    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.watch.progress)(done, self.total);
    }

    /// What to say of a record that is there already; `None` where it is proven incomplete, or
    /// where nobody who trusts our keys would use it.
    async fn standing(
        &self,
        ours: &Record,
        theirs: Value,
        verify: bool,
    ) -> Result<Option<Offered>, RemoteError> {
        let Ok(theirs) = self.remote.usable(theirs, ours.fingerprint) else { return Ok(None) };
        let same = differing_artifacts(ours, &theirs).is_empty()
            && ours.outputs.len() == theirs.outputs.len();
        let doubted = self.remote.damaged.lock().is_ok_and(|d| !d.is_empty());
        if same && !verify && !doubted {
            return Ok(Some(Offered::There));
        }
        if !self.complete(&theirs).await? {
            return Ok(None);
        }
        Ok(Some(if same { Offered::There } else { Offered::Differs }))
    }

    /// Whether the remote has every object of its record, at the right size.
    async fn complete(&self, record: &Record) -> Result<bool, RemoteError> {
        let mut objects = Objects::new();
        for output in record.outputs.values() {
            if output.form == OutputForm::File {
                objects.insert(output.digest, output.bytes);
                continue;
            }
            // A listing that is not here is taken from there.
            let Some(listing) =
                super::download::tree(self.remote, self.store, self.cache, output.digest).await?
            else {
                return Ok(false);
            };
            objects.extend(listing.iter().map(|e| (e.digest, e.bytes)));
        }
        let sound = stream::iter(objects)
            .map(|(digest, bytes)| self.has(digest, bytes))
            .buffer_unordered(REQUESTS)
            .try_fold(true, |all, one| async move { Ok(all && one) });
        sound.await
    }

    async fn has(&self, digest: Digest, bytes: u64) -> Result<bool, RemoteError> {
        if self.remote.damaged.lock().is_ok_and(|d| d.contains(&digest)) {
            return Ok(false);
        }
        match self.store.store.head(&self.store.object(digest)).await {
            Ok(meta) => Ok(meta.size == bytes),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.remote.failed(&error)),
        }
    }

    async fn objects(&self, objects: &Objects) -> Result<(), RemoteError> {
        let of = |small: u64, big: u64| {
            let range = objects.iter().filter(move |(_, b)| (small..=big).contains(*b));
            stream::iter(range.map(|(d, b)| (*d, *b)).collect::<Vec<_>>())
        };
        let small = of(0, UNASKED).map(|(digest, bytes)| self.small(digest, bytes));
        small.buffer_unordered(REQUESTS).try_collect::<Vec<()>>().await?;
        let middle = of(UNASKED + 1, WHOLE).map(|(digest, bytes)| self.asked(digest, bytes));
        middle.buffer_unordered(HEAVY_REQUESTS).try_collect::<Vec<()>>().await?;
        let big = of(WHOLE + 1, u64::MAX).map(|(digest, bytes)| self.asked(digest, bytes));
        big.buffer_unordered(BIG_OBJECTS).try_collect::<Vec<()>>().await?;
        Ok(())
    }

    async fn small(&self, digest: Digest, bytes: u64) -> Result<(), RemoteError> {
        let damaged = self.remote.damaged.lock().is_ok_and(|d| d.contains(&digest));
        self.send(digest, bytes, if damaged { PutMode::Overwrite } else { PutMode::Create }).await
    }

    async fn asked(&self, digest: Digest, bytes: u64) -> Result<(), RemoteError> {
        if self.has(digest, bytes).await? {
            self.advance(bytes);
            return Ok(());
        }
        if bytes <= WHOLE {
            // What is there, if anything, has another size.
            return self.send(digest, bytes, PutMode::Overwrite).await;
        }
        multipart::send(self.remote, self.store, self.cache, digest, bytes, &|b| self.advance(b))
            .await
    }

    async fn send(&self, digest: Digest, bytes: u64, mode: PutMode) -> Result<(), RemoteError> {
        // The semaphore is never closed; without a permit, only memory would be at stake.
        let room = u32::try_from(bytes >> 20).unwrap_or(MEMORY).clamp(1, MEMORY);
        let _room = self.memory.acquire_many(room).await.ok();
        let content = self.cache.read_object(digest, 0, bytes as usize)?;
        let options = PutOptions { mode, ..PutOptions::default() };
        let path = self.store.object(digest);
        match self.store.store.put_opts(&path, content.into(), options).await {
            Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => {
                self.advance(bytes);
                Ok(())
            }
            Err(error) => Err(self.remote.failed(&error)),
        }
    }
}
