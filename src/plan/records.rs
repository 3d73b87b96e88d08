//! Records of finished stages, with what was worked out from them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use super::FileChanges;
use crate::digest::{Digest, Fingerprint};
use crate::pipeline::{Gathered, Member};
use crate::record::Record;

/// Records of finished stages by stage name.
#[derive(Debug, Default)]
pub struct Records {
    by_stage: HashMap<String, Arc<Record>>,
    /// Digests of gathered inputs, which many stages share, by output and address of the list of
    /// points; the list is kept so that its address stays its own.
    gathered: Mutex<HashMap<Key, Remembered>>,
    /// How two states of a gathered input differ: thousands of stages may ask the same.
    differing: Arc<Mutex<Differing>>,
}

type Differing = HashMap<(Digest, Digest), Option<FileChanges>>;
type Key = (String, usize);
type Remembered = (Arc<[Member]>, Digest);

impl Records {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// The record of a stage.
    pub fn get(&self, stage: &str) -> Option<&Arc<Record>> {
        self.by_stage.get(stage)
    }

    /// Takes the record of a stage.
    pub fn insert(&mut self, stage: String, record: Arc<Record>) {
        if self.by_stage.insert(stage, record).is_some() {
            // What was worked out from the other record no longer holds.
            self.gathered = Mutex::default();
        }
    }

    /// Forgets the record of a stage, which is made again.
    pub(crate) fn remove(&mut self, stage: &str) -> Option<Arc<Record>> {
        self.gathered = Mutex::default();
        self.by_stage.remove(stage)
    }

    /// What the stages ran as.
    pub(crate) fn fingerprints(&self) -> BTreeMap<String, Fingerprint> {
        self.by_stage.iter().map(|(name, record)| (name.clone(), record.fingerprint)).collect()
    }

    /// The records of some stages, as far as they are known.
    #[must_use]
    pub fn of<'a>(&self, stages: impl IntoIterator<Item = &'a str>) -> Self {
        let found = stages.into_iter().filter_map(|name| {
            let (name, record) = self.by_stage.get_key_value(name)?;
            Some((name.clone(), Arc::clone(record)))
        });
        let differing = Arc::clone(&self.differing);
        Self { by_stage: found.collect(), gathered: Mutex::default(), differing }
    }

    /// How two states of a gathered input differ, worked out once.
    pub(crate) fn differing(
        &self,
        states: (Digest, Digest),
        find: impl FnOnce() -> Option<FileChanges>,
    ) -> Option<FileChanges> {
        let mut known = self.differing.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(states).or_insert_with(find).clone()
    }

    /// Digest of a gathered input, if it was worked out before; then every point is known.
    pub(crate) fn gathered(&self, input: &Gathered) -> Option<Digest> {
        let known = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&key(input)).map(|(_, digest)| *digest)
    }

    /// Remembers the digest of a gathered input.
    pub(crate) fn remember(&self, input: &Gathered, digest: Digest) {
        let mut known = self.gathered.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(key(input), (Arc::clone(&input.members), digest));
    }
}

fn key(input: &Gathered) -> Key {
    (input.output.clone(), input.members.as_ptr().addr())
}
