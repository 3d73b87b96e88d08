//! Checkpoints of a running stage: what lets a killed attempt be continued.
//!
//! A checkpoint is one file `checkpoint-<sequence>-<blake3>.bin`, written beside and renamed into
//! place, so that a file with that name and that digest is whole. An attempt writes only its own
//! scratch folder and may read those of earlier attempts.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::Request;

/// A checkpoint could not be written.
#[derive(Debug, thiserror::Error)]
#[error("could not write a checkpoint in {}: {source}", path.display())]
pub struct ScratchError {
    /// Scratch folder.
    pub path: PathBuf,
    /// What the file system said.
    pub source: std::io::Error,
}

/// The checkpoints of one fingerprint.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    own: PathBuf,
    earlier: Vec<PathBuf>,
}

impl Checkpoints {
    /// The checkpoints that `request` may write and adopt.
    pub fn of(request: &Request) -> Self {
        Self { own: request.scratch.clone(), earlier: request.earlier_scratch.clone() }
    }

    /// Writes checkpoint `sequence` durably, then removes older ones of this attempt.
    ///
    /// # Errors
    /// [`ScratchError`] when the disk refuses.
    pub fn save(&self, sequence: u64, bytes: &[u8]) -> Result<(), ScratchError> {
        self.write(sequence, bytes)
            .map_err(|source| ScratchError { path: self.own.clone(), source })
    }

    fn write(&self, sequence: u64, bytes: &[u8]) -> std::io::Result<()> {
        fs::create_dir_all(&self.own)?;
        let name = format!("checkpoint-{sequence:012}-{}.bin", blake3::hash(bytes).to_hex());
        let staged = self.own.join(format!(".{name}.partial"));
        let mut file = fs::File::create(&staged)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&staged, self.own.join(&name))?;
        fs::File::open(&self.own)?.sync_all()?;
        for (_, path) in listed(&self.own) {
            if path.file_name().is_some_and(|n| n != name.as_str()) {
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// The newest whole checkpoint of this or an earlier attempt: its sequence and its bytes.
    pub fn latest(&self) -> Option<(u64, Vec<u8>)> {
        let mut found: Vec<(u64, PathBuf)> =
            std::iter::once(&self.own).chain(&self.earlier).flat_map(|dir| listed(dir)).collect();
        found.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
        found.into_iter().find_map(|(sequence, path)| {
            let bytes = fs::read(&path).ok()?;
            let digest = blake3::hash(&bytes).to_hex();
            let name = path.file_name()?.to_str()?;
            name.ends_with(&format!("-{digest}.bin")).then_some((sequence, bytes))
        })
    }
}

fn listed(dir: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let sequence = name.strip_prefix("checkpoint-")?.split('-').next()?.parse().ok()?;
            Some((sequence, entry.path()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_whole_checkpoint_wins_and_a_torn_one_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let first = Checkpoints { own: dir.path().join("a"), earlier: vec![] };
        first.save(1, b"one").unwrap();
        let second = Checkpoints { own: dir.path().join("b"), earlier: vec![dir.path().join("a")] };
        assert_eq!(second.latest().unwrap(), (1, b"one".to_vec()));
        second.save(2, b"two").unwrap();
        let (_, path) = listed(&dir.path().join("b")).remove(0);
        fs::write(path, b"tw").unwrap();
        assert_eq!(second.latest().unwrap(), (1, b"one".to_vec()));
    }
}
