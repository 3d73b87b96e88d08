//! A hub and the host it redirects large files to, both on loopback, with faults on demand.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use futures_util::stream;
use serde_json::{Value, json};

use crate::digest::hash_bytes;

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(super) const REPO: &str = "org/tiny";

/// What the next request for a file's bytes meets.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The connection ends after this many bytes of the body.
    Cut(usize),
    /// A status, with `Retry-After` in seconds.
    Status(u16, Option<u64>),
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) host: &'static str,
    pub(super) method: String,
    pub(super) path: String,
    pub(super) token: Option<String>,
    pub(super) range: Option<String>,
    pub(super) if_range: Option<String>,
    /// Bytes of file content in the answer.
    pub(super) served: usize,
}

#[derive(Clone)]
struct Stored {
    bytes: Vec<u8>,
    is_large: bool,
}

struct Shared {
    files: Mutex<BTreeMap<String, Stored>>,
    faults: Mutex<VecDeque<Fault>>,
    api_faults: Mutex<VecDeque<Fault>>,
    seen: Mutex<Vec<Seen>>,
    token: Option<String>,
    cdn: String,
}

/// A running hub. Ends with the test.
pub(super) struct Hub {
    shared: Arc<Shared>,
    pub(super) endpoint: String,
    _runtime: tokio::runtime::Runtime,
}

impl Hub {
    /// A hub with one repository, `org/tiny`, readable with `token` or by everybody.
    pub(super) fn start(token: Option<&str>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (hub, cdn) = runtime.block_on(async {
            let bind = || tokio::net::TcpListener::bind("127.0.0.1:0");
            (bind().await.unwrap(), bind().await.unwrap())
        });
        let address = |listener: &tokio::net::TcpListener| {
            format!("http://{}", listener.local_addr().unwrap())
        };
        let endpoint = address(&hub);
        let shared = Arc::new(Shared {
            files: Mutex::default(),
            faults: Mutex::default(),
            api_faults: Mutex::default(),
            seen: Mutex::default(),
            token: token.map(str::to_owned),
            cdn: address(&cdn),
        });
        let router = Router::new().fallback(on_hub).with_state(shared.clone());
        runtime.spawn(async move { axum::serve(hub, router).await });
        let router = Router::new().fallback(on_cdn).with_state(shared.clone());
        runtime.spawn(async move { axum::serve(cdn, router).await });
        Self { shared, endpoint, _runtime: runtime }
    }

    /// Adds or replaces a file; a large one is served from the other host.
    pub(super) fn put(&self, path: &str, bytes: &[u8], is_large: bool) {
        let stored = Stored { bytes: bytes.to_vec(), is_large };
        self.shared.files.lock().unwrap().insert(path.to_owned(), stored);
    }

    /// The next requests for bytes meet these.
    pub(super) fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.faults.lock().unwrap().extend(faults);
    }

    /// The next requests to the programming interface meet these.
    pub(super) fn fail_next_api(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.api_faults.lock().unwrap().extend(faults);
    }

    /// Takes the requests seen so far.
    pub(super) fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.seen.lock().unwrap())
    }

    /// Takes the requests for bytes seen so far.
    pub(super) fn take_gets(&self) -> Vec<Seen> {
        let is_bytes = |seen: &Seen| seen.method == "GET" && !seen.path.starts_with("/api/");
        self.take_seen().into_iter().filter(is_bytes).collect()
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).map(|value| value.to_str().unwrap().to_owned())
}

fn note(shared: &Shared, host: &'static str, request: &Request) -> usize {
    let headers = request.headers();
    let mut seen = shared.seen.lock().unwrap();
    seen.push(Seen {
        host,
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        token: text(headers, "authorization"),
        range: text(headers, "range"),
        if_range: text(headers, "if-range"),
        served: 0,
    });
    seen.len() - 1
}

fn status(code: u16, headers: &[(&str, String)]) -> Response<Body> {
    let mut builder = Response::builder().status(code);
    for (name, value) in headers {
        builder = builder.header(*name, value);
    }
    builder.body(Body::empty()).unwrap()
}

fn fault_status(fault: Fault) -> Response<Body> {
    let Fault::Status(code, wait) = fault else { panic!("the interface cannot cut") };
    let wait = wait.map(|seconds| ("retry-after", seconds.to_string()));
    status(code, wait.as_slice())
}

async fn on_hub(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let index = note(&shared, "hub", &request);
    let path = request.uri().path().to_owned();
    if let Some(token) = &shared.token
        && text(request.headers(), "authorization") != Some(format!("Bearer {token}"))
    {
        let message = "Access to model org/tiny is restricted.".to_owned();
        let code = if request.headers().contains_key("authorization") { 403 } else { 401 };
        return status(
            code,
            &[("x-error-code", "GatedRepo".to_owned()), ("x-error-message", message)],
        );
    }
    if let Some(rest) = path.strip_prefix("/api/models/").or(path.strip_prefix("/api/datasets/")) {
        let fault = shared.api_faults.lock().unwrap().pop_front();
        return fault.map_or_else(|| interface(&shared, rest), fault_status);
    }
    let path = path.strip_prefix("/datasets").unwrap_or(&path);
    // A renamed repository.
    if let Some(rest) = path.strip_prefix("/org/old/") {
        return status(307, &[("location", format!("/org/tiny/{rest}"))]);
    }
    let wanted = path.strip_prefix("/org/tiny/resolve/").and_then(|rest| rest.split_once('/'));
    let Some((revision, name)) = wanted else { return status(404, &[]) };
    if !["main", COMMIT].contains(&revision) {
        return status(404, &[("x-error-code", "RevisionNotFound".to_owned())]);
    }
    let stored = shared.files.lock().unwrap().get(name).cloned();
    let Some(stored) = stored else {
        return status(404, &[("x-error-code", "EntryNotFound".to_owned())]);
    };
    let sha256 = hash_bytes(&stored.bytes);
    let commit = ("x-repo-commit", COMMIT.to_owned());
    if stored.is_large {
        let location = format!("{}/blob/{name}?X-Amz-Signature=signed-secret", shared.cdn);
        return status(
            302,
            &[
                commit,
                ("location", location),
                ("x-linked-etag", format!("\"{sha256}\"")),
                ("x-linked-size", stored.bytes.len().to_string()),
            ],
        );
    }
    serve(&shared, index, &stored, &request)
}

async fn on_cdn(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let index = note(&shared, "cdn", &request);
    let name = request.uri().path().trim_start_matches("/blob/").to_owned();
    let stored = shared.files.lock().unwrap().get(&name).cloned();
    stored.map_or_else(|| status(404, &[]), |stored| serve(&shared, index, &stored, &request))
}

/// Answers under `/api/models/` and `/api/datasets/`.
fn interface(shared: &Shared, path: &str) -> Response<Body> {
    let Some(rest) = path.strip_prefix("org/tiny/") else {
        return status(404, &[("x-error-code", "RepoNotFound".to_owned())]);
    };
    let answer = match rest.split_once('/') {
        Some(("revision", revision)) if ["main", COMMIT].contains(&revision) => {
            json!({ "_id": "1", "id": REPO, "sha": COMMIT })
        }
        Some(("tree", COMMIT)) => tree(shared),
        None if rest == "refs" => {
            let one = |name: &str| json!({"name": name, "ref": name, "targetCommit": COMMIT});
            json!({ "branches": [one("main")], "tags": [one("v1.0")], "converts": [] })
        }
        _ => return status(404, &[("x-error-code", "RevisionNotFound".to_owned())]),
    };
    let body = Body::from(answer.to_string());
    Response::builder().header("content-type", "application/json").body(body).unwrap()
}

/// The listing, in the shape that the real hub gives it.
fn tree(shared: &Shared) -> Value {
    let files = shared.files.lock().unwrap();
    let entries = files.iter().map(|(path, stored)| {
        let (size, oid) = (stored.bytes.len(), hash_bytes(&stored.bytes));
        let mut entry = json!({"type": "file", "oid": &oid[..40], "size": size, "path": path});
        if stored.is_large {
            entry["lfs"] = json!({"oid": oid, "size": size, "pointerSize": 134});
        }
        entry
    });
    let folder = json!({"type": "directory", "oid": "aa", "size": 0, "path": "data"});
    entries.chain([folder]).collect()
}

/// Sends a file's bytes as a static file server does: ETag, ranges, If-Range.
fn serve(shared: &Shared, index: usize, stored: &Stored, request: &Request) -> Response<Body> {
    let etag = format!("\"{}\"", &hash_bytes(&stored.bytes)[..32]);
    let is_head = request.method() == "HEAD";
    let fault = if is_head { None } else { shared.faults.lock().unwrap().pop_front() };
    if let Some(Fault::Status(..)) = fault {
        return fault_status(fault.unwrap());
    }
    let total = stored.bytes.len();
    let start = text(request.headers(), "range")
        .filter(|_| text(request.headers(), "if-range").is_none_or(|known| known == etag))
        .map(|range| range["bytes=".len()..].trim_end_matches('-').parse::<usize>().unwrap());
    if start.is_some_and(|start| start >= total) {
        return status(416, &[("content-range", format!("bytes */{total}"))]);
    }
    let body = stored.bytes[start.unwrap_or(0)..].to_vec();
    let mut builder = Response::builder()
        .status(if start.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK })
        .header(header::ETAG, etag)
        .header(header::CONTENT_LENGTH, body.len());
    if let Some(start) = start {
        let range = format!("bytes {start}-{}/{total}", total - 1);
        builder = builder.header(header::CONTENT_RANGE, range);
    }
    if is_head {
        return builder.body(Body::empty()).unwrap();
    }
    let sent = if let Some(Fault::Cut(at)) = fault { at.min(body.len()) } else { body.len() };
    shared.seen.lock().unwrap()[index].served = sent;
    let body = match fault {
        Some(Fault::Cut(_)) => cut(Bytes::from(body), sent),
        _ => Body::from(body),
    };
    builder.body(body).unwrap()
}

/// A body that breaks off after `at` bytes.
fn cut(bytes: Bytes, at: usize) -> Body {
    Body::from_stream(stream::unfold(Some(0), move |position: Option<usize>| {
        let bytes = bytes.clone();
        async move {
            // Lets the server flush what it has before the connection breaks.
            tokio::task::yield_now().await;
            let position = position?;
            if position >= at {
                return Some((Err(std::io::Error::other("cut")), None));
            }
            let end = (position + 16 * 1024).min(at);
            Some((Ok(bytes.slice(position..end)), Some(end)))
        }
    }))
}
