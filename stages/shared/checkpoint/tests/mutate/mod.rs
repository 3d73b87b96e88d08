//! Seeded damage to files, for tests that must not depend on chance, and a count of what a reader
//! allocates.
#![allow(dead_code, reason = "every test takes a part of it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use serde_json::{Value, json};

/// Bytes that a reader may have allocated at once, beside a multiple of its input.
const ROOM: usize = 32 << 20;
/// Of the input: a byte of metadata takes at most 32 in memory, a token some hundred.
const FACTOR: usize = 256;

/// Counts what each thread has allocated, and its peak.
pub(crate) struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn count(grown: usize, shrunk: usize) {
    let now = NOW.get().wrapping_add(grown).wrapping_sub(shrunk);
    NOW.set(now);
    // Memory that another thread allocated makes the count negative.
    if (now as isize) > PEAK.get() as isize {
        PEAK.set(now);
    }
}

// SAFETY: everything is the system's allocator; counting does not allocate.
#[allow(unsafe_code, reason = "an allocator that counts")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size, layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Runs a reader on damaged files of `size` bytes: an error must name one of `files`, and neither a
/// panic nor a large allocation is allowed. `case` tells how to repeat it.
pub(crate) fn check(
    case: &str,
    size: usize,
    files: &[&str],
    read: impl FnOnce() -> Result<(), String>,
) {
    UNCOUNTED.call_once(report_panics_uncounted);
    NOW.set(0);
    PEAK.set(0);
    let outcome = catch_unwind(AssertUnwindSafe(read));
    let peak = PEAK.get();
    let Ok(result) = outcome else { panic!("{case}: a panic") };
    if let Err(error) = result {
        let named = files.iter().any(|file| error.contains(file));
        assert!(named, "{case}: no file of {files:?} is named: {error}");
    }
    assert!(peak <= ROOM + FACTOR * size, "{case}: {peak} bytes allocated for {size}");
}

static UNCOUNTED: Once = Once::new();

/// Keeps the symbols that a backtrace loads (`RUST_BACKTRACE=1`) out of the count: a library may
/// panic where the reader catches it and answers with an error.
fn report_panics_uncounted() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let (now, peak) = (NOW.get(), PEAK.get());
        report(info);
        NOW.set(now);
        PEAK.set(peak);
    }));
}

/// Rounds of a target: `rounds`, times `PIPE_FUZZ` where that is set.
pub(crate) fn rounds(rounds: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let first = number("PIPE_FUZZ_FROM").unwrap_or(0);
    first..first + rounds * number("PIPE_FUZZ").unwrap_or(1)
}

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5151)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`; 0 where that is 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        if end == 0 { 0 } else { (self.next() % end as u64) as usize }
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A number that readers trip over.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => u64::MAX >> self.below(64),
            1 => 1 << self.below(64),
            2 => (1_u64 << self.below(64)).wrapping_sub(1),
            3 => self.below(20) as u64,
            4 => (i64::MIN as u64).wrapping_add(self.below(3) as u64),
            _ => self.next(),
        }
    }
}

/// Changes bytes in one to four places. Of a file with a header of `head` bytes, most of them there.
pub(crate) fn bytes(random: &mut Random, data: &mut Vec<u8>, head: usize) {
    for _ in 0..=random.below(4) {
        let reach = if random.below(8) > 0 { head.min(data.len()) } else { data.len() };
        let at = random.below(reach);
        let len = (1 + random.below(16)).min(data.len() - at);
        match random.below(9) {
            0 | 1 => data.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << random.below(8)),
            2 => data.iter_mut().skip(at).take(1).for_each(|b| *b = random.next() as u8),
            3 | 4 => {
                let (number, width) = (random.number(), *random.pick(&[2, 4, 8]));
                let new = number.to_le_bytes();
                data.iter_mut().skip(at).zip(&new[..width]).for_each(|(b, n)| *b = *n);
            }
            5 => data.truncate(at),
            6 => drop(data.drain(at..at + len)),
            7 => {
                let again = data[at..at + len].to_vec();
                let to = random.below(reach.min(data.len()));
                data.splice(to..to, again);
            }
            _ => {
                let from = random.below(data.len());
                let part = data[from..(from + len).min(data.len())].to_vec();
                data.iter_mut().skip(at).zip(part).for_each(|(b, p)| *b = p);
            }
        }
    }
}

/// Changes a JSON text: a value in one place, or its bytes.
pub(crate) fn json(random: &mut Random, text: &[u8]) -> Vec<u8> {
    let mut out = text.to_vec();
    match serde_json::from_slice::<Value>(text) {
        Ok(mut value) if random.below(4) > 0 => {
            for _ in 0..=random.below(3) {
                let mut place = &mut value;
                // Down a random path, so that every depth has its turn.
                while random.below(5) > 0 {
                    let deeper = match place {
                        Value::Object(map) => !map.is_empty(),
                        Value::Array(list) => !list.is_empty(),
                        _ => false,
                    };
                    if !deeper {
                        break;
                    }
                    place = match place {
                        Value::Object(map) => {
                            let at = random.below(map.len());
                            map.values_mut().nth(at).expect("below its length")
                        }
                        Value::Array(list) => {
                            let at = random.below(list.len());
                            &mut list[at]
                        }
                        _ => unreachable!("only these go deeper"),
                    };
                }
                node(random, place);
            }
            out = value.to_string().into_bytes();
        }
        _ => {
            let len = out.len();
            bytes(random, &mut out, len);
        }
    }
    out
}

fn node(random: &mut Random, place: &mut Value) {
    match place {
        Value::Object(map) if random.below(2) > 0 && !map.is_empty() => {
            let key = map.keys().nth(random.below(map.len())).cloned().expect("below its length");
            let value = map.remove(&key).expect("a key of the map");
            if random.below(2) > 0 {
                map.insert(format!("{key}_"), value);
            }
        }
        Value::Array(list) if random.below(2) > 0 && !list.is_empty() => {
            let at = random.below(list.len());
            if random.below(2) > 0 {
                list.remove(at);
            } else {
                list.push(list[at].clone());
            }
        }
        place => *place = strange(random),
    }
}

fn strange(random: &mut Random) -> Value {
    let deep = (0..random.below(200)).fold(json!(1), |inner, _| json!([inner]));
    match random.below(14) {
        0 => Value::Null,
        1 => json!(random.below(2) == 0),
        2 => json!(random.number()),
        3 => json!(random.number() as i64),
        4 => json!(-1),
        5 => json!(random.pick(&[0.5, -0.0, 1e-300, 1e308, 1e39, f64::MAX])),
        6 => json!(""),
        7 => json!("x".repeat(random.below(5000))),
        8 => json!(*random.pick(&["\u{0}", "é", "🙂", "../../x", "default", "(", "[a-", "\\"])),
        9 => json!([]),
        10 => json!({}),
        11 => deep,
        12 => json!([random.number(), "x", null]),
        _ => json!({"type": "x", "a": [random.number()]}),
    }
}
