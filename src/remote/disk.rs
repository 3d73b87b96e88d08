//! What arrives goes to the disk on a thread of its own, so that the network does not wait while the
//! disk flushes.

use std::fs::File;
use std::sync::Arc;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::RemoteError;
use crate::cache::{Batch, Cache, CacheError, Partial};
use crate::digest::Digest;

/// Small objects that are made durable together.
const BATCH: usize = 4096;
/// KiB that may wait for the disk.
const WAITING: usize = 64 << 10;

/// The way to the disk. What it has taken is durable once [`keep`] has ended.
#[derive(Clone)]
pub(super) struct Disk {
    jobs: UnboundedSender<Job>,
    room: Arc<Semaphore>,
}

enum Job {
    /// An object whose digest was checked.
    Whole(Digest, Vec<u8>, OwnedSemaphorePermit),
    /// A file of which much has arrived: what is flushed now need not be at the end.
    Flush(File),
    /// A big object that is to be checked; the answer says whether it took its place.
    Big(Box<Partial>, Digest, oneshot::Sender<Result<(), CacheError>>),
}

/// What arrives on the other side of a [`Disk`].
pub(super) struct Arriving(UnboundedReceiver<Job>);

impl Disk {
    pub(super) fn new() -> (Self, Arriving) {
        let (jobs, arriving) = unbounded_channel();
        (Self { jobs, room: Arc::new(Semaphore::new(WAITING)) }, Arriving(arriving))
    }

    /// Hands an object over; waits while too many bytes are waiting.
    ///
    /// # Errors
    /// The disk has given up, which [`keep`] says more about.
    pub(super) async fn whole(&self, digest: Digest, bytes: Vec<u8>) -> Result<(), RemoteError> {
        let kib = u32::try_from((bytes.len() >> 10) + 1).unwrap_or(u32::MAX).min(WAITING as u32);
        let room = Arc::clone(&self.room).acquire_many_owned(kib).await.map_err(|_| gone())?;
        self.jobs.send(Job::Whole(digest, bytes, room)).map_err(|_| gone())
    }

    /// Has what has arrived of a big object flushed while the rest is on its way.
    pub(super) fn flush(&self, partial: &Partial) {
        if let Ok(file) = partial.file() {
            // Nobody to flush it is no fault: adopting does.
            let _ = self.jobs.send(Job::Flush(file));
        }
    }

    /// Gives a big object its place.
    ///
    /// # Errors
    /// As [`Cache::adopt`].
    pub(super) async fn big(&self, partial: Partial, digest: Digest) -> Result<(), CacheError> {
        let gone = || CacheError::Unfit("the disk has given up".to_owned());
        let (answer, answered) = oneshot::channel();
        self.jobs.send(Job::Big(Box::new(partial), digest, answer)).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }
}

fn gone() -> RemoteError {
    CacheError::Unfit("the disk has given up".to_owned()).into()
}

/// Takes everything that arrives into the cache, until nobody can send any more.
///
/// # Errors
/// [`CacheError`] where the disk refuses; what arrives then is dropped.
pub(super) fn keep(cache: &Cache, Arriving(mut jobs): Arriving) -> Result<(), CacheError> {
    let mut batch: Option<Batch<'_>> = None;
    while let Some(job) = jobs.blocking_recv() {
        match job {
            Job::Whole(digest, bytes, room) => {
                let mut open = batch.take().map_or_else(|| cache.batch(), Ok)?;
                open.add(digest, &bytes)?;
                drop(room);
                if open.len() >= BATCH {
                    open.commit()?;
                } else {
                    batch = Some(open);
                }
            }
            Job::Flush(file) => drop(file.sync_data()),
            // Who asked may be gone: interrupted.
            Job::Big(partial, digest, answer) => drop(answer.send(cache.adopt(*partial, digest))),
        }
    }
    batch.map_or(Ok(()), Batch::commit)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn objects_are_in_the_cache_when_it_ends_and_an_early_end_reaches_the_sender() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(&dir.path().join("cache")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (disk, arriving) = Disk::new();
        let texts: Vec<String> = (0..20).map(|i| format!("object {i}")).collect();
        std::thread::scope(|scope| {
            let kept = scope.spawn(|| keep(&cache, arriving));
            runtime.block_on(async {
                for text in &texts {
                    let digest = Digest::of(text.as_bytes());
                    disk.whole(digest, text.clone().into_bytes()).await.unwrap();
                }
            });
            drop(disk);
            kept.join().unwrap().unwrap();
        });
        for text in &texts {
            cache.verify(Digest::of(text.as_bytes()), None).unwrap();
        }
        let (disk, arriving) = Disk::new();
        drop(arriving);
        let sent = runtime.block_on(disk.whole(Digest::of(b"late"), b"late".to_vec()));
        assert!(sent.is_err());
    }
}
