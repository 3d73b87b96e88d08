//! Moves the bytes of one file over HTTP: resumed after a cut, repeated after a passing failure.
//!
//! A token goes to the host it was meant for and to no other: reqwest drops the header when a
//! redirect leaves scheme, host or port, and a test holds it to that. Errors carry no address
//! with a query, since redirects point at signed ones.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::time::Duration;

use reqwest::blocking::{Client, Response};
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::redirect::Policy;
use reqwest::{StatusCode, Url};
use sha2::{Digest, Sha256};

use crate::digest::{CHUNK, Hashed, feed, hex};
use crate::error::{DownloadError, transport};
use crate::meter::Meter;
use crate::scratch::{Part, Tag};
use crate::settings::{Retries, Secret, Settings};

/// Resumptions of one file before giving up, although each brought new bytes.
const MOST_CUTS: u32 = 200;
/// Redirects followed.
const MOST_HOPS: usize = 10;

/// A file on a server.
#[derive(Clone, Debug)]
pub(crate) struct Remote<'a> {
    pub(crate) url: Url,
    pub(crate) token: Option<&'a Secret>,
    /// The file in words, for messages.
    pub(crate) what: String,
    /// Page on which access is granted, for a hub.
    pub(crate) page: Option<String>,
    /// Length in bytes, where known.
    pub(crate) size: Option<u64>,
    /// Whether the caller knows the sha256 and checks it.
    pub(crate) is_pinned: bool,
}

/// What a hub says of a file before its bytes are fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Linked {
    /// sha256 of a large file; the ETag of other files is something else.
    pub(crate) sha256: Option<String>,
    /// Length in bytes.
    pub(crate) size: Option<u64>,
}

/// HTTP with patience.
#[derive(Debug)]
pub(crate) struct Transfer {
    follows: Client,
    stays: Client,
    retries: Retries,
}

/// Why one attempt did not finish.
pub(crate) enum Trouble {
    /// Another attempt would not help.
    Fatal(DownloadError),
    /// Another attempt may help.
    Again {
        why: String,
        /// Wait the server asks for.
        wait: Option<Duration>,
        rate_limited: bool,
    },
}

/// What has arrived of a file, and its hash so far.
struct Arrived {
    hasher: Sha256,
    size: u64,
}

impl Transfer {
    pub(crate) fn new(settings: &Settings) -> Result<Self, DownloadError> {
        let client = |redirects: Policy| {
            Client::builder()
                .user_agent(concat!("pipe/", env!("CARGO_PKG_VERSION")))
                .redirect(redirects)
                .referer(false)
                .connect_timeout(Duration::from_secs(20))
                .timeout(settings.patience)
                .build()
                .map_err(|error| DownloadError::Internal(transport(error)))
        };
        Ok(Self {
            follows: client(Policy::limited(MOST_HOPS))?,
            stays: client(Policy::none())?,
            retries: settings.retries,
        })
    }

    /// Fetches `remote` into `part`, going on where it stands.
    pub(crate) fn fetch(
        &self,
        remote: &Remote<'_>,
        part: &Part,
        meter: &mut Meter<'_>,
    ) -> Result<Hashed, DownloadError> {
        let mut arrived = Arrived::read(remote, part)?;
        if arrived.size > 0 {
            meter.resumed += arrived.size;
            meter.log(format!("{}: going on after {} bytes", remote.what, arrived.size));
        }
        repeat(self.retries, &remote.what, || {
            let before = arrived.size;
            let tried = self.attempt(remote, part, &mut arrived, meter);
            (tried, arrived.size > before)
        })?;
        Ok(Hashed { size: arrived.size, sha256: hex(arrived.hasher) })
    }

    /// What the hub says of a file, without fetching it.
    pub(crate) fn head(&self, remote: &Remote<'_>) -> Result<Linked, DownloadError> {
        repeat(self.retries, &remote.what, || (self.head_once(remote), false))
    }

    fn head_once(&self, remote: &Remote<'_>) -> Result<Linked, Trouble> {
        let mut url = remote.url.clone();
        for _ in 0..MOST_HOPS {
            let mut request = self.stays.head(url.clone()).header(ACCEPT_ENCODING, "identity");
            if let Some(token) = remote.token {
                request = request.bearer_auth(token.expose());
            }
            let response = request.send().map_err(|error| sending(remote, error))?;
            // A renamed repository answers with a relative redirect, a large file with an absolute
            // one, and only the answer before that absolute one says what the file is.
            match relative_location(&response) {
                Some(location) => {
                    url = url.join(&location).map_err(|error| {
                        let why = format!("the server redirects to no address: {error}");
                        Trouble::Fatal(DownloadError::Answer { what: remote.what.clone(), why })
                    })?;
                }
                None if response.status().is_redirection() => return Ok(linked(&response)),
                None => return check_status(remote, response).map(|response| linked(&response)),
            }
        }
        let why = format!("more than {MOST_HOPS} redirects");
        Err(Trouble::Fatal(DownloadError::Answer { what: remote.what.clone(), why }))
    }

    fn attempt(
        &self,
        remote: &Remote<'_>,
        part: &Part,
        arrived: &mut Arrived,
        meter: &mut Meter<'_>,
    ) -> Result<(), Trouble> {
        if remote.is_pinned && arrived.size > 0 && remote.size == Some(arrived.size) {
            return Ok(());
        }
        let response = self.ask(remote, part, arrived)?;
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT => range_start(response.headers()),
            StatusCode::RANGE_NOT_SATISFIABLE => None,
            _ => Some(0),
        };
        if offset != Some(arrived.size) {
            arrived.reset(part).map_err(Trouble::Fatal)?;
            if offset != Some(0) {
                return Err(Trouble::again("the server has other bytes than before"));
            }
        }
        let total = response.content_length().map(|rest| rest + arrived.size);
        if response.status() == StatusCode::OK {
            let etag = response.headers().get(ETAG).and_then(|value| value.to_str().ok());
            let etag = etag.filter(|etag| etag.starts_with('"')).map(str::to_owned);
            part.write_tag(&Tag { etag }).map_err(Trouble::Fatal)?;
        }
        receive(response, part, arrived, meter)?;
        match total.or(remote.size) {
            Some(total) if arrived.size < total => {
                let why = format!("the connection ended after {} of {total} bytes", arrived.size);
                Err(Trouble::again(&why))
            }
            _ => Ok(()),
        }
    }

    /// Asks for what is missing.
    fn ask(
        &self,
        remote: &Remote<'_>,
        part: &Part,
        arrived: &Arrived,
    ) -> Result<Response, Trouble> {
        // A compressed answer would have other offsets and another ETag.
        let mut request = self.follows.get(remote.url.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some(token) = remote.token {
            request = request.bearer_auth(token.expose());
        }
        if arrived.size > 0 {
            request = request.header(RANGE, format!("bytes={}-", arrived.size));
            if let Some(etag) = part.tag().etag {
                request = request.header(IF_RANGE, etag);
            }
        }
        let response = request.send().map_err(|error| sending(remote, error))?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        check_status(remote, response)
    }
}

impl Arrived {
    /// What `part` holds, unless the server could not be asked to go on with just that.
    fn read(remote: &Remote<'_>, part: &Part) -> Result<Self, DownloadError> {
        let fresh = Self { hasher: Sha256::new(), size: 0 };
        let held = fs::metadata(&part.data).map_or(0, |metadata| metadata.len());
        let is_resumable = remote.is_pinned || part.tag().etag.is_some();
        if held == 0 || !is_resumable || remote.size.is_some_and(|size| held > size) {
            part.discard()?;
            return Ok(fresh);
        }
        let mut hasher = Sha256::new();
        let size = feed(&mut hasher, &part.data).map_err(DownloadError::io("read", &part.data))?;
        Ok(Self { hasher, size })
    }

    fn reset(&mut self, part: &Part) -> Result<(), DownloadError> {
        part.discard()?;
        self.hasher = Sha256::new();
        self.size = 0;
        Ok(())
    }
}

impl Trouble {
    pub(crate) fn again(why: &str) -> Self {
        Self::Again { why: why.to_owned(), wait: None, rate_limited: false }
    }
}

/// Appends the body to the part.
fn receive(
    mut response: Response,
    part: &Part,
    arrived: &mut Arrived,
    meter: &mut Meter<'_>,
) -> Result<(), Trouble> {
    let fatal = |error| Trouble::Fatal(DownloadError::io("write", &part.data)(error));
    let mut file: File =
        OpenOptions::new().create(true).append(true).open(&part.data).map_err(fatal)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = match response.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let why = format!("the connection broke after {} bytes: {error}", arrived.size);
                return Err(Trouble::again(&why));
            }
        };
        file.write_all(&buffer[..read]).map_err(fatal)?;
        arrived.hasher.update(&buffer[..read]);
        arrived.size += read as u64;
        meter.fetched += read as u64;
        meter.at(arrived.size);
    }
}

/// Runs `attempt` until it succeeds, fails for good or the retries are used up. It also says
/// whether it got further, which starts the count again.
pub(crate) fn repeat<T>(
    retries: Retries,
    what: &str,
    mut attempt: impl FnMut() -> (Result<T, Trouble>, bool),
) -> Result<T, DownloadError> {
    let mut failed = 0;
    for attempts in 1.. {
        let (tried, got_further) = attempt();
        let (why, wait, rate_limited) = match tried {
            Ok(done) => return Ok(done),
            Err(Trouble::Fatal(error)) => return Err(error),
            Err(Trouble::Again { why, wait, rate_limited }) => (why, wait, rate_limited),
        };
        failed = if got_further { 1 } else { failed + 1 };
        if failed >= retries.attempts || attempts >= MOST_CUTS {
            let what = what.to_owned();
            return Err(DownloadError::GaveUp { what, attempts, why, rate_limited });
        }
        let wait = wait.unwrap_or_else(|| retries.wait(failed));
        if wait > Retries::LONGEST_ASKED {
            let what = what.to_owned();
            return Err(DownloadError::LongPause { what, seconds: wait.as_secs() });
        }
        (retries.sleep)(wait);
    }
    Err(DownloadError::Internal("invariant: the loop above never ends".to_owned()))
}

/// A request that got no answer.
fn sending(remote: &Remote<'_>, error: reqwest::Error) -> Trouble {
    let host = remote.url.host_str().unwrap_or("the server").to_owned();
    if error.is_redirect() || error.is_builder() {
        let why = transport(error);
        return Trouble::Fatal(DownloadError::Answer { what: remote.what.clone(), why });
    }
    let doing = if error.is_connect() { "could not connect to" } else { "no answer from" };
    Trouble::again(&format!("{doing} `{host}`: {}", transport(error)))
}

/// Sorts answers into good, passing and final.
fn check_status(remote: &Remote<'_>, response: Response) -> Result<Response, Trouble> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let what = remote.what.clone();
    let said = message_of(&response, remote.token);
    Err(match status.as_u16() {
        401 | 403 => Trouble::Fatal(DownloadError::Refused {
            what,
            status: status.as_u16(),
            said,
            has_token: remote.token.is_some(),
            page: remote.page.clone(),
        }),
        404 | 410 => Trouble::Fatal(DownloadError::Missing { what, said, help: String::new() }),
        408 | 429 | 500 | 502 | 503 | 504 => Trouble::Again {
            why: format!("the server answers {status}{said}"),
            wait: retry_after(response.headers()),
            rate_limited: status == StatusCode::TOO_MANY_REQUESTS,
        },
        _ => Trouble::Fatal(DownloadError::Answer {
            what,
            why: format!("the server answers {status}{said}"),
        }),
    })
}

/// The hub's own words in `X-Error-Message`, as a tail for a message; never with the token.
fn message_of(response: &Response, token: Option<&Secret>) -> String {
    let text = response.headers().get("x-error-message").and_then(|value| value.to_str().ok());
    let Some(text) = text.filter(|text| !text.is_empty()) else { return String::new() };
    let text = match token {
        Some(token) => text.replace(token.expose(), "…"),
        None => text.to_owned(),
    };
    let short: String = text.chars().take(200).collect();
    format!(": {}", short.trim_end_matches('.'))
}

/// Whole seconds of `Retry-After`; the date form is not used by hubs.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

/// First byte of a `Content-Range`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn relative_location(response: &Response) -> Option<String> {
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    let is_relative = location.starts_with('/') && !location.starts_with("//");
    (response.status().is_redirection() && is_relative).then(|| location.to_owned())
}

fn linked(response: &Response) -> Linked {
    let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let etag = text("x-linked-etag").or_else(|| text("etag")).unwrap_or("");
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    let is_sha256 = etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit());
    Linked {
        sha256: is_sha256.then(|| etag.to_ascii_lowercase()),
        size: text("x-linked-size").and_then(|size| size.parse().ok()),
    }
}
