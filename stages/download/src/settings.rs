//! What the environment says: endpoint, token, Hugging Face cache, offline, retries.
//!
//! Read once at the start of a run, so that everything below can be tested without touching the
//! environment of the process.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A token. Cannot be printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The token itself, for a request header and nothing else.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// How often a request is repeated, and how long to wait in between.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retries {
    /// Attempts in a row that bring no new byte.
    pub(crate) attempts: u32,
    /// Wait before the second attempt; doubled each time, up to [`Retries::LONGEST`].
    pub(crate) first_wait: Duration,
    /// What waits; replaced in tests.
    pub(crate) sleep: fn(Duration),
}

impl Retries {
    /// Longest wait that is not asked for by the server.
    pub(crate) const LONGEST: Duration = Duration::from_secs(30);
    /// Longest wait that the server may ask for.
    pub(crate) const LONGEST_ASKED: Duration = Duration::from_mins(5);

    /// Wait after the `failed`th failure in a row, counted from 1.
    pub(crate) fn wait(&self, failed: u32) -> Duration {
        let doubled = self.first_wait.saturating_mul(1 << failed.saturating_sub(1).min(16));
        doubled.min(Self::LONGEST)
    }
}

/// The environment of a download.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Address of the hub, without a slash at the end.
    pub(crate) endpoint: String,
    pub(crate) token: Option<Secret>,
    /// Folder with `models--owner--name` folders.
    pub(crate) hub_cache: PathBuf,
    pub(crate) offline: bool,
    pub(crate) retries: Retries,
    /// Longest silence of a server before the request counts as cut.
    pub(crate) patience: Duration,
    /// Python interpreters to try, in this order.
    pub(crate) pythons: Vec<OsString>,
    /// Environment added to that of `pip`; for tests.
    pub(crate) pip_env: Vec<(OsString, OsString)>,
}

impl Settings {
    /// Reads the process's environment as the Hugging Face tools do.
    pub(crate) fn from_env() -> Self {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let path = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME")
                .or_else(|| path("HOME").map(|home| home.join(".cache")))
                .unwrap_or_else(std::env::temp_dir);
            cache.join("huggingface")
        });
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: find_token(&home),
            hub_cache: path("HF_HUB_CACHE")
                .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
                .unwrap_or_else(|| home.join("hub")),
            offline: text("HF_HUB_OFFLINE").is_some_and(|value| is_yes(&value)),
            retries: Retries {
                attempts: 6,
                first_wait: Duration::from_secs(1),
                sleep: std::thread::sleep,
            },
            patience: Duration::from_mins(1),
            pythons: vec!["python3".into(), "python".into()],
            pip_env: Vec::new(),
        }
    }
}

/// `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else the file `token` in the Hugging Face home.
fn find_token(home: &Path) -> Option<Secret> {
    if std::env::var("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_ok_and(|value| is_yes(&value)) {
        return None;
    }
    if let Ok(token) = std::env::var("HF_TOKEN")
        && !token.trim().is_empty()
    {
        return Some(Secret::new(token.trim()));
    }
    let path = std::env::var_os("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
    let token = std::fs::read_to_string(path).ok()?;
    (!token.trim().is_empty()).then(|| Secret::new(token.trim()))
}

fn is_yes(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
}
