//! Opens the store behind a URL.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};

use super::{RemoteError, Settings, local_path, shown};
use crate::digest::{Digest, Fingerprint};

/// A host that is down is given up after this long.
const CONNECT: &str = "3s";
/// A server that stops sending is given up, and asked again, after this long.
const SILENCE: &str = "30s";
/// Requests open at the same time, each on a connection that is kept.
pub(super) const REQUESTS: usize = 32;

/// An open store and where the cache begins in it.
#[derive(Clone)]
pub(super) struct Store {
    pub(super) store: Arc<dyn ObjectStore>,
    /// Uploads in parts that can be taken up again; a folder and HTTP have none.
    pub(super) parts: Option<Arc<dyn MultipartStore>>,
    prefix: Path,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(&self.store, f)
    }
}

impl Store {
    pub(super) fn object(&self, digest: Digest) -> Path {
        let hex = digest.to_hex();
        self.below(&format!("objects-v1/{}/{}", &hex[..2], &hex[2..]))
    }

    pub(super) fn record(&self, kind: &str, fingerprint: Fingerprint) -> Path {
        self.below(&format!("records-v1/{kind}/{fingerprint}.json"))
    }

    fn below(&self, path: &str) -> Path {
        path.split('/').fold(self.prefix.clone(), Path::join)
    }
}

/// How often a request is repeated: little before the remote has ever answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Little,
    Much,
}

impl Patience {
    fn retry(self) -> RetryConfig {
        let (max_retries, seconds) = if self == Self::Little { (1, 5) } else { (8, 180) };
        RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(100),
                max_backoff: Duration::from_secs(10),
                base: 2.0,
            },
            max_retries,
            retry_timeout: Duration::from_secs(seconds),
        }
    }
}

/// Opens the store; no network is touched. Credentials come from the environment, under the names
/// that `object_store` documents (`AWS_…`, `GOOGLE_…`, `AZURE_…`).
///
/// # Errors
/// [`RemoteError::Config`] for a URL that leads nowhere or credentials that do not fit.
pub(super) fn open(settings: &Settings, patience: Patience) -> Result<Store, RemoteError> {
    let Some((scheme, rest)) = settings.url.split_once("://") else {
        return folder(settings, &settings.url);
    };
    match scheme {
        "file" => folder(settings, rest),
        "s3" | "s3a" => s3(settings, rest, patience),
        "gs" | "gcs" => google(settings, rest, patience),
        "az" | "azure" | "abfs" | "abfss" | "adl" => azure(settings, rest, patience),
        "http" | "https" => http(settings, patience),
        _ => Err(RemoteError::config(
            format!("the remote {} is of no known kind", settings.shown()),
            "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, http(s)://HOST/PATH \
             or a folder",
        )),
    }
}

fn s3(settings: &Settings, rest: &str, patience: Patience) -> Result<Store, RemoteError> {
    let mut builder = AmazonS3Builder::from_env().with_url(&settings.url);
    for (key, value) in client() {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    // Objects are checked by digest where they arrive; hashing them twice buys nothing.
    if std::env::var_os("AWS_UNSIGNED_PAYLOAD").is_none() {
        builder = builder.with_unsigned_payload(true);
    }
    // An endpoint that the user wrote with http is meant so.
    let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
    if endpoint.is_some_and(|e| e.starts_with("http://")) {
        builder = builder.with_allow_http(true);
    }
    in_parts(settings, rest, builder.with_retry(patience.retry()).build())
}

fn google(settings: &Settings, rest: &str, patience: Patience) -> Result<Store, RemoteError> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_url(&settings.url);
    for (key, value) in client() {
        builder = builder.with_config(GoogleConfigKey::Client(key), value);
    }
    in_parts(settings, rest, builder.with_retry(patience.retry()).build())
}

fn azure(settings: &Settings, rest: &str, patience: Patience) -> Result<Store, RemoteError> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_url(&settings.url);
    for (key, value) in client() {
        builder = builder.with_config(AzureConfigKey::Client(key), value);
    }
    in_parts(settings, rest, builder.with_retry(patience.retry()).build())
}

fn http(settings: &Settings, patience: Patience) -> Result<Store, RemoteError> {
    let mut builder = HttpBuilder::new().with_url(settings.url.trim_end_matches('/'));
    builder = builder.with_config(ClientConfigKey::AllowHttp, "true");
    for (key, value) in client() {
        builder = builder.with_config(key, value);
    }
    let store = builder.with_retry(patience.retry()).build().map_err(|e| wrong(settings, &e))?;
    Ok(Store { parts: None, store: Arc::new(store), prefix: Path::default() })
}

/// How every client over a network is set up.
fn client() -> [(ClientConfigKey, &'static str); 3] {
    [
        (ClientConfigKey::ConnectTimeout, CONNECT),
        (ClientConfigKey::ReadTimeout, SILENCE),
        // A big object takes as long as it takes; silence is what ends a request.
        (ClientConfigKey::Timeout, "1day"),
    ]
}

/// A store that takes uploads in parts; the cache begins below the bucket.
fn in_parts<S: ObjectStore + MultipartStore>(
    settings: &Settings,
    rest: &str,
    built: object_store::Result<S>,
) -> Result<Store, RemoteError> {
    let store = Arc::new(built.map_err(|e| wrong(settings, &e))?);
    let prefix = Path::from(rest.split_once('/').map_or("", |(_, path)| path));
    Ok(Store { parts: Some(store.clone()), store, prefix })
}

fn folder(settings: &Settings, path: &str) -> Result<Store, RemoteError> {
    let path = local_path(path, &settings.dir);
    if settings.writes() {
        std::fs::create_dir_all(&path).map_err(|e| unavailable(settings, e.to_string()))?;
    }
    let store = LocalFileSystem::new_with_prefix(&path)
        .map_err(|e| unavailable(settings, told(&e)))?
        .with_fsync(true);
    Ok(Store { store: Arc::new(store), parts: None, prefix: Path::default() })
}

fn wrong(settings: &Settings, error: &object_store::Error) -> RemoteError {
    RemoteError::config(
        format!("the remote {} cannot be opened: {}", settings.shown(), told(error)),
        "credentials and endpoints come from the environment: AWS_…, GOOGLE_…, AZURE_…",
    )
}

pub(super) fn unavailable(settings: &Settings, what: String) -> RemoteError {
    RemoteError::Unavailable { remote: settings.shown(), what }
}

/// The cause of an error in one line of bounded length, without the pages that servers send.
pub(super) fn told(error: &object_store::Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    let (whole, deepest) = (error.to_string(), deepest.to_string());
    let text = match error {
        object_store::Error::PermissionDenied { .. } => "the credentials do not allow it",
        object_store::Error::Unauthenticated { .. } => "the credentials are not accepted",
        _ if whole.len() <= 300 => &whole,
        _ => &deepest,
    };
    // Addresses may carry tokens.
    let words = text.split_whitespace().map(shown);
    words.collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::remote::RemoteConfig;

    fn settings(url: &str) -> Settings {
        let config = RemoteConfig { url: url.to_owned(), ..RemoteConfig::default() };
        let dir = std::env::temp_dir();
        let RemoteConfig { url, read, write, trusted_keys, .. } = config;
        Settings { url, dir, read, write, sign: None, trusted_keys }
    }

    #[test]
    fn cache_begins_below_the_prefix_of_the_url() {
        let digest = Digest([0xab; 32]);
        let rest = "ab".repeat(31);
        for (url, prefix) in [
            ("s3://bucket/team/cache", "team/cache/"),
            ("s3://bucket", ""),
            ("gs://bucket/team/", "team/"),
            ("https://host/path", ""),
            (".", ""),
        ] {
            let store = open(&settings(url), Patience::Little).unwrap();
            let path = store.object(digest).to_string();
            assert_eq!(path, format!("{prefix}objects-v1/ab/{rest}"), "{url}");
        }
        for url in ["ftp://host/path", "s3://"] {
            let error = open(&settings(url), Patience::Little).unwrap_err();
            assert!(matches!(error, RemoteError::Config { .. }), "{url}: {error}");
        }
    }

    #[test]
    fn reasons_are_short_and_hold_no_token() {
        let source =
            format!("request to https://me:pw@host/x?sig=secret failed {}", "x".repeat(900));
        let error = object_store::Error::Generic { store: "S3", source: source.into() };
        let told = told(&error);
        assert!(told.contains("https://host/x") && told.chars().count() <= 300, "{told}");
        assert!(!told.contains("secret") && !told.contains("me:pw"), "{told}");
    }
}
