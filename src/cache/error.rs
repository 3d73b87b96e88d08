//! What a cache cannot do, and what the user can do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::access;

/// The cache cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system refused.
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        /// Completes "could not".
        doing: &'static str,
        /// File or folder.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// The file system refused a file that is not in the cache: a user's, or a stage's output.
    #[error("could not {doing} {}: {source}", path.display())]
    Outside {
        /// Completes "could not".
        doing: &'static str,
        /// File or folder.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// Something that cannot be stored.
    #[error("{0}")]
    Unfit(String),
    /// A link in an output that cannot be stored.
    #[error("the link `{name}` -> `{target}` {what}")]
    Link {
        /// Name below the output.
        name: String,
        /// What it says.
        target: String,
        /// Completes the sentence.
        what: &'static str,
    },
    /// A stored file that is not what it was.
    #[error("the cache is damaged: {0}")]
    Damaged(String),
    /// A stored file that this user may not read.
    #[error("{0}")]
    Denied(String),
    /// A stored file that could not be read just now.
    #[error("{0}")]
    Passing(String),
}

impl CacheError {
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { doing, path: path.to_owned(), source }
    }

    pub(super) fn outside(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Outside { doing, path: path.to_owned(), source }
    }

    /// What the user can do about it.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            Self::Io { source, path, .. } => return of_cache(source, path),
            Self::Outside { source, path, .. } => return outside(source, path),
            Self::Link { .. } => {
                "copy what it points to into the output (`cp -L`); what links of an output to its \
                 own files and folders point to is stored by itself"
            }
            Self::Denied(_) => {
                "its owner can let others read it (`chmod a+r`), and with a umask like 022 or 002 \
                 what they make next can be read; `pipe run --force` makes it anew"
            }
            Self::Passing(_) => {
                "it may be sound and was left where it is: run again once the host and its file \
                 system can read it"
            }
            Self::Unfit(_) | Self::Damaged(_) => return None,
        };
        Some(help.to_owned())
    }
}

fn of_cache(source: &io::Error, path: &Path) -> Option<String> {
    let help = match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space on that disk and run again"
        }
        io::ErrorKind::PermissionDenied if let Some((at, what)) = access::closed(path) => {
            return Some(format!(
                "{} is {what}: its owner can open it to the group; `pipe doctor` lists what is \
                 closed, and says how",
                at.display(),
            ));
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "a cache that cannot be written can only be read: `--cache DIR` names another"
        }
        _ => return None,
    };
    Some(help.to_owned())
}

/// Sharing a cache is no matter of what is not in it.
fn outside(source: &io::Error, path: &Path) -> Option<String> {
    if source.kind() != io::ErrorKind::PermissionDenied {
        return None;
    }
    let (at, _) = access::closed(path)?;
    let bits = if at.is_dir() { "a+rx" } else { "a+r" };
    Some(format!("let this user read it: `chmod {bits} {}`", at.display()))
}
