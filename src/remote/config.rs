//! What the pipeline file and the environment say of the remote.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{RemoteError, local_path};

/// Replaces the URL of the pipeline file; `none` or an empty value switches the remote off.
const URL: &str = "PIPE_REMOTE";
/// Replaces `read`.
const READ: &str = "PIPE_REMOTE_READ";
/// Replaces `write`.
const WRITE: &str = "PIPE_REMOTE_WRITE";

/// When something is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Never.
    Never,
    /// Where the variable `CI` is set to anything but `false`, `0` or nothing. Nothing is written by
    /// builds of pull or merge requests, whose code nobody has accepted yet.
    Ci,
    /// Always.
    Always,
}

impl Policy {
    /// The three spellings.
    pub const NAMES: [&str; 3] = ["never", "ci", "always"];

    /// Whether it allows something here and now.
    pub fn allows(self) -> bool {
        let ci = || std::env::var("CI").is_ok_and(|v| !["", "0", "false"].contains(&v.as_str()));
        match self {
            Self::Never => false,
            Self::Ci => ci(),
            Self::Always => true,
        }
    }
}

impl FromStr for Policy {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "never" => Ok(Self::Never),
            "ci" => Ok(Self::Ci),
            "always" => Ok(Self::Always),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Never => "never",
            Self::Ci => "ci",
            Self::Always => "always",
        })
    }
}

/// An ed25519 public key, written `ed25519:` and 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey(pub [u8; 32]);

impl FromStr for PublicKey {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let hex = text.strip_prefix("ed25519:").ok_or(())?;
        unhex(hex).map(Self).ok_or(())
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ed25519:{}", hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Lowercase hex digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Exactly `N` bytes of lowercase or uppercase hex digits.
pub(super) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits: Option<Vec<u32>> = text.chars().map(|c| c.to_digit(16)).collect();
    let digits = digits.filter(|d| d.len() == 2 * N)?;
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::try_from(16 * pair[0] + pair[1]).ok()?;
    }
    Some(bytes)
}

/// `remote:` of a pipeline file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteConfig {
    /// `s3://BUCKET/PREFIX`, `gs://…`, `az://…`, `http(s)://…`, or a folder.
    pub url: String,
    /// Who asks it during a run.
    pub read: Policy,
    /// Who adds to it.
    pub write: Policy,
    /// File of the private key that records are signed with.
    pub sign: Option<String>,
    /// Where not empty, a record counts only if one of these signed it.
    pub trusted_keys: Vec<PublicKey>,
}

impl Default for RemoteConfig {
    /// Everyone reads, only CI writes.
    fn default() -> Self {
        Self {
            url: String::new(),
            read: Policy::Always,
            write: Policy::Ci,
            sign: None,
            trusted_keys: Vec::new(),
        }
    }
}

/// The remote of one invocation: pipeline file and environment together.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The URL, with whatever secrets it holds.
    pub url: String,
    /// A folder as URL is relative to this one.
    pub dir: PathBuf,
    /// Who asks it during a run.
    pub read: Policy,
    /// Who adds to it.
    pub write: Policy,
    /// File of the private key that records are signed with.
    pub sign: Option<PathBuf>,
    /// Where not empty, a record counts only if one of these signed it.
    pub trusted_keys: Vec<PublicKey>,
}

impl Settings {
    /// Merges the two; `None` where neither names a remote. The keys of the pipeline file stay in
    /// force wherever the URL comes from.
    ///
    /// # Errors
    /// [`RemoteError::Config`] for a policy that is none.
    pub fn new(config: Option<&RemoteConfig>, dir: &Path) -> Result<Option<Self>, RemoteError> {
        let var = |name| std::env::var(name).ok();
        let default = RemoteConfig::default();
        let url = var(URL).or_else(|| config.map(|c| c.url.clone())).unwrap_or_default();
        if url.is_empty() || url == "none" {
            return Ok(None);
        }
        // A relative folder in the environment is relative to where one stands.
        let from = if var(URL).is_some() { PathBuf::from(".") } else { dir.to_owned() };
        let config = config.unwrap_or(&default);
        let policy = |name, written: Policy| match var(name).filter(|v| !v.is_empty()) {
            None => Ok(written),
            Some(text) => text.parse().map_err(|()| {
                let known = Policy::NAMES.join(", ");
                RemoteError::config(format!("{name} is `{text}`"), format!("it is one of {known}"))
            }),
        };
        Ok(Some(Self {
            url,
            read: policy(READ, config.read)?,
            write: policy(WRITE, config.write)?,
            sign: config.sign.as_ref().map(|path| local_path(path, dir)),
            trusted_keys: config.trusted_keys.clone(),
            dir: from,
        }))
    }

    /// The URL without secrets.
    pub fn shown(&self) -> String {
        shown(&self.url)
    }

    /// Whether a run asks the remote.
    pub fn reads(&self) -> bool {
        self.read.allows()
    }

    /// Whether something may be added to the remote.
    pub fn writes(&self) -> bool {
        self.write.allows() && !self.is_unaccepted() && !self.is_http()
    }

    /// Whether only CI writes, and this is its build of a pull or merge request. A courtesy: what
    /// keeps strangers out is that such builds are given no credentials.
    pub fn is_unaccepted(&self) -> bool {
        let var = |name| std::env::var(name).ok();
        let request = is_request(var("GITHUB_EVENT_NAME"), var("CI_PIPELINE_SOURCE"));
        self.write == Policy::Ci && request
    }

    /// Plain HTTP servers can be read only.
    pub fn is_http(&self) -> bool {
        self.url.starts_with("http://") || self.url.starts_with("https://")
    }
}

/// Whether GitHub or GitLab say that a build is of a pull or merge request.
fn is_request(github: Option<String>, gitlab: Option<String>) -> bool {
    let github = github.is_some_and(|event| event.starts_with("pull_request"));
    let gitlab = gitlab.is_some_and(|source| {
        ["merge_request_event", "external_pull_request_event"].contains(&source.as_str())
    });
    github || gitlab
}

/// A URL without user, password and query, which may hold secrets.
pub fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    // abfss://CONTAINER@ACCOUNT is no secret.
    let host = match host.rsplit_once('@') {
        Some((_, host)) if scheme.ends_with("http") || scheme.ends_with("https") => host,
        _ => host,
    };
    format!("{scheme}://{host}{path}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn builds_of_requests_are_told_from_others() {
        let is = |github: &str, gitlab: &str| {
            is_request(Some(github.to_owned()), Some(gitlab.to_owned()))
        };
        assert!(is("pull_request", "") && is("pull_request_target", ""));
        assert!(is("", "merge_request_event") && is("", "external_pull_request_event"));
        assert!(!is("push", "push") && !is_request(None, None));
    }

    #[test]
    fn secrets_of_a_url_are_not_shown() {
        assert_eq!(shown("https://me:secret@host:1/a/b?sig=x"), "https://host:1/a/b");
        assert_eq!(shown("s3://bucket/prefix"), "s3://bucket/prefix");
        assert_eq!(shown("abfss://box@account.dfs.core/x"), "abfss://box@account.dfs.core/x");
        assert_eq!(shown("../shared"), "../shared");
    }

    #[test]
    fn public_key_survives_its_text_and_anything_else_is_refused() {
        let key = PublicKey(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(key.to_string().parse(), Ok(key));
        for wrong in ["", "ed25519:", "ed25519:zz", &key.to_string()[..70], "rsa:00"] {
            assert_eq!(wrong.parse::<PublicKey>(), Err(()), "{wrong}");
        }
    }
}
