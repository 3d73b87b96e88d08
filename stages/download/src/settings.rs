//! What the environment says: endpoint, token, Hugging Face cache, offline, retries.
//!
//! Read once at the start of a run, so that everything below can be tested without touching the
//! environment of the process.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
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
        Self::read(&|name| std::env::var_os(name))
    }

    /// Reads an environment; an empty value counts as none.
    fn read(env: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let path = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let text =
            |name: &str| env(name).and_then(|v| v.into_string().ok()).filter(|v| !v.is_empty());
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME")
                .or_else(|| path("HOME").map(|home| home.join(".cache")))
                .unwrap_or_else(std::env::temp_dir);
            cache.join("huggingface")
        });
        let token = if text("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| is_yes(&value)) {
            None
        } else {
            let file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
            text("HF_TOKEN").or_else(|| std::fs::read_to_string(file).ok())
        };
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.map(Secret::new),
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

fn is_yes(value: &str) -> bool {
    matches!(value.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn read(values: &[(&str, &str)]) -> Settings {
        let find = |name: &str| values.iter().find(|(known, _)| *known == name);
        Settings::read(&|name| find(name).map(|(_, value)| OsString::from(value)))
    }

    #[test]
    fn environment_is_read_as_hugging_face_tools_read_it() {
        let plain = read(&[("HOME", "/h")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.hub_cache, PathBuf::from("/h/.cache/huggingface/hub"));
        assert!(!plain.offline && plain.token.is_none());
        let home = read(&[("HOME", "/h"), ("HF_HOME", "/d"), ("HF_HUB_OFFLINE", "True")]);
        assert_eq!(home.hub_cache, PathBuf::from("/d/hub"));
        assert!(home.offline);
        let set = [("HF_HUB_CACHE", "/c"), ("HF_ENDPOINT", "https://m.example/"), ("HF_TOKEN", "")];
        let set = read(&set);
        assert_eq!(set.hub_cache, PathBuf::from("/c"));
        assert_eq!(set.endpoint, "https://m.example");
        assert!(set.token.is_none());
    }

    #[test]
    fn token_comes_from_the_variable_before_the_file_and_can_be_switched_off() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from-file\n").unwrap();
        let home = home.path().to_str().unwrap();
        let token = |values: &[(&str, &str)]| read(values).token.map(|t| t.expose().to_owned());
        assert_eq!(token(&[("HF_HOME", home)]).unwrap(), "from-file");
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", "own ")]).unwrap(), "own");
        let off = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
        assert_eq!(token(&[("HF_HOME", home), ("HF_TOKEN", "own"), off]), None);
    }
}
