//! From the remote into the cache. Nothing enters the cache before its digest was checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use contract::OutputForm;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};

use super::client::Remote;
use super::disk::Disk;
use super::multipart::Cut;
use super::store::{REQUESTS, Store};
use super::{RemoteError, Watch};
use crate::cache::{Acquired, Cache, CacheError, Partial, TreeEntry};
use crate::digest::Digest;
use crate::record::Record;

/// Objects up to this size are asked for many at a time.
const SMALL: u64 = 1 << 20;
/// Objects up to this size are held in memory whole; bigger ones come in parts of it.
const PART: u64 = 8 << 20;
/// Objects between the two that are on their way at the same time.
const HEAVY_REQUESTS: usize = 8;
/// Parts of one object, and big objects, on their way at the same time.
const PARTS: usize = 4;
const BIG_OBJECTS: usize = 3;
/// Parts of one object after which the disk begins to flush them.
const FLUSHED_TOGETHER: usize = 3;
/// A listing beyond this is none.
const MAX_LISTING: u64 = 256 << 20;
/// How often a transfer by another process is looked at.
const POLL: Duration = Duration::from_millis(200);

/// What one transfer moves and how far it is.
struct Transfer<'a> {
    remote: &'a Remote,
    store: &'a Store,
    cache: &'a Cache,
    disk: Disk,
    watch: Watch<'a>,
    done: AtomicU64,
    total: u64,
}

/// Brings every object of a record to the disk's thread; the bytes that had to come.
pub(super) async fn record(
    remote: &Remote,
    store: &Store,
    cache: &Cache,
    record: &Record,
    disk: Disk,
    watch: Watch<'_>,
) -> Result<u64, RemoteError> {
    let (mut small, mut middle, mut big) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut need = |digest: Digest, bytes: u64| {
        // One that nothing refers to must not go before the record is here.
        if cache.verify(digest, Some(bytes)).is_err() || cache.renew(digest).is_err() {
            let class = if bytes <= SMALL {
                &mut small
            } else if bytes <= PART {
                &mut middle
            } else {
                &mut big
            };
            class.insert(digest, bytes);
        }
    };
    for output in record.outputs.values() {
        if output.form == OutputForm::File {
            need(output.digest, output.bytes);
            continue;
        }
        if cache.tree(output.digest).is_err() || cache.renew(output.digest).is_err() {
            listing(remote, store, cache, output.digest).await?;
        }
        let damaged = |what| RemoteError::Damaged(format!("a listing of the remote {what}"));
        for entry in cache.tree(output.digest).map_err(damaged)? {
            need(entry.digest, entry.bytes);
        }
    }
    let total = [&small, &middle, &big].into_iter().flat_map(BTreeMap::values).sum();
    let transfer = Transfer { remote, store, cache, disk, watch, done: AtomicU64::new(0), total };
    transfer.whole_ones(small, REQUESTS).await?;
    transfer.whole_ones(middle, HEAVY_REQUESTS).await?;
    let bigs = stream::iter(big).map(|(digest, bytes)| transfer.big(digest, bytes));
    bigs.buffer_unordered(BIG_OBJECTS).try_collect::<Vec<()>>().await?;
    Ok(total)
}

/// A listing goes into the cache by itself: what else is needed stands in it.
async fn listing(
    remote: &Remote,
    store: &Store,
    cache: &Cache,
    digest: Digest,
) -> Result<(), RemoteError> {
    let bytes = checked(remote, store, digest, None).await?;
    let mut batch = cache.batch()?;
    batch.add(digest, &bytes)?;
    Ok(batch.commit()?)
}

/// The entries of a tree that the remote's record names; `None` where it has no sound listing.
pub(super) async fn tree(
    remote: &Remote,
    store: &Store,
    cache: &Cache,
    digest: Digest,
) -> Result<Option<Vec<TreeEntry>>, RemoteError> {
    if cache.tree(digest).is_err() {
        match listing(remote, store, cache, digest).await {
            Err(RemoteError::Damaged(_)) => return Ok(None),
            brought => brought?,
        }
    } else {
        match store.store.head(&store.object(digest)).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            asked => asked.map_err(|e| remote.failed(&e))?,
        };
    }
    Ok(cache.tree(digest).ok())
}

/// The bytes of an object, which are those of its digest.
async fn checked(
    remote: &Remote,
    store: &Store,
    digest: Digest,
    bytes: Option<u64>,
) -> Result<Vec<u8>, RemoteError> {
    let damaged = |what: &str| {
        remote.mark_damaged(digest);
        RemoteError::Damaged(format!("object {} {what} on the remote", digest.short()))
    };
    let got = match store.store.get(&store.object(digest)).await {
        Ok(got) => got,
        Err(object_store::Error::NotFound { .. }) => return Err(damaged("is missing")),
        Err(error) => return Err(remote.failed(&error)),
    };
    let size = got.meta.size;
    if bytes.map_or(size > MAX_LISTING, |bytes| bytes != size) {
        return Err(damaged("has another size than it should have"));
    }
    let found = Vec::from(got.bytes().await.map_err(|e| remote.failed(&e))?);
    if Digest::of(&found) != digest {
        return Err(damaged("holds other bytes than its digest says"));
    }
    Ok(found)
}

impl Transfer<'_> {
    fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.watch.progress)(done, self.total);
    }

    /// Objects that fit into memory, so many at a time.
    async fn whole_ones(
        &self,
        wanted: BTreeMap<Digest, u64>,
        requests: usize,
    ) -> Result<(), RemoteError> {
        let arriving = stream::iter(wanted).map(|(digest, bytes)| async move {
            let found = checked(self.remote, self.store, digest, Some(bytes)).await?;
            self.disk.whole(digest, found).await?;
            self.advance(bytes);
            Ok::<_, RemoteError>(())
        });
        arriving.buffer_unordered(requests).try_for_each(|()| async { Ok(()) }).await
    }

    /// A big object: by parts, going on where an earlier transfer ended.
    async fn big(&self, digest: Digest, bytes: u64) -> Result<(), RemoteError> {
        let lease = Cache::transfer_lease(digest);
        let _lease = loop {
            match self.cache.lease(lease)? {
                Acquired::Mine(lease) => break lease,
                Acquired::Held(_) => tokio::time::sleep(POLL).await,
            }
        };
        if self.cache.verify(digest, Some(bytes)).is_ok() {
            self.advance(bytes);
            return Ok(());
        }
        let mut partial = self.cache.partial(digest, bytes, PART)?;
        let resumed = (partial.missing().len() as u64) < bytes.div_ceil(PART);
        self.parts(digest, bytes, &mut partial).await?;
        match self.disk.big(partial, digest).await {
            // What an earlier transfer left may be what is wrong.
            Err(CacheError::Damaged(_)) if resumed => {
                let mut afresh = self.cache.partial(digest, bytes, PART)?;
                self.parts(digest, bytes, &mut afresh).await?;
                self.disk.big(afresh, digest).await.map_err(|e| self.wrong(digest, e))
            }
            adopted => adopted.map_err(|e| self.wrong(digest, e)),
        }
    }

    fn wrong(&self, digest: Digest, error: CacheError) -> RemoteError {
        match error {
            CacheError::Damaged(what) => self.missing(digest, &what),
            error => error.into(),
        }
    }

    async fn parts(
        &self,
        digest: Digest,
        bytes: u64,
        partial: &mut Partial,
    ) -> Result<(), RemoteError> {
        let path = &self.store.object(digest);
        let missing = partial.missing();
        let open: u64 = missing.iter().map(|(_, range)| range.end - range.start).sum();
        self.advance(bytes - open);
        let file = &partial.file().map_err(|e| CacheError::Unfit(e.to_string()))?;
        // After a failure, what is on its way still arrives, for the next attempt.
        let (mut result, stop) = (Ok(()), &AtomicBool::new(false));
        let mut arrived_parts = 0_usize;
        let mut arriving = stream::iter(missing)
            .map(|(part, range)| async move {
                if stop.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                let fits = self.part(path, bytes, range, file).await?;
                Ok::<_, Cut>(Some((part, fits)))
            })
            .buffered(PARTS);
        while let Some(arrived) = arriving.next().await {
            let failed = match arrived {
                Ok(None) => continue,
                Ok(Some((_, false))) => self.missing(digest, "has another size"),
                Ok(Some((part, true))) => {
                    partial.arrived(part)?;
                    arrived_parts += 1;
                    if arrived_parts.is_multiple_of(FLUSHED_TOGETHER) {
                        self.disk.flush(partial);
                    }
                    continue;
                }
                Err(Cut::Store(object_store::Error::NotFound { .. })) => {
                    self.missing(digest, "is missing")
                }
                Err(Cut::Store(object_store::Error::NotSupported { .. })) => {
                    drop(arriving);
                    return self.whole(digest, bytes, partial).await;
                }
                Err(cut) => cut.into_error(self.remote),
            };
            stop.store(true, Ordering::Relaxed);
            result = result.and(Err(failed));
        }
        result
    }

    /// Writes a part to its place as it arrives; whether it has the right size.
    async fn part(
        &self,
        path: &Path,
        bytes: u64,
        range: Range<u64>,
        file: &File,
    ) -> Result<bool, Cut> {
        let options =
            GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let got = self.store.store.get_opts(path, options).await.map_err(Cut::Store)?;
        if got.meta.size != bytes || got.range != range {
            return Ok(false);
        }
        let mut at = range.start;
        let mut body = got.into_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(Cut::Store)?;
            let end = at + piece.len() as u64;
            if end > range.end {
                return Ok(false);
            }
            file.write_all_at(&piece, at).map_err(|e| {
                Cut::Own(CacheError::Unfit(format!("could not write an object: {e}")).into())
            })?;
            self.advance(piece.len() as u64);
            at = end;
        }
        Ok(at == range.end)
    }

    fn missing(&self, digest: Digest, what: &str) -> RemoteError {
        self.remote.mark_damaged(digest);
        RemoteError::Damaged(format!("object {} {what} on the remote", digest.short()))
    }

    /// In one go, from servers that give no ranges.
    async fn whole(
        &self,
        digest: Digest,
        bytes: u64,
        partial: &Partial,
    ) -> Result<(), RemoteError> {
        let failed = |e: object_store::Error| self.remote.failed(&e);
        let got = self.store.store.get(&self.store.object(digest)).await.map_err(failed)?;
        let mut at = 0;
        let mut body = got.into_stream();
        while let Some(piece) = body.next().await {
            let piece = piece.map_err(failed)?;
            let end = at + piece.len() as u64;
            if end > bytes {
                break;
            }
            partial.write_at(&piece, at)?;
            self.advance(piece.len() as u64);
            at = end;
        }
        if at == bytes { Ok(()) } else { Err(self.missing(digest, "has another size")) }
    }
}
