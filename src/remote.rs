//! A cache that teammates share over a network: what is asked, what is offered, and by whom.
//!
//! The layout on the remote is the cache's own (`objects-v1/`, `records-v1/`). Objects are named
//! by their content and verified before they enter the cache; a record is created where there is
//! none and replaced only where it is proven incomplete. Nothing here is touched by a plan, nor by
//! a run whose stages are all cached.

mod config;
#[cfg(feature = "remote")]
mod disk;
#[cfg(feature = "remote")]
mod download;
#[cfg(feature = "remote")]
mod multipart;
#[cfg(feature = "remote")]
mod sign;
#[cfg(feature = "remote")]
mod store;
#[cfg(feature = "remote")]
mod upload;

#[cfg(not(feature = "remote"))]
mod absent;
#[cfg(feature = "remote")]
mod client;

use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

#[cfg(not(feature = "remote"))]
pub use absent::{Remote, new_key, public_key};
#[cfg(feature = "remote")]
pub use client::Remote;
pub use config::{Policy, PublicKey, RemoteConfig, Settings, shown};
#[cfg(feature = "remote")]
pub use sign::{new_key, public_key};

use crate::cache::CacheError;
use crate::record::Record;

/// What the remote says of a fingerprint.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// A record that may be used once its objects are here.
    Found(Box<Record>),
    /// It has none.
    Absent,
    /// It has one that is not to be used, and why.
    Refused(String),
}

/// What became of an offered record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// Stored; `replaced` where an incomplete one was in its place.
    Stored {
        /// An incomplete record was replaced.
        replaced: bool,
    },
    /// The remote has a record of it, with the same artifacts.
    There,
    /// The remote has a whole record of it with other artifacts, which stays.
    Differs,
}

/// The remote cannot do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// It does not answer, or refuses.
    #[error("the remote {remote} cannot be used: {what}")]
    Unavailable {
        /// URL without secrets.
        remote: String,
        /// What went wrong.
        what: String,
    },
    /// An earlier call found it unusable, and said so.
    #[error("the remote {remote} was given up")]
    GivenUp {
        /// URL without secrets.
        remote: String,
    },
    /// What it has is not what was asked for: counts as not having it.
    #[error("{0}")]
    Damaged(String),
    /// The remote or its keys are configured wrongly.
    #[error("{message}")]
    Config {
        /// What is wrong.
        message: String,
        /// What to do about it.
        help: String,
    },
    /// The local cache refused.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
}

impl RemoteError {
    pub(crate) fn config(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Config { message: message.into(), help: help.into() }
    }
}

/// How a transfer is watched and stopped.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Called with bytes done and bytes in all, often.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Transfers end as soon as this is not zero.
    pub interrupts: &'a AtomicUsize,
}

/// A new private key and where it goes.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// The text of the key file.
    pub private: String,
    /// Its public half.
    pub public: PublicKey,
}

/// Expands `~/` and makes a path of the pipeline file absolute.
pub(crate) fn local_path(text: &str, dir: &std::path::Path) -> PathBuf {
    match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => dir.join(text),
    }
}
