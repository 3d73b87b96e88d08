//! Why a download failed, and what to do about it.
//!
//! No variant may hold a token or a signed address: addresses go through [`shown`] first.

use std::path::{Path, PathBuf};

use contract::{Fault, StageError};
use reqwest::Url;

/// A failed download.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DownloadError {
    /// The server wants a token, or refuses the one it got.
    #[error("{what}: the server refused access ({status}){said}")]
    Refused { what: String, status: u16, said: String, has_token: bool, page: Option<String> },
    /// The server knows no such thing.
    #[error("{what} does not exist{said}")]
    Missing { what: String, said: String, help: String },
    /// Patterns or names that select nothing.
    #[error("{message}")]
    NoMatch { message: String, help: String },
    /// Retries are used up.
    #[error("gave up on {what} after {}: {why}", counted(*.attempts))]
    GaveUp { what: String, attempts: u32, why: String, rate_limited: bool },
    /// The server asks for a longer pause than a run should take.
    #[error("{what}: too many requests, the server asks for a pause of {seconds} s")]
    LongPause { what: String, seconds: u64 },
    /// An answer that no retry can change.
    #[error("{what}: {why}")]
    Answer { what: String, why: String },
    /// Offline by choice, and the file is not here.
    #[error("offline, and {what} is not in the Hugging Face cache at {}", cache.display())]
    NotCached { what: String, cache: PathBuf },
    /// Other bytes than expected.
    #[error("{what}: sha256 is {found}, but {by} says {expected}")]
    Mismatch { what: String, expected: String, found: String, by: &'static str },
    /// Param and lock file name different hashes.
    #[error("`{name}`: param `sha256` says {param}, but the lock file says {lock}")]
    ConflictingPins { name: String, param: String, lock: String },
    /// A lock entry that does not fit.
    #[error("the lock file's entry for this source {why}")]
    Lock { why: String },
    /// No interpreter or no pip.
    #[error("{what} needs {missing}, which this machine lacks")]
    NoPip { what: String, missing: &'static str },
    /// `pip` ran and failed.
    #[error("pip could not download {what}: {last_lines}")]
    Pip { what: String, last_lines: String, offline: bool },
    /// A wheel that is not a readable zip archive.
    #[error("the wheel {wheel} is damaged: {why}")]
    Wheel { wheel: String, why: String },
    /// A name that would leave the output tree.
    #[error("`{name}` is not a name inside the output folder")]
    UnsafeName { name: String },
    /// The local path is not a file or a folder with files.
    #[error("`{path}` {why}")]
    Local { path: String, why: &'static str },
    /// The file system refused.
    #[error("could not {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
    /// A defect of this crate.
    #[error("{0}")]
    Internal(String),
}

impl DownloadError {
    /// An [`std::io::Error`] at a path; `doing` completes "could not …".
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { doing, path, source }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::GaveUp { .. }
            | Self::LongPause { .. }
            | Self::Refused { .. }
            | Self::NotCached { .. }
            | Self::NoPip { .. }
            | Self::Pip { .. }
            | Self::Answer { .. } => Fault::Environment,
            Self::Io { .. } => Fault::Io,
            Self::Internal(_) => Fault::Internal,
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        let text = match self {
            Self::Refused { has_token, page, .. } => {
                return Some(refused_help(*has_token, page.as_deref()));
            }
            Self::Missing { help, .. } | Self::NoMatch { help, .. } => {
                return (!help.is_empty()).then(|| help.clone());
            }
            Self::GaveUp { rate_limited: true, .. } | Self::LongPause { .. } => {
                "wait and run again: what has arrived is kept; a token in HF_TOKEN raises the limit"
            }
            Self::GaveUp { .. } => {
                "check the network and the proxy, then run again: what has arrived is kept; \
                 where the files are in the Hugging Face cache, set HF_HUB_OFFLINE=1"
            }
            Self::NotCached { .. } => {
                "unset HF_HUB_OFFLINE, or point HF_HOME at the cache that has it"
            }
            Self::Mismatch { by: "param `sha256`", .. } => {
                "the source has changed or the param is wrong; nothing was written"
            }
            Self::Mismatch { by: "the lock file", .. } => {
                "the source has changed; to accept the new bytes, remove its entry from the lock \
                 file and run again; nothing was written"
            }
            Self::Mismatch { .. } => "run again; nothing was written",
            Self::ConflictingPins { .. } | Self::Lock { .. } => {
                "remove this source's entry from the lock file and run again"
            }
            Self::NoPip { .. } => {
                "install Python 3 with pip (such as `apt install python3-pip`), \
                 or take the file from a `url` or a `path`"
            }
            Self::Pip { offline: true, .. } => {
                "check the network and pip's settings (PIP_INDEX_URL, proxies), then run again"
            }
            Self::Pip { last_lines, .. } if last_lines.contains("from versions: none") => {
                "the index has no wheel of that package, or could not be reached: check the name \
                 and pip's settings (PIP_INDEX_URL, PIP_FIND_LINKS, proxies)"
            }
            Self::Pip { .. } => "check the name and the version on the package index",
            Self::Wheel { .. } => {
                "run again; if it stays so, clear pip's cache with `pip cache purge`"
            }
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space on that disk and run again"
            }
            _ => return None,
        };
        Some(text.to_owned())
    }
}

fn counted(attempts: u32) -> String {
    if attempts == 1 { "1 attempt".to_owned() } else { format!("{attempts} attempts") }
}

fn refused_help(has_token: bool, page: Option<&str>) -> String {
    let Some(page) = page else {
        return "the address needs a login that pipe cannot give; use a public address".to_owned();
    };
    if has_token {
        format!(
            "the token in use has no access: accept the terms on {page}, or use a token that may \
             read it; a misspelt name is answered in the same way"
        )
    } else {
        format!(
            "set HF_TOKEN to a token that may read {page} (accept its terms there if it is \
             gated); a misspelt name is answered in the same way"
        )
    }
}

impl From<DownloadError> for StageError {
    fn from(error: DownloadError) -> Self {
        let plain = Self::new(error.fault(), error.to_string());
        match error.help() {
            Some(help) => plain.help(help),
            None => plain,
        }
    }
}

/// An address without user, password, query and fragment: signed addresses carry secrets there.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// A transport error and its causes, without the address.
pub(crate) fn transport(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        let message = next.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = next.source();
    }
    text
}
