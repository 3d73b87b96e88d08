//! Big objects go up in parts; an upload that was cut off is taken up where it ended.

use std::collections::BTreeMap;

use futures_util::{StreamExt, stream};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt};
use serde::{Deserialize, Serialize};

use super::RemoteError;
use super::client::Remote;
use super::store::Store;
use crate::cache::Cache;
use crate::digest::Digest;

/// Smallest size of a part; S3 wants 5 MiB and at most 10,000 parts.
const PART: u64 = 16 << 20;
const MAX_PARTS: u64 = 9_000;
/// Parts of one object on their way at the same time.
const PARTS: usize = 4;

/// How far an upload has come, kept beside the cache's temporary files.
#[derive(Serialize, Deserialize)]
struct State {
    /// Where to: an upload means nothing to another remote.
    to: String,
    id: String,
    part_bytes: u64,
    /// What the remote calls the parts that it has.
    parts: BTreeMap<usize, String>,
}

impl State {
    fn keep(&self, cache: &Cache, digest: Digest) {
        cache.keep_upload(digest, serde_json::to_vec(self).ok().as_deref());
    }
}

/// Sends an object in parts; `advance` is told of every byte.
pub(super) async fn send(
    remote: &Remote,
    store: &Store,
    cache: &Cache,
    digest: Digest,
    bytes: u64,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<(), RemoteError> {
    let path = store.object(digest);
    let Some(parts) = &store.parts else {
        return in_order(remote, store, cache, digest, bytes, advance).await;
    };
    let to = format!("{}/{path}", remote.settings().shown());
    let kept = cache.upload(digest).and_then(|text| serde_json::from_slice::<State>(&text).ok());
    if let Some(state) = kept.filter(|s| s.to == to && s.part_bytes >= PART) {
        match resume(parts.as_ref(), &path, cache, (digest, bytes), state, advance).await {
            // The remote has forgotten it, as lifecycle rules make it do.
            Err(Cut::Store(object_store::Error::NotFound { .. })) => {}
            Err(cut) => return Err(cut.into_error(remote)),
            Ok(()) => return Ok(()),
        }
    }
    let id = parts.create_multipart(&path).await.map_err(|e| remote.failed(&e))?;
    let part_bytes = PART.max(bytes.div_ceil(MAX_PARTS));
    let state = State { to, id, part_bytes, parts: BTreeMap::new() };
    state.keep(cache, digest);
    resume(parts.as_ref(), &path, cache, (digest, bytes), state, advance)
        .await
        .map_err(|cut| cut.into_error(remote))
}

/// Why a transfer in parts ended.
pub(super) enum Cut {
    /// The store.
    Store(object_store::Error),
    /// Something here.
    Own(RemoteError),
}

impl Cut {
    pub(super) fn into_error(self, remote: &Remote) -> RemoteError {
        match self {
            Self::Store(error) => remote.failed(&error),
            Self::Own(error) => error,
        }
    }
}

async fn resume(
    store: &dyn MultipartStore,
    path: &Path,
    cache: &Cache,
    (digest, bytes): (Digest, u64),
    mut state: State,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<(), Cut> {
    let count = bytes.div_ceil(state.part_bytes);
    let size = |part: u64| state.part_bytes.min(bytes - part * state.part_bytes);
    let (there, open): (Vec<u64>, Vec<u64>) =
        (0..count).partition(|part| state.parts.contains_key(&(*part as usize)));
    advance(there.iter().map(|p| size(*p)).sum());
    let jobs: Vec<(u64, u64, u64)> =
        open.into_iter().map(|part| (part, part * state.part_bytes, size(part))).collect();
    let id = state.id.clone();
    let mut sending = stream::iter(jobs)
        .map(|(part, from, size)| {
            let id = &id;
            async move {
                let content = cache
                    .read_object(digest, from, size as usize)
                    .map_err(|e| Cut::Own(e.into()))?;
                let sent = store.put_part(path, id, part as usize, content.into()).await;
                Ok::<_, Cut>((part, size, sent.map_err(Cut::Store)?.content_id))
            }
        })
        .buffer_unordered(PARTS);
    while let Some(sent) = sending.next().await {
        let (part, size, content_id) = sent?;
        state.parts.insert(part as usize, content_id);
        state.keep(cache, digest);
        advance(size);
    }
    drop(sending);
    let parts = state.parts.into_values().map(|content_id| PartId { content_id }).collect();
    store.complete_multipart(path, &id, parts).await.map_err(Cut::Store)?;
    cache.keep_upload(digest, None);
    Ok(())
}

/// For a folder: part after part into a temporary file, which takes its place whole.
async fn in_order(
    remote: &Remote,
    store: &Store,
    cache: &Cache,
    digest: Digest,
    bytes: u64,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<(), RemoteError> {
    let failed = |e: object_store::Error| remote.failed(&e);
    let mut upload: Box<dyn MultipartUpload> =
        store.store.put_multipart(&store.object(digest)).await.map_err(failed)?;
    let mut from = 0;
    while from < bytes {
        let size = PART.min(bytes - from);
        let content = cache.read_object(digest, from, size as usize)?;
        upload.put_part(content.into()).await.map_err(failed)?;
        advance(size);
        from += size;
    }
    upload.complete().await.map_err(failed)?;
    Ok(())
}
