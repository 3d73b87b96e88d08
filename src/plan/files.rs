//! Which files of a changed folder differ.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use crate::cache::TreeEntry;

/// At most this many files of a folder are named in a sentence; JSON names all.
const SHOWN: usize = 5;

/// The files by which two states of a folder differ, each list sorted by path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FileChanges {
    /// Only in the new state.
    pub added: Vec<String>,
    /// Only in the old state.
    pub removed: Vec<String>,
    /// In both, with other bytes or another exec bit.
    pub changed: Vec<String>,
}

impl FileChanges {
    /// The difference between two listings.
    pub(super) fn between(old: &[TreeEntry], new: &[TreeEntry]) -> Self {
        fn by_path(entries: &[TreeEntry]) -> BTreeMap<&str, &TreeEntry> {
            entries.iter().map(|e| (e.path.as_str(), e)).collect()
        }
        let (before, after) = (by_path(old), by_path(new));
        let missing = |of: &BTreeMap<&str, _>, from: &BTreeMap<&str, _>| -> Vec<String> {
            of.keys().filter(|p| !from.contains_key(*p)).map(|p| (*p).to_owned()).collect()
        };
        let both =
            before.iter().filter(|(path, entry)| after.get(*path).is_some_and(|new| new != *entry));
        Self {
            added: missing(&after, &before),
            removed: missing(&before, &after),
            changed: both.map(|(path, _)| (*path).to_owned()).collect(),
        }
    }
}

impl fmt::Display for FileChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::default() {
            return f.write_str("the same files");
        }
        let mut parts = Vec::new();
        for (what, paths) in
            [("added", &self.added), ("removed", &self.removed), ("changed", &self.changed)]
        {
            if paths.is_empty() {
                continue;
            }
            let mut part = format!("{what} {}", paths[..paths.len().min(SHOWN)].join(", "));
            if paths.len() > SHOWN {
                part.push_str(&format!(" and {} more", paths.len() - SHOWN));
            }
            parts.push(part);
        }
        f.write_str(&parts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;

    fn entry(path: &str, text: &str) -> TreeEntry {
        let digest = Digest::of(text.as_bytes());
        TreeEntry { path: path.to_owned(), exec: false, bytes: text.len() as u64, digest }
    }

    #[test]
    fn files_are_told_apart_and_a_long_list_is_cut() {
        let old: Vec<TreeEntry> =
            [entry("gone", "1"), entry("kept", "1"), entry("other", "1")].into();
        let mut new = vec![entry("kept", "1"), entry("other", "2")];
        new.extend((0..7).map(|i| entry(&format!("new{i}"), "1")));
        let changes = FileChanges::between(&old, &new);
        assert_eq!(changes.added.len(), 7);
        assert_eq!(
            changes.to_string(),
            "added new0, new1, new2, new3, new4 and 2 more; removed gone; changed other"
        );
    }

    #[test]
    fn an_exec_bit_is_a_change() {
        let new = TreeEntry { exec: true, ..entry("run", "1") };
        assert_eq!(FileChanges::between(&[entry("run", "1")], &[new]).changed, ["run"]);
    }
}
