//! A server of files on loopback that counts what it gives and can be made to fail.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

pub(crate) struct Server {
    url: String,
    state: Arc<State>,
}

struct State {
    root: PathBuf,
    /// Answers requests for a range as such.
    ranges: bool,
    requests: AtomicUsize,
    bytes: AtomicU64,
    /// Once it has given this many bytes, it is out of order.
    limit: AtomicU64,
    /// Then it says nothing at all, instead of refusing.
    silent: AtomicBool,
}

impl Server {
    pub(crate) fn start(root: PathBuf, ranges: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (requests, bytes) = (AtomicUsize::new(0), AtomicU64::new(0));
        let limit = AtomicU64::new(u64::MAX);
        let silent = AtomicBool::new(false);
        let state = Arc::new(State { root, ranges, requests, bytes, limit, silent });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || while state.answer(&stream).is_some() {});
            }
        });
        Self { url, state }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.state.bytes.load(Ordering::SeqCst)
    }

    /// Takes requests and answers none after so many more bytes.
    pub(crate) fn falls_silent_after(&self, bytes: u64) {
        self.state.silent.store(true, Ordering::SeqCst);
        self.break_after(bytes);
    }

    /// Refuses everything after so many more bytes.
    pub(crate) fn break_after(&self, bytes: u64) {
        self.state.limit.store(self.bytes().saturating_add(bytes), Ordering::SeqCst);
    }
}

impl State {
    /// One request; `None` at the end of the connection.
    fn answer(&self, mut stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream);
        let (mut first, mut range) = (String::new(), None);
        reader.read_line(&mut first).ok().filter(|n| *n > 0)?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_lowercase().strip_prefix("range: bytes=") {
                let (from, to) = value.trim().split_once('-')?;
                range = Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?));
            }
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
        let path = first.split(' ').nth(1)?.trim_start_matches('/');
        let mut fail =
            |status: &str| write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").ok();
        let Ok(content) = fs::read(self.root.join(path)) else { return fail("404 Not Found") };
        let all = content.len();
        let (status, part, extra) = match range.filter(|_| self.ranges) {
            Some((from, to)) => {
                let to = to.min(all - 1);
                let extra = format!("content-range: bytes {from}-{to}/{all}\r\n");
                ("206 Partial Content", &content[from..=to], extra)
            }
            None => ("200 OK", &content[..], String::new()),
        };
        let head = first.starts_with("HEAD");
        let given = if head { 0 } else { part.len() as u64 };
        let before = self.bytes.fetch_add(given, Ordering::SeqCst);
        if before.saturating_add(given) > self.limit.load(Ordering::SeqCst) {
            while self.silent.load(Ordering::SeqCst) {
                std::thread::park();
            }
            return fail("403 Forbidden");
        }
        write!(
            stream,
            "HTTP/1.1 {status}\r\n{extra}content-length: {}\r\nlast-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n",
            part.len()
        )
        .ok()?;
        if !head {
            stream.write_all(part).ok()?;
        }
        Some(())
    }
}
